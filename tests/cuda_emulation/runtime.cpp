// The runtime of the emulated extension: every op goes to its CUDA kernel, whatever the device of
// its tensors, and those that have none refuse.
#include "runtime/runtime.h"

#include <cstdint>
#include <string>

#include "core/device.h"
#include "core/error.h"
#include "emulator.h"
#include "ops/all.h"

// ---- for emulated.py

#define PYKERN_EXPORT extern "C" __attribute__((visibility("default")))

// Launches and blocks so far
PYKERN_EXPORT void emulation_counts(uint64_t* counted) {
  counted[0] = emulation::counts().launches;
  counted[1] = emulation::counts().blocks;
}
PYKERN_EXPORT void emulation_seed(uint64_t seed) { emulation::set_seed(seed); }
PYKERN_EXPORT void emulation_watch(bool on) { emulation::watch(on); }
PYKERN_EXPORT const char* emulation_seen() {
  static std::string text;
  text = emulation::seen();
  return text.c_str();
}
PYKERN_EXPORT void emulation_leave_out(const char* site) { emulation::leave_out(site); }

namespace pykern {

namespace cpu {
#define PYKERN_EMULATE(kernel, Op) \
  void kernel(const Op& op) { cuda::kernel(op, nullptr); }
PYKERN_OPS(PYKERN_EMULATE)
#undef PYKERN_EMULATE
}  // namespace cpu

const bool kCudaBuilt = true;
CudaStatus cuda_status() { return {.usable = true, .sentence = "emulated"}; }

namespace runtime {
const char* isa() { return "emulated"; }
int panel_width() { return 0; }  // weights are rows, as on CUDA
bool pairs_bf16() { return false; }
std::vector<std::pair<std::string, bool>> isas() { return {{"emulated", true}}; }
int threads() { return 1; }
void set_threads(int) {}
}  // namespace runtime

}  // namespace pykern

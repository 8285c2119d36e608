// Stands in for csrc/cuda in a build without CUDA.
#include "core/error.h"
#include "ops/all.h"
#include "runtime/runtime.h"

namespace pykern {
namespace cuda {

#define PYKERN_REFUSE(kernel, Op)                                     \
  void kernel(const Op&, Stream) {                                    \
    fail(Kind::runtime, #kernel                                       \
         ": this build of pykern has no CUDA kernels; "               \
         "see pykern.show_config() and move the tensors to the CPU"); \
  }
PYKERN_OPS(PYKERN_REFUSE)
#undef PYKERN_REFUSE

}  // namespace cuda

namespace runtime {
std::string cuda_status() { return "not built"; }
}  // namespace runtime
}  // namespace pykern

// Stands in for the kernels that csrc/cuda does not have: all of them in a build without CUDA.
#include "core/device.h"
#include "core/error.h"
#include "ops/all.h"

namespace pykern {
namespace cuda {

#define PYKERN_REFUSE(kernel, Op)                                                    \
  void kernel(const Op&, Stream) {                                                   \
    fail(Kind::runtime,                                                              \
         #kernel ": pykern has no CUDA kernel for it yet; move the tensors to CPU"); \
  }
PYKERN_CPU_OPS(PYKERN_REFUSE)
#undef PYKERN_REFUSE

#if !PYKERN_CUDA
#define PYKERN_REFUSE(kernel, Op)                                     \
  void kernel(const Op&, Stream) {                                    \
    fail(Kind::runtime, #kernel                                       \
         ": this build of pykern has no CUDA kernels; "               \
         "see pykern.show_config() and move the tensors to the CPU"); \
  }
PYKERN_CUDA_OPS(PYKERN_REFUSE)
#undef PYKERN_REFUSE
#endif

}  // namespace cuda

#if !PYKERN_CUDA
const bool kCudaBuilt = false;
CudaStatus cuda_status() { return {.sentence = "not built"}; }
#endif

}  // namespace pykern

// Whether the kernels can run here, in one sentence. Importing pykern calls nothing of this.
#include <cuda_runtime.h>

#include <sstream>

#include "core/device.h"

namespace pykern {

constexpr int kLeastMajor = 8;  // mma.sync of bfloat16, cp.async

static std::string version(int number) {  // 13000 is 13.0
  return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

const bool kCudaBuilt = true;

CudaStatus cuda_status() {
  CudaStatus status;
  std::ostringstream text;
  text << "built for " << PYKERN_CUDA_ARCHS;
  int driver = 0, runtime = 0, devices = 0;
  (void)cudaRuntimeGetVersion(&runtime);
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    (void)cudaGetLastError();
    status.sentence = text.str() + ", but there is no NVIDIA driver";
    return status;
  }
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess) {
    (void)cudaGetLastError();
    text << ", but " << cudaGetErrorString(error) << " (driver for CUDA " << version(driver)
         << ", built with " << version(runtime) << ")";
    status.sentence = text.str();
    return status;
  }
  int major = 0, minor = 0, best = -1;
  for (int i = 0; i < devices; ++i) {
    (void)cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, i);
    (void)cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, i);
    if (10 * major + minor > best) best = 10 * major + minor;
  }
  status.usable = best >= 10 * kLeastMajor;
  text << (status.usable ? ", on a device of " : ", but the best device has ")
       << "compute capability " << best / 10 << "." << best % 10;
  if (!status.usable) text << ", and " << kLeastMajor << ".0 is the least";
  status.sentence = text.str();
  return status;
}

}  // namespace pykern

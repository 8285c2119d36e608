// The pool of scratch memory of each device: pykern's own, since the default one gives all memory
// back whenever the device is waited for, and getting it again takes longer than most kernels.
#include <mutex>

#include "cuda/launch.h"

namespace pykern::cuda {

constexpr int kMostDevices = 64;
constexpr uint64_t kKeptBytes = 512 << 20;  // what a pool keeps for the next call

cudaMemPool_t scratch_pool() {
  static std::mutex mutex;
  static cudaMemPool_t pools[kMostDevices] = {};
  int device = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  PYKERN_CHECK(runtime, device < kMostDevices, "pykern uses the first ", kMostDevices,
               " CUDA devices, this is number ", device);
  const std::lock_guard<std::mutex> lock(mutex);
  cudaMemPool_t& pool = pools[device];
  if (!pool) {
    cudaMemPoolProps properties{};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    uint64_t kept = kKeptBytes;
    cudaMemPool_t made;
    require(cudaMemPoolCreate(&made, &properties), "cudaMemPoolCreate");
    require(cudaMemPoolSetAttribute(made, cudaMemPoolAttrReleaseThreshold, &kept),
            "cudaMemPoolSetAttribute");
    pool = made;
  }
  return pool;
}

}  // namespace pykern::cuda

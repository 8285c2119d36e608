// The host side of a launch: device, stream, scratch memory, and the check of every call.
#pragma once
#include <cuda_runtime.h>

#include "core/error.h"
#include "core/tensor.h"

namespace pykern::cuda {

constexpr int kWarp = 32;

inline void require(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next call would report it again
  fail(Kind::runtime, what, ": ", cudaGetErrorString(status));
}

// Makes the device of a tensor the current one for the length of a scope.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    require(cudaGetDevice(&before_), "cudaGetDevice");
    if (t.device_index == before_) return;
    require(cudaSetDevice(t.device_index), "cudaSetDevice");
    changed_ = true;
  }
  ~OnDevice() {
    if (changed_) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

struct Grid {
  dim3 blocks, threads;
  size_t shared = 0;  // bytes
};

constexpr size_t kSharedWithoutAsking = 48 << 10;

template <class... Parameters, class... Arguments>
void launch(const char* what, void (*kernel)(Parameters...), const Grid& grid, Stream stream,
            const Arguments&... arguments) {
  if (grid.shared > kSharedWithoutAsking)
    require(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(grid.shared)),
            what);
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  require(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

cudaMemPool_t scratch_pool();  // of the current device

// Scratch memory of one call, in the order of its stream: it may be captured in a graph, and
// nothing waits.
class Workspace {
 public:
  Workspace(size_t bytes, Stream stream) : stream_(static_cast<cudaStream_t>(stream)) {
    if (bytes > 0)
      require(cudaMallocFromPoolAsync(&data_, bytes, scratch_pool(), stream_),
              "cudaMallocFromPoolAsync");
  }
  ~Workspace() {
    if (data_) (void)cudaFreeAsync(data_, stream_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <class T>
  T* at() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  cudaStream_t stream_;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t kMaxBlocks = 1 << 30;  // in x

}  // namespace pykern::cuda

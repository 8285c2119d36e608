// What both directions of the norms share.
#pragma once
#include "cuda/math.cuh"
#include "cuda/ring.cuh"

namespace pykern::cuda {

template <class T>
__device__ __forceinline__ T* at(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + rows.offset(row);
}

// The rows of a row of threads: step after step as many further as the grid takes together.
class Walk {
 public:
  __device__ __forceinline__ Walk()
      : first_(blockIdx.x * blockDim.y + threadIdx.y), stride_(gridDim.x * blockDim.y) {}
  __device__ __forceinline__ int64_t row(unsigned step) const {
    return static_cast<int64_t>(uint64_t(step) * stride_ + first_);
  }

 private:
  unsigned first_, stride_;  // half the registers
};

template <class T>
bool is_plain(const Tensor& t) {
  return t.given && t.dtype == kDType<T>;
}

// weight or bias beside a pack, in the cache since the first row: registers are scarcer.
template <class T, int n>
__device__ __forceinline__ void parameters(const Numbers<T>& numbers, Compute<T> absent, int first,
                                           int valid, bool vectors, Compute<T> (&v)[n]) {
  if (numbers.data) return numbers.load(first, valid, vectors, v);
#pragma unroll
  for (int j = 0; j < n; ++j) v[j] = absent;
}

}  // namespace pykern::cuda

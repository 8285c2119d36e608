// Sums and maxima over a warp and over a row of a block's threads, in an order that the number of
// threads fixes.
#pragma once
#include "cuda/launch.h"
#include "cuda/math.cuh"

namespace pykern::cuda {

// Sums of float32 in double, where their error would show: the four numbers of a pack in float, so
// there is one addition in double for them.
template <class T>
using Sum = std::conditional_t<sizeof(T) == 2, float, double>;

template <class C, int n>
__device__ __forceinline__ C added(const C (&x)[n]) {  // in pairs
  if constexpr (n == 1) {
    return x[0];
  } else {
    C half[n / 2];
#pragma unroll
    for (int j = 0; j < n / 2; ++j) half[j] = x[j] + x[j + n / 2];
    return added(half);
  }
}

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxWarps = 32;  // of a block

struct Add {
  static constexpr float kNothing = 0.0f;
  template <class C>
  __device__ __forceinline__ C operator()(C a, C b) const {
    return a + b;
  }
};
struct Larger {  // of numbers
  static constexpr float kNothing = -INFINITY;
  template <class C>
  __device__ __forceinline__ C operator()(C a, C b) const {
    return larger(a, b);
  }
};

template <class C, class Join>
__device__ __forceinline__ C across_warp(C x, Join join) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// What AcrossRow needs for n numbers at a time.
template <class C, int n>
struct RowScratch {
  C partial[2][n][kMaxWarps];
};

// Reductions over the threads of a row of the block (those of one threadIdx.y), in an order that
// their number fixes. Two sets of scratch take turns, so that a barrier each is enough: whoever
// writes a set again has met all others since they read it. All threads of the block call.
template <class C, int n>
class AcrossRow {
 public:
  __device__ __forceinline__ explicit AcrossRow(RowScratch<C, n>& scratch) : scratch_(scratch) {}

  // Each x[i] becomes its reduction, for every thread of the row.
  template <class Join>
  __device__ __forceinline__ void operator()(C (&x)[n], Join join) {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    const int first = threadIdx.y * warps;
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = across_warp(x[i], join);
    if (warps == 1) return;
    auto& partial = scratch_.partial[turn_];
    turn_ ^= 1;
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (lane == 0) partial[i][first + warp] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < n; ++i)
      x[i] = across_warp(lane < warps ? partial[i][first + lane] : C(Join::kNothing), join);
  }

 private:
  RowScratch<C, n>& scratch_;
  int turn_ = 0;
};

}  // namespace pykern::cuda

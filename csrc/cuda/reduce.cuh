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
constexpr int kRowWarps = 16;  // of a row of it

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

// Over groups of `lanes` neighbours
template <int lanes, class C, class Join>
__device__ __forceinline__ C across_lanes(C x, Join join) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// What AcrossRow needs for up to n numbers at a time.
template <class C, int n>
struct RowScratch {
  struct alignas(n * sizeof(C)) Partial {
    C of[n];
  };
  Partial partial[2][kMaxWarps];
};

// Reductions over the threads of a row of the block (those of one threadIdx.y), in an order that
// their number fixes. Two sets of scratch take turns, so that a barrier each is enough: whoever
// writes a set again has met all others since they read it. All threads of the block call.
template <class C, int n>
class AcrossRow {
 public:
  __device__ __forceinline__ explicit AcrossRow(RowScratch<C, n>& scratch) : scratch_(scratch) {}

  // Each x[i] becomes its reduction, for every thread of the row. Of two numbers each half of a
  // warp reduces one.
  template <int m, class Join>
  __device__ __forceinline__ void operator()(C (&x)[m], Join join) {
    static_assert(m <= n && m <= 2);
    constexpr int kLanes = kWarp / m;
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    C own = x[0];
    if constexpr (m == 2) {
      const bool second = lane >= kLanes;
      own = join(second ? x[1] : x[0], __shfl_xor_sync(kAllLanes, second ? x[0] : x[1], kLanes));
    }
    own = across_lanes<kLanes>(own, join);
    if (warps == 1) {
      to_all(own, x);
      return;
    }
    auto* partial = scratch_.partial[turn_] + threadIdx.y * warps;
    turn_ ^= 1;
    if (lane % kLanes == 0) partial[warp].of[lane / kLanes] = own;
    __syncthreads();
    const int from = lane % kRowWarps;
    own = from < warps ? partial[from].of[lane / kLanes] : C(Join::kNothing);
    own = across_lanes<kRowWarps>(own, join);
    to_all(own, x);
  }

 private:
  template <int m>
  __device__ __forceinline__ void to_all(C own, C (&x)[m]) const {
    x[0] = own;
    if constexpr (m == 2)
      x[0] = __shfl_sync(kAllLanes, own, 0), x[1] = __shfl_sync(kAllLanes, own, kWarp / 2);
  }

  RowScratch<C, n>& scratch_;
  int turn_ = 0;
};

}  // namespace pykern::cuda

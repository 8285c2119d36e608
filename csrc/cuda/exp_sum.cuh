// Sums of exponentials in one pass over their arguments, for softmax and cross_entropy.
#pragma once
#include <float.h>

#include "cuda/reduce.cuh"

namespace pykern::cuda {

// A thread's sum exp(x - shift). shift follows the largest x, a little behind, so that it seldom
// moves. -inf adds 0, a NaN or +inf makes the sum NaN.
template <class T>
class ExpSum {
 public:
  using C = Compute<T>;

  // Of x the first `valid` count; the others may be overwritten.
  template <int n>
  __device__ __forceinline__ void add(C (&x)[n], int64_t valid) {
    if (valid < n) {
#pragma unroll
      for (int j = 0; j < n; ++j) x[j] = j < valid ? x[j] : C(-INFINITY);
    }
    C top = x[0], e[n];
#pragma unroll
    for (int j = 1; j < n; ++j) top = larger(top, x[j]);
    if (top > shift_ + kBehind) move(top);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      if constexpr (kHalf<T>)
        e[j] = exp2_approx(fma(x[j], scale_, -scaled_));
      else
        e[j] = exponential(x[j] - shift_);
    }
    sum_ += added(e);
  }

  __device__ __forceinline__ C shift() const { return shift_; }
  __device__ __forceinline__ Sum<T> sum() const {
    if constexpr (kHalf<T>)  // scaled_ is rounded
      return sum_ * exp2_approx(fma(-shift_, scale_, scaled_));
    else
      return sum_;
  }

 private:
  static constexpr C kBehind = 8;

  __device__ __forceinline__ void move(C top) {
    sum_ = sum() * exponential(Sum<T>(shift_) - Sum<T>(top));
    shift_ = top;
    if constexpr (kHalf<T>) {
      // Farther out half numbers differ by so much that their powers are 0 for any base.
      scale_ = fabsf(top) < 0x1p24f ? kLog2e : 1.0f;
      scaled_ = top * scale_;
      sum_ *= exp2_approx(fma(shift_, scale_, -scaled_));
    }
  }

  C shift_ = sizeof(C) == sizeof(float) ? C(-FLT_MAX) : C(-DBL_MAX);  // nothing but -inf so far
  Sum<T> sum_ = 0;  // of a half type: sum 2^(scale_ x - scaled_), one instruction for the exponent
  float scale_ = 1, scaled_ = -FLT_MAX;
};

template <class T, class Total>
struct ExpSumScratch {
  RowScratch<Compute<T>, 1> shifts;
  RowScratch<Total, 1> sums;
};

// Those of a row's threads as one, its sum a Total, for every thread of the row.
template <class T, class Total>
class ExpSumAcrossRow {
 public:
  __device__ __forceinline__ explicit ExpSumAcrossRow(ExpSumScratch<T, Total>& scratch)
      : shifts_(scratch.shifts), sums_(scratch.sums) {}

  __device__ __forceinline__ void operator()(const ExpSum<T>& own, Compute<T>* shift, Total* sum) {
    Compute<T> top[1] = {own.shift()};
    shifts_(top, Larger());
    Total total[1] = {Total(own.sum()) * Total(exponential(Sum<T>(own.shift()) - Sum<T>(top[0])))};
    sums_(total, Add());
    *shift = top[0];
    *sum = total[0];
  }
  __device__ __forceinline__ Total added_up(Total x) {
    Total total[1] = {x};
    sums_(total, Add());
    return total[0];
  }

 private:
  AcrossRow<Compute<T>, 1> shifts_;
  AcrossRow<Total, 1> sums_;
};

}  // namespace pykern::cuda

// Elementary functions by one name for float and double.
#pragma once
#include <math.h>

#include "cuda/types.cuh"

namespace pykern::cuda {

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float complementary_error(float x) { return erfcf(x); }
__device__ __forceinline__ double complementary_error(double x) { return erfc(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return sqrt(x); }
__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
__device__ __forceinline__ double inverse_root(double x) { return 1 / sqrt(x); }
// a b, rounded: never one operation with an addition that follows
__device__ __forceinline__ float product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double product(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double larger(double a, double b) { return fmax(a, b); }

constexpr float kLog2e = 1.44269504f;

template <class T>
constexpr bool kHalf = sizeof(T) == 2;

// In the accuracy that a result needs which is rounded to T: for a half type one instruction.
template <class T>
__device__ __forceinline__ Compute<T> exponential_for(Compute<T> x) {
  if constexpr (kHalf<T>)
    return exp2_approx(x * kLog2e);
  else
    return exponential(x);
}
template <class T>
__device__ __forceinline__ Compute<T> reciprocal_for(Compute<T> x) {
  if constexpr (kHalf<T>)
    return rcp_approx(x);
  else
    return 1 / x;
}

// x / n
template <class T>
__device__ __forceinline__ Compute<T> quotient_for(Compute<T> x, Compute<T> n,
                                                   Compute<T> inverse_n) {
  return kHalf<T> ? x * inverse_n : x / n;
}

}  // namespace pykern::cuda

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

}  // namespace pykern::cuda

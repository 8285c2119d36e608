// Products by mma.sync, and halves two to a register.
#pragma once
#include "cuda/types.cuh"

namespace pykern::cuda {

constexpr int kChunk = 8;  // numbers of 16 bytes

// d [16, 8] += a [16, 16] b [16, 8] over a warp
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, bf16) {
  mma_bf16(d, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, f16) {
  mma_f16(d, a, b0, b1);
}
// d [16, 8] += a [16, 8] b [8, 8], of numbers rounded to tf32
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, float) {
  mma_tf32(d, a, b0, b1);
}

// The first in the low bits
template <class T>
__device__ __forceinline__ uint32_t rounded_pair(float first, float second) {
  if constexpr (std::is_same_v<T, bf16>)
    return bf16_pair(first, second);
  else
    return f16_pair(first, second);
}

template <class T>
constexpr uint16_t kExponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return (x.bits & kExponent<T>) != kExponent<T>;
}
// Two halves, of which those that are infinite or NaN are 0
template <class T>
__device__ __forceinline__ uint32_t finite_halves(uint32_t word) {
  constexpr uint32_t exponent = kExponent<T>;
  if ((word & exponent) == exponent) word &= 0xffff0000;
  if ((word >> 16 & exponent) == exponent) word &= 0xffff;
  return word;
}

}  // namespace pykern::cuda

// The number types of the kernels. bf16 and f16 are for storage: arithmetic is in float, of double
// in double.
#pragma once
#include <type_traits>

#include "core/tensor.h"
#include "cuda/ptx.cuh"

namespace pykern::cuda {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
constexpr DType kDType = std::is_same_v<T, double>  ? DType::f64
                         : std::is_same_v<T, float> ? DType::f32
                         : std::is_same_v<T, bf16>  ? DType::bf16
                                                    : DType::f16;

template <class T>
using Compute = std::conditional_t<sizeof(T) == sizeof(double), double, float>;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return bf16_value(x.bits); }
__device__ __forceinline__ float widen(f16 x) { return f16_value(x.bits); }

template <class T>
struct Narrow {
  __device__ __forceinline__ static T of(Compute<T> x) { return x; }
};
template <>
struct Narrow<bf16> {
  __device__ __forceinline__ static bf16 of(float x) { return {bf16_bits(x)}; }
};
template <>
struct Narrow<f16> {
  __device__ __forceinline__ static f16 of(float x) { return {f16_bits(x)}; }
};
template <class T, class C>
__device__ __forceinline__ T narrow(C x) {
  return Narrow<T>::of(static_cast<Compute<T>>(x));
}

// body(T{}) with the type of a floating dtype; checks have refused all others
template <class Body>
void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f64: return body(double{});
    case DType::bf16: return body(bf16{});
    case DType::f16: return body(f16{});
    default: return body(float{});
  }
}

}  // namespace pykern::cuda

// Activations and their derivatives, chosen at run time: every thread takes the same branch.
#pragma once
#include "cuda/math.cuh"
#include "ops/activation.h"

namespace pykern::cuda {

template <class C>
__device__ __forceinline__ C clamp(C x, C most) {  // a NaN stays
  return x > most ? most : x < -most ? -most : x;
}

template <class C>
__device__ __forceinline__ C sigmoid(C x) {
  return 1 / (1 + exponential(-x));
}

// The standard normal distribution function.
template <class C>
__device__ __forceinline__ C normal_cdf(C x) {
  return C(0.5) * complementary_error(C(-0.70710678118654752) * x);
}

template <class C>
__device__ __forceinline__ C activate(Activation kind, C x) {
  constexpr C k = C(1.5957691216057308), c = C(0.044715);  // 2 sqrt(2 / pi)
  switch (kind) {
    case Activation::relu: return x > 0 || x != x ? x : C(0);
    case Activation::gelu: return x * normal_cdf(x);
    case Activation::gelu_tanh: return x * sigmoid(k * x * (1 + c * x * x));
    case Activation::silu: return x * sigmoid(x);
    case Activation::sigmoid: return sigmoid(x);
    default: return x;
  }
}

// f'(x) and, in *value, f(x)
template <class C>
__device__ __forceinline__ C derivative(Activation kind, C x, C* value) {
  // Far out every derivative but relu's is constant; without the bound, infinity times 0 appears.
  constexpr C far = sizeof(C) == sizeof(float) ? C(88) : C(700);  // exp(far) is finite
  constexpr C k = C(1.5957691216057308), c = C(0.044715);
  const C near = clamp(x, far);
  *value = activate(kind, x);
  switch (kind) {
    case Activation::relu: return x > 0 ? C(1) : x == x ? C(0) : x;
    case Activation::sigmoid: {
      const C e = exponential(-near), s = 1 / (1 + e);
      return s * (e * s);
    }
    case Activation::silu: {
      const C e = exponential(-near), s = 1 / (1 + e);
      return s * (1 + near * (e * s));
    }
    case Activation::gelu: {
      const C density = C(0.39894228040143268) * exponential(C(-0.5) * near * near);
      return near * density + normal_cdf(near);
    }
    case Activation::gelu_tanh: {
      const C e = exponential(clamp(-(k * near * (1 + c * near * near)), far));
      const C s = 1 / (1 + e), rest = e * s;  // 1 - s without cancellation
      return s * (1 + near * rest * (k * (1 + 3 * c * near * near)));
    }
    default: return 1;
  }
}

}  // namespace pykern::cuda

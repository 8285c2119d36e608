// Activations and their derivatives, of numbers of type C for results that are rounded to T.
#pragma once
#include "cuda/math.cuh"
#include "ops/activation.h"

namespace pykern::cuda {

// body(kind) with a constant: a branch for many numbers instead of one for each
template <class Body>
__device__ __forceinline__ void with_kind(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::relu: return body(Activation::relu);
    case Activation::gelu: return body(Activation::gelu);
    case Activation::gelu_tanh: return body(Activation::gelu_tanh);
    case Activation::silu: return body(Activation::silu);
    case Activation::sigmoid: return body(Activation::sigmoid);
    default: return body(Activation::none);
  }
}

template <class C>
__device__ __forceinline__ C clamp(C x, C most) {  // a NaN stays
  return x > most ? most : x < -most ? -most : x;
}

template <class T, class C>
__device__ __forceinline__ C sigmoid(C x) {
  return reciprocal_for<T>(1 + exponential_for<T>(-x));
}

template <class T, class C>
__device__ __forceinline__ C gaussian(C x) {
  return exponential_for<T>(C(-0.5) * x * x);
}

// The standard normal distribution function.
template <class T, class C>
__device__ __forceinline__ C normal_cdf(C x) {
  if constexpr (kHalf<T>) {  // of -|x|: gaussian(x) times a polynomial, 4e-6 off for any x
    const C t = rcp_approx(1 + C(0.308) * fabsf(x));
    C p = C(-0.0755323553) * t + C(0.189909624);
    p = p * t + C(0.00695711912);
    p = p * t + C(0.136695031);
    p = p * t + C(0.118842510);
    p = p * t + C(0.123126166);
    const C tail = p * t * gaussian<T>(x);
    return x > 0 ? 1 - tail : tail;
  } else {
    return C(0.5) * complementary_error(C(-0.70710678118654752) * x);
  }
}

// gelu_tanh is x sigmoid(k x + k c x^3).
template <class C>
struct Cubic {
  static constexpr C k = C(1.5957691216057308), c = C(0.044715);  // 2 sqrt(2 / pi)
  __device__ __forceinline__ static C of(C x) { return x * (k + k * c * (x * x)); }
  __device__ __forceinline__ static C slope(C x) { return k + 3 * k * c * (x * x); }
};

template <class C, class T = C>
__device__ __forceinline__ C activate(Activation kind, C x) {
  switch (kind) {
    case Activation::relu: return x > 0 || x != x ? x : C(0);
    case Activation::gelu: return x * normal_cdf<T>(x);
    case Activation::gelu_tanh: return x * sigmoid<T>(Cubic<C>::of(x));
    case Activation::silu: return x * sigmoid<T>(x);
    case Activation::sigmoid: return sigmoid<T>(x);
    default: return x;
  }
}

// f'(x) and, in *value, f(x) with the bits of activate
template <class C, class T = C>
__device__ __forceinline__ C derivative(Activation kind, C x, C* value) {
  // Far out every derivative but relu's is constant; without the bound, infinity times 0 appears.
  constexpr C far = sizeof(C) == sizeof(float) ? C(88) : C(700);  // exp(far) is finite
  const C near = clamp(x, far);
  // s = sigmoid(u), rest = 1 - s without cancellation. For a half type s has the bits of
  // activate's: from exp(far) on the reciprocal is 0.
  C s, rest;
  const auto split = [&](C u) {
    const C e = exponential_for<T>(-u > far ? far : -u);
    s = reciprocal_for<T>(1 + e);
    rest = e * s;
  };
  const auto value_is = [&](C y) { *value = kHalf<T> ? y : activate<C, T>(kind, x); };
  switch (kind) {
    case Activation::relu:
      value_is(activate<C, T>(kind, x));
      return x > 0 ? C(1) : x == x ? C(0) : x;
    case Activation::sigmoid:
      split(x);
      value_is(s);
      return s * rest;
    case Activation::silu:
      split(x);
      value_is(x * s);
      return s * (1 + near * rest);
    case Activation::gelu: {
      const C cdf = normal_cdf<T>(x);
      value_is(x * cdf);
      return C(0.39894228040143268) * near * gaussian<T>(x) + cdf;
    }
    case Activation::gelu_tanh:
      split(Cubic<C>::of(x));
      value_is(x * s);
      return s * (1 + near * rest * Cubic<C>::slope(near));
    default: *value = x; return 1;
  }
}

}  // namespace pykern::cuda

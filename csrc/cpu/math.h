// Elementary functions and activations over Vec, with their derivatives.
//   exp: 2^n p(r), x = n ln 2 + r;  Phi(x) = P(N(0,1) <= x) by the scaled complementary error
//   function;  every activation is x times a gate, or the gate itself.
#pragma once
#include <math.h>

#include "cpu/vec.h"
#include "ops/activation.h"

PYKERN_BEGIN_ISA
namespace {

static inline float natural_log(float x) { return __builtin_logf(x); }
static inline double natural_log(double x) { return __builtin_log(x); }

// 2^n for integral n in [-1022, 1023] ([-126, 127] in float)
static inline VecF power_of_two(VecF n) {
  using Int = Registers<float>::Int;
  return {(VecF::Reg)((__builtin_convertvector(n.r, Int) + 127) << 23)};
}
static inline VecD power_of_two(VecD n) {
  using Int = Registers<double>::Int;
  return {(VecD::Reg)((__builtin_convertvector(n.r, Int) + 1023) << 52)};
}

// To the nearest integer: adding and subtracting 1.5 * 2^(mantissa bits).
static inline VecD round(VecD x) {
  const VecD magic = VecD::splat(6755399441055744.0);
  return {(x.r + magic.r) - magic.r};
}

template <class C, int n>
static inline Vec<C> polynomial(Vec<C> x, const C (&c)[n]) {  // c[0] + c[1] x + ...
  Vec<C> y = Vec<C>::splat(c[n - 1]);
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) y = fma(y, x, Vec<C>::splat(c[i]));
  return y;
}

// Two halves of the exponent, so that results below the normal range come out right.
template <class C>
static inline Vec<C> scale_by_power(Vec<C> x, Vec<C> n) {
  const Vec<C> half = round(n * Vec<C>::splat(C(0.5)));
  return x * power_of_two(half) * power_of_two(n - half);
}

static inline VecF exp(VecF x) {
  // exp(r) = 1 + r + r^2 q(r); q fitted on |r| <= ln 2 / 2, relative error 1.1e-8
  constexpr float q[] = {0.5f, 0.16666573286f, 0.04166645556f, 0.00836377684f, 0.00139345427f};
  x = max(x, VecF::splat(-104.0f));  // exp(-104) rounds to 0
  x = min(x, VecF::splat(89.0f));    // exp(89) rounds to infinity
  const VecF n = round(x * VecF::splat(1.44269504f));
  VecF r = fma(n, VecF::splat(-0.693145752f), x);  // ln 2 in two parts
  r = fma(n, VecF::splat(-1.42860677e-6f), r);
  const VecF p = fma(r * r, polynomial(r, q), r) + VecF::splat(1.0f);
#if defined(__AVX512F__)
  return scale_exponent(p, n);
#else
  return scale_by_power(p, n);
#endif
}

static inline VecD exp(VecD x) {
  // the Taylor series to r^13: remainder 4e-18 on |r| <= ln 2 / 2
  constexpr double c[] = {1.0,
                          1.0,
                          1.0 / 2,
                          1.0 / 6,
                          1.0 / 24,
                          1.0 / 120,
                          1.0 / 720,
                          1.0 / 5040,
                          1.0 / 40320,
                          1.0 / 362880,
                          1.0 / 3628800,
                          1.0 / 39916800,
                          1.0 / 479001600,
                          1.0 / 6227020800.0};
  x = max(x, VecD::splat(-746.0));
  x = min(x, VecD::splat(710.0));
  const VecD n = round(x * VecD::splat(1.4426950408889634));
  VecD r = fma(n, VecD::splat(-0.6931471803691238), x);
  r = fma(n, VecD::splat(-1.9082149292705877e-10), r);
  return scale_by_power(polynomial(r, c), n);
}

// 2^x for x <= 250, 0 for -infinity. With few bits the relative error is 4e-6: below that of a
// result that is rounded to bf16.
template <bool few_bits = false>
static inline VecF power2(VecF x) {
  // 2^r = 1 + r q(r) on |r| <= 1/2; relative errors 2.6e-9 and 3.6e-6
  constexpr float fine[] = {0.69314724f,  0.24022652f,   0.055503103f,
                            0.009617693f, 0.0013406643f, 0.00015594678f};
  constexpr float coarse[] = {0.6931136f, 0.2402071f, 0.055976883f, 0.009782912f};
  x = max(x, VecF::splat(-151.0f));  // 2^-151 rounds to 0
  const VecF n = round(x), r = x - n;
  VecF q;
  if constexpr (few_bits)
    q = polynomial(r, coarse);
  else
    q = polynomial(r, fine);
  const VecF p = fma(q, r, VecF::splat(1.0f));
#if defined(__AVX512F__)
  return scale_exponent(p, n);
#else
  return scale_by_power(p, n);
#endif
}
template <bool few_bits = false>
static inline VecD power2(VecD x) {
  return exp(x * VecD::splat(0.6931471805599453));
}

// tanh(x) = (1 - e) / (1 + e), e = exp(-2 |x|), with the sign of x; near 0 a series
static inline VecF tanh(VecF x) {
  constexpr float c[] = {1.0f, -1.0f / 3, 2.0f / 15, -17.0f / 315, 62.0f / 2835};
  const VecF one = VecF::splat(1.0f), size = abs(x), square = x * x;
  const VecF e = exp(size * VecF::splat(-2.0f)), far = (one - e) / (one + e);
  return select(size < VecF::splat(0.3f), x * polynomial(square, c),
                select(x < VecF::zero(), -far, far));
}
static inline VecD tanh(VecD x) {
  for (int i = 0; i < VecD::lanes; ++i) x.r[i] = ::tanh(x.r[i]);
  return x;
}

template <class C>
static inline Vec<C> sigmoid(Vec<C> x) {
  const Vec<C> one = Vec<C>::splat(C(1));
  return one / (one + exp(-x));
}

// The standard normal distribution function and, through density, its derivative.
static inline VecF normal_cdf(VecF x, VecF* density) {
  // erfcx(z) = exp(z^2) erfc(z) = t c(t) with t = 1 / (1 + 0.4 z); relative error 6.6e-9
  constexpr float c[] = {0.22573486f,  0.22443030f, 0.21910424f,  0.11073426f, 0.32545411f,
                         -0.38161849f, 0.66212839f, -0.58339567f, 0.23347009f, -0.03604209f};
  const VecF one = VecF::splat(1.0f);
  const VecF z = abs(x) * VecF::splat(0.70710678f);
  const VecF t = one / fma(z, VecF::splat(0.4f), one);
  const VecF bell = exp(x * x * VecF::splat(-0.5f));
  const VecF tail = VecF::splat(0.5f) * bell * t * polynomial(t, c);
  *density = bell * VecF::splat(0.39894228f);
  return select(x < VecF::zero(), tail, one - tail);
}
static inline VecD normal_cdf(VecD x, VecD* density) {
  VecD phi;
  for (int i = 0; i < VecD::lanes; ++i) phi.r[i] = 0.5 * erfc(-x.r[i] * 0.7071067811865476);
  *density = exp(x * x * VecD::splat(-0.5)) * VecD::splat(0.3989422804014327);
  return phi;
}

// gelu_tanh is x / (1 + 2^w) with w = -2 u / ln 2, which is odd in x and kGelu (x + kCube x^3).
constexpr double kGelu = -2.302208198144325, kCube = 0.044715;
// 2^kMostPower is finite, twice that is not.
template <class C>
constexpr C kMostPower = sizeof(C) == sizeof(float) ? C(127) : C(1023);

template <class C>
static inline Vec<C> gelu_power(Vec<C> x) {
  using V = Vec<C>;
  return x * fma(V::splat(C(kGelu * kCube)), x * x, V::splat(C(kGelu)));
}

// f(x)
template <Activation f, class C>
static inline Vec<C> activate(Vec<C> x) {
  using V = Vec<C>;
  if constexpr (f == Activation::relu) return max(x, V::zero());
  if constexpr (f == Activation::sigmoid) return sigmoid(x);
  if constexpr (f == Activation::silu) return x * sigmoid(x);
  if constexpr (f == Activation::gelu) {
    V density;
    return x * normal_cdf(x, &density);
  }
  if constexpr (f == Activation::gelu_tanh) {  // (1 + tanh u) / 2 = 1 / (1 + exp(-2 u))
    const V one = V::splat(C(1)), w = min(gelu_power(x), V::splat(kMostPower<C> + 2));
    return x * (one / (one + power2(w)));
  }
  return x;
}

// f'(x) and, in *value, f(x), in the bits of activate() where that is not below 1e-37: they share
// their exponential.
template <Activation f, class C>
static inline Vec<C> derivative(Vec<C> x, Vec<C>* value) {
  using V = Vec<C>;
  // Far out every derivative but relu's is constant; without the bound, infinity times 0 appears.
  constexpr C kFar = sizeof(C) == sizeof(float) ? C(88) : C(700);  // exp(kFar) is finite
  const V one = V::splat(C(1)), far = V::splat(kFar);
  const V near = max(min(x, far), -far);
  if constexpr (f == Activation::relu) {
    *value = activate<f>(x);
    return select(x > V::zero(), one, select(x == x, V::zero(), x));
  }
  if constexpr (f == Activation::sigmoid) {
    const V e = exp(-near), s = one / (one + e);
    *value = s;
    return s * (e * s);
  }
  if constexpr (f == Activation::silu) {
    const V e = exp(-near), s = one / (one + e);
    *value = x * s;
    return s * fma(near, e * s, one);
  }
  if constexpr (f == Activation::gelu) {
    V density;
    const V cdf = normal_cdf(near, &density);
    *value = x * cdf;
    return fma(near, density, cdf);
  }
  if constexpr (f == Activation::gelu_tanh) {
    const V e = power2(min(gelu_power(near), V::splat(kMostPower<C>)));
    const V s = one / (one + e), rest = e * s;  // 1 - s without cancellation
    constexpr double k = 1.5957691216057308;    // d(2 u) / dx = k + 3 k kCube x^2
    const V slope = fma(V::splat(C(3 * k * kCube)), near * near, V::splat(C(k)));
    *value = x * s;
    return s * fma(near * rest, slope, one);
  }
  *value = x;
  return one;
}

}  // namespace
PYKERN_END_ISA

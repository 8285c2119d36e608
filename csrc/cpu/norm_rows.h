// The normalisation of one row, wherever it happens: the bits are the same.
#pragma once
#include "cpu/reduce.h"

PYKERN_BEGIN_ISA
namespace {

static inline float root(float x) { return __builtin_sqrtf(x); }
static inline double root(double x) { return __builtin_sqrt(x); }

// sum = x + residual, rounded to T: out and the backward pass see the h that the caller sees.
template <class T>
static void add_row(const T* x, const T* residual, T* sum, int64_t D) {
  each_vector<Compute<T>>(D, [&](int64_t i, int n) {
    store_n(sum + i, load_n(x + i, n) + load_n(residual + i, n), n);
  });
}

// Mean and variance in two passes, the second one correcting the rounding of the first mean.
template <class T, class C = Compute<T>>
static void moments(const T* h, int64_t D, C* mean, C* variance) {
  const C n = static_cast<C>(D > 0 ? D : 1);
  C sum[1], rest[2];
  sum_row(D, sum, [&](int64_t i, int m, Vec<C>* t) { t[0] = load_n(h + i, m); });
  const C guess = sum[0] / n;
  sum_row(D, rest, [&](int64_t i, int m, Vec<C>* t) {
    t[0] = load_n(h + i, m) - Vec<C>::splat(guess);
    t[1] = t[0] * t[0];
  });
  const C shift = rest[0] / n, var = rest[1] / n - shift * shift;
  *mean = guess + shift;
  *variance = var < 0 ? 0 : var;
}

template <class T, class C = Compute<T>>
static C mean_square(const T* h, int64_t D) {
  C sum[1];
  sum_row(D, sum, [&](int64_t i, int n, Vec<C>* t) {
    const auto v = load_n(h + i, n);
    t[0] = v * v;
  });
  return sum[0] / static_cast<C>(D > 0 ? D : 1);
}

// to[0..D) from number `to_first` on = (h - mean) rstd weight + bias; weight and bias may be
// without data. Not centred: mean is 0.
template <bool centred, class T, class C = Compute<T>>
static void normalise_row(const T* h, int64_t D, Numbers<C> weight, Numbers<C> bias, double eps,
                          Numbers<C> to, int64_t to_first, C* mean, C* rstd) {
  using V = Vec<C>;
  C variance;
  *mean = 0;
  if constexpr (centred)
    moments(h, D, mean, &variance);
  else
    variance = mean_square(h, D);
  *rstd = 1 / root(variance + static_cast<C>(eps));
  const V shift = V::splat(*mean), factor = V::splat(*rstd);
  each_vector<C>(D, [&](int64_t i, int n) {
    V y = load_n(h + i, n);
    if constexpr (centred) y = y - shift;
    y = y * factor;
    if (weight.data) y = y * weight.load(i, n);
    if (bias.data) y = y + bias.load(i, n);
    to.store(to_first + i, y, n);
  });
}

}  // namespace
PYKERN_END_ISA

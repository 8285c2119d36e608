// The loss of one row of logits, and its gradient: the part that cross_entropy and
// linear_cross_entropy share.
//
// A row is taken in blocks that stay in the first-level cache between the search for the maximum
// and the sum of exponentials, while the next block is on its way; a larger maximum rescales the
// sum so far. Sums leave a block in double, so a row's error does not grow with V.
#pragma once
#include <math.h>

#include "cpu/math.h"
#include "cpu/rows.h"
#include "ops/cross_entropy.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kBlock = 1024;         // numbers, 4 KiB of float: an eighth of the smallest L1
constexpr int64_t kStreamed = 32 << 10;  // bytes of a row of gradients that go past the caches
constexpr int kSums = 4;  // accumulators: rounding errors stay apart, additions overlap

// Of the numbers seen so far. sum is that of exp(x - max); total, that of x, is kept on demand.
template <class C>
struct RowSums {
  C max = -INFINITY;
  double sum = 0, total = 0;
};

struct RowLoss {
  double loss, lse;
};

// body(j, offset, n): n <= lanes numbers for accumulator j
template <class C, class Body>
static inline void each_accumulator(int64_t length, const Body& body) {
  constexpr int lanes = Vec<C>::lanes;
  int64_t i = 0;
  for (; i + kSums * lanes <= length; i += kSums * lanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kSums; ++j) body(j, i + j * lanes, lanes);
  }
  for (int j = 0; i < length; i += lanes, ++j)
    body(j, i, length - i < lanes ? static_cast<int>(length - i) : lanes);
}

// The first n lanes of x, the others replaced.
template <class C>
static inline Vec<C> first_lanes(Vec<C> x, int n, Vec<C> other) {
  return n == Vec<C>::lanes ? x : select(lanes_of<C>((uint64_t{1} << n) - 1, 0), x, other);
}

// -inf for a block of NaN: they show in its sum.
template <class T>
static inline Compute<T> block_max(const T* x, int64_t length) {
  using V = Vec<Compute<T>>;
  const V lowest = V::splat(-INFINITY);
  V top[kSums] = {lowest, lowest, lowest, lowest};
  each_accumulator<Compute<T>>(length, [&](int j, int64_t i, int n) {
    top[j] = max(top[j], first_lanes(load_n(x + i, n), n, lowest));
  });
  return max(max(top[0], top[1]), max(top[2], top[3])).max();
}

// sum of exp(x - shift), and of x - shift into *total
template <bool kTotal, class T>
static inline Compute<T> block_sum(const T* x, int64_t length, Compute<T> shift, double* total) {
  using V = Vec<Compute<T>>;
  const V center = V::splat(shift);
  V sum[kSums] = {}, shifted[kSums] = {};
  each_accumulator<Compute<T>>(length, [&](int j, int64_t i, int n) {
    __builtin_prefetch(x + i + kBlock);
    const V d = load_n(x + i, n) - center;
    sum[j] = sum[j] + first_lanes(exp(d), n, V::zero());
    if constexpr (kTotal) shifted[j] = shifted[j] + first_lanes(d, n, V::zero());
  });
  if constexpr (kTotal) *total = ((shifted[0] + shifted[1]) + (shifted[2] + shifted[3])).sum();
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])).sum();
}

template <bool kTotal, class T>
static inline void add_numbers(RowSums<Compute<T>>* sums, const T* x, int64_t length) {
  for (int64_t first = 0; first < length; first += kBlock) {
    const int64_t n = length - first < kBlock ? length - first : kBlock;
    const Compute<T> top = block_max(x + first, n);
    if (top > sums->max) {
      sums->sum *= ::exp(static_cast<double>(sums->max) - static_cast<double>(top));
      sums->max = top;
    }
    const Compute<T> shift = sums->max > -INFINITY ? sums->max : 0;  // -inf - -inf is NaN
    double shifted = 0;
    sums->sum += block_sum<kTotal>(x + first, n, shift, &shifted);
    if (kTotal) sums->total += shifted + static_cast<double>(n) * shift;
  }
}

// The loss of a row of V numbers, of which that at the label is x_y.
template <class C>
static inline RowLoss loss_of(const RowSums<C>& sums, int64_t V, C x_y,
                              const CrossEntropyOptions& o) {
  const double e = o.label_smoothing, lse = sums.max + ::log(sums.sum);
  if (lse == -INFINITY) return {INFINITY, lse};
  double loss = 0;  // a factor of 0 must not meet an infinity
  if (e < 1) loss += (1 - e) * (lse - x_y);
  if (e > 0) loss += e * (lse - sums.total / static_cast<double>(V));
  if (o.z_loss > 0) loss += o.z_loss * lse * lse;
  return {loss, lse};
}

// The numbers x[0..V-1] of a row with label y.
template <class T>
static inline RowLoss row_loss(const T* x, int64_t V, int64_t y, const CrossEntropyOptions& o) {
  RowSums<Compute<T>> sums;
  if (o.label_smoothing > 0)
    add_numbers<true>(&sums, x, V);
  else
    add_numbers<false>(&sums, x, V);
  return loss_of(sums, V, widen(x[y]), o);
}

// The gradient of n numbers x of a row of V, of which y is the label when 0 <= y < n.
// dx may be x. lse in double: rounded to float, an lse of 1000 would be off by 3e-5, and so would
// all probabilities.
template <class T, class D>
static inline void row_gradient(const T* x, int64_t n, int64_t V, int64_t y, double lse,
                                double dloss, const CrossEntropyOptions& o, D* dx) {
  using C = Compute<T>;
  using Vector = Vec<C>;
  const C center = static_cast<C>(lse);
  const double rate = lse == -INFINITY ? 0 : dloss * (1 + 2 * o.z_loss * lse);
  const double everywhere = -dloss * o.label_smoothing / static_cast<double>(V);
  const bool labelled = y >= 0 && y < n;
  const double x_y = labelled ? widen(x[y]) : 0;  // dx may be x: read it first
  if (lse == -INFINITY) {
    each_vector<C>(n, [&](int64_t i, int lanes) { store_n(dx + i, Vector::zero(), lanes); });
    return;
  }
  const Vector shift = Vector::splat(center),
               scale = Vector::splat(static_cast<C>(rate * ::exp(center - lse))),
               offset = Vector::splat(static_cast<C>(everywhere));
  const auto gradient = [&](int64_t i, int lanes) {
    return fma(exp(load_n(x + i, lanes) - shift), scale, offset);
  };
  constexpr int L = Vector::lanes;
  int64_t i = 0;
  if (static_cast<const void*>(dx) != x && n * static_cast<int64_t>(sizeof(D)) >= kStreamed) {
    const int64_t odd = reinterpret_cast<uintptr_t>(dx) / sizeof(D) % L;
    i = odd ? L - odd : 0;
    each_vector<C>(i, [&](int64_t j, int lanes) { store_n(dx + j, gradient(j, lanes), lanes); });
    for (; i + L <= n; i += L) stream(dx + i, gradient(i, L));
    end_stream();
  }
  each_vector<C>(n - i,
                 [&](int64_t j, int lanes) { store_n(dx + i + j, gradient(i + j, lanes), lanes); });
  if (labelled)
    dx[y] = narrow<D>(
        static_cast<C>(rate * ::exp(x_y - lse) - dloss * (1 - o.label_smoothing) + everywhere));
}

}  // namespace
PYKERN_END_ISA

// Sums over a row in one fixed order: number i always lands in lane i % lanes of chain
// i / lanes % kChains, so a row followed by zeros has the same sum, bit for bit, as the row alone.
#pragma once
#include "cpu/rows.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kChains = 4;  // an addition takes 4 cycles: fewer chains would wait for each other

// A running sum per lane, in C.
template <class C>
struct Plain {
  Vec<C> sum;
  void add(Vec<C> t) { sum = sum + t; }
  void add(const Plain& other) { sum = sum + other.sum; }
  C total() const { return sum.sum(); }
};

// A running sum per lane, in double: for sums that a single term may dominate.
template <class C>
struct Wide : Plain<double> {};
template <>
struct Wide<float> {
  VecD low, high;
  void add(VecF t) { low = low + low_half(t), high = high + high_half(t); }
  void add(const Wide& other) { low = low + other.low, high = high + other.high; }
  float total() const { return static_cast<float>((low + high).sum()); }
};

template <class C>
static inline Vec<C> first_lanes(Vec<C> v, int n) {
  return select(lanes_of<C>((uint64_t{1} << n) - 1, 0), v, Vec<C>::zero());
}

// total[k] = sum of the k-th term. terms(i, n, t) fills t[0..K) with the terms of the numbers
// i..i+n-1; lanes from n on are ignored.
template <template <class> class Sum = Plain, int K, class C, class Terms>
static inline void sum_row(int64_t length, C (&total)[K], const Terms& terms) {
  using V = Vec<C>;
  Sum<C> chain[kChains][K];
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c)
    for (int k = 0; k < K; ++k) chain[c][k] = Sum<C>{};
  int64_t i = 0;
  for (; i + kChains * V::lanes <= length; i += kChains * V::lanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      V t[K];
      terms(i + c * V::lanes, V::lanes, t);
      for (int k = 0; k < K; ++k) chain[c][k].add(t[k]);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c, i += V::lanes) {
    if (i >= length) break;
    const int n = length - i < V::lanes ? static_cast<int>(length - i) : V::lanes;
    V t[K];
    terms(i, n, t);
    for (int k = 0; k < K; ++k) chain[c][k].add(n < V::lanes ? first_lanes(t[k], n) : t[k]);
  }
  for (int k = 0; k < K; ++k) {
    chain[0][k].add(chain[1][k]);
    chain[2][k].add(chain[3][k]);
    chain[0][k].add(chain[2][k]);
    total[k] = chain[0][k].total();
  }
}

}  // namespace
PYKERN_END_ISA

// Sums over a row in one fixed order: number i always lands in lane i % lanes of chain
// i / lanes % kChains, so a row followed by zeros has the same sum, bit for bit, as the row alone.
#pragma once
#include "cpu/rows.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kChains = 4;  // an addition takes 4 cycles: fewer chains would wait for each other

template <class C>
static inline Vec<C> first_lanes(Vec<C> v, int n) {
  return select(lanes_of<C>((uint64_t{1} << n) - 1, 0), v, Vec<C>::zero());
}

// total[k] = sum of the k-th term. terms(i, n, t) fills t[0..K) with the terms of the numbers
// i..i+n-1; lanes from n on are ignored.
template <int K, class C, class Terms>
static inline void sum_row(int64_t length, C (&total)[K], const Terms& terms) {
  using V = Vec<C>;
  V chain[kChains][K] = {};
  int64_t i = 0;
  for (; i + kChains * V::lanes <= length; i += kChains * V::lanes) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      V t[K];
      terms(i + c * V::lanes, V::lanes, t);
      for (int k = 0; k < K; ++k) chain[c][k] = chain[c][k] + t[k];
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains; ++c, i += V::lanes) {
    if (i >= length) break;
    const int n = length - i < V::lanes ? static_cast<int>(length - i) : V::lanes;
    V t[K];
    terms(i, n, t);
    for (int k = 0; k < K; ++k)
      chain[c][k] = chain[c][k] + (n < V::lanes ? first_lanes(t[k], n) : t[k]);
  }
  for (int k = 0; k < K; ++k)
    total[k] = ((chain[0][k] + chain[1][k]) + (chain[2][k] + chain[3][k])).sum();
}

}  // namespace
PYKERN_END_ISA

// Interleaving and transposing registers: lanes of 4 or 8 bytes, whatever they hold.
#pragma once
#include "cpu/vec.h"

PYKERN_BEGIN_ISA
namespace {

template <class R, int... I>
static inline R zip_low(R a, R b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * static_cast<int>(sizeof...(I)))...);
}
template <class R, int... I>
static inline R zip_high(R a, R b, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(a, b, (n / 2 + I / 2 + I % 2 * n)...);
}

// The same for numbers: lanes a0 b0 a1 b1 ... of the lower, or of the upper halves.
template <class C>
static inline Vec<C> zip_low(Vec<C> a, Vec<C> b) {
  return {zip_low(a.r, b.r, std::make_integer_sequence<int, Vec<C>::lanes>())};
}
template <class C>
static inline Vec<C> zip_high(Vec<C> a, Vec<C> b) {
  return {zip_high(a.r, b.r, std::make_integer_sequence<int, Vec<C>::lanes>())};
}

// Lanes 1 0 3 2 5 4 ...
template <class R, int... I>
static inline R swap_pairs(R a, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, a, (I ^ 1)...);
}
template <class C>
static inline Vec<C> swap_pairs(Vec<C> a) {
  return {swap_pairs(a.r, std::make_integer_sequence<int, Vec<C>::lanes>())};
}

// rows[i] lane j  ->  rows[j] lane i. Each round interleaves row i with row i + half.
template <class C>
static inline void transpose(Vec<C> (&rows)[Vec<C>::lanes]) {
  constexpr int n = Vec<C>::lanes;
  constexpr auto lane = std::make_integer_sequence<int, n>();
  for (int round = 1; round < n; round *= 2) {
    Vec<C> next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i].r = zip_low(rows[i].r, rows[i + n / 2].r, lane);
      next[2 * i + 1].r = zip_high(rows[i].r, rows[i + n / 2].r, lane);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

}  // namespace
PYKERN_END_ISA

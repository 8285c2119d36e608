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

// Lanes of a part: 16 bytes of a register, between which moving lanes costs more than inside.
template <class C>
constexpr int kPart = 16 / sizeof(C);

// zip_low and zip_high within each part of n lanes.
template <int n, class R, int... I>
static inline R zip_low_parts(R a, R b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      a, b, (I / n * n + I % n / 2 + I % 2 * static_cast<int>(sizeof...(I)))...);
}
template <int n, class R, int... I>
static inline R zip_high_parts(R a, R b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      a, b, (I / n * n + n / 2 + I % n / 2 + I % 2 * static_cast<int>(sizeof...(I)))...);
}

// In each part: rows[i] lane j  ->  rows[j] lane i. Each round interleaves rows i and i + n / 2.
template <class C>
[[gnu::always_inline]] static inline void transpose_parts(Vec<C>* rows) {
  constexpr int n = kPart<C>;
  constexpr auto lane = std::make_integer_sequence<int, Vec<C>::lanes>();
  for (int round = 1; round < n; round *= 2) {
    Vec<C> next[n];
#pragma GCC unroll 4
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i].r = zip_low_parts<n>(rows[i].r, rows[i + n / 2].r, lane);
      next[2 * i + 1].r = zip_high_parts<n>(rows[i].r, rows[i + n / 2].r, lane);
    }
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// a = parts 0, 2, .. of a, then of b;  b = parts 1, 3, .. of a, then of b
template <int odd, int n, class R, int... I>
static inline R every_second_part(R a, R b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((2 * (I / n) + odd) * n + I % n)...);
}
template <class C>
[[gnu::always_inline]] static inline void unzip_parts(Vec<C>& a, Vec<C>& b) {
  constexpr auto lane = std::make_integer_sequence<int, Vec<C>::lanes>();
  const auto even = every_second_part<0, kPart<C>>(a.r, b.r, lane);
  b.r = every_second_part<1, kPart<C>>(a.r, b.r, lane);
  a.r = even;
}

// rows[i] lane j  ->  rows[j] lane i: squares of a part's size by themselves, then the parts.
template <class C>
[[gnu::always_inline]] static inline void transpose(Vec<C> (&rows)[Vec<C>::lanes]) {
  constexpr int n = kPart<C>, parts = Vec<C>::lanes / n;
#pragma GCC unroll 4
  for (int g = 0; g < parts; ++g) transpose_parts(rows + g * n);
#pragma GCC unroll 4
  for (int d = 0; d < n; ++d) {
    Vec<C>* const x = rows + d;  // part g of row x[p n] and part p of x[g n] change places
    if constexpr (parts == 2) {
      unzip_parts(x[0], x[n]);
    } else if constexpr (parts == 4) {
      unzip_parts(x[0], x[n]), unzip_parts(x[2 * n], x[3 * n]);
      unzip_parts(x[0], x[2 * n]), unzip_parts(x[n], x[3 * n]);
    }
  }
}

}  // namespace
PYKERN_END_ISA

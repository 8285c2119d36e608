// The inner kernel of every matrix product here: a tile of R x NV vectors of C = A B, held in
// registers while k runs once from its first to its last value. One accumulator per element, so the
// bits of a row do not depend on how many rows share its tile.
//
// A and B are packed in units: one number, or, where the ISA multiplies bf16, a pair of bf16 that
// are neighbours along k, in the bits of a float.
#pragma once
#include "cpu/transpose.h"

PYKERN_BEGIN_ISA
namespace {

template <class T>
constexpr bool kPaired = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPaired<bf16> = true;
#endif

// Numbers along k in one unit.
template <class T>
constexpr int kUnit = kPaired<T> ? 2 : 1;

template <class T>
static inline int64_t units(int64_t k) {
  return (k + kUnit<T> - 1) / kUnit<T>;
}

// Units summed in one go: short sums keep the rounding error of long ones down, at 2 % of the time.
template <class T>
constexpr int64_t kChunk = kPaired<T> ? 512 : 128;

// Without fma, units of a run: sums of rounded products are shorter still.
constexpr int64_t kShortRun = 16;

// Rows and vectors of a tile. AVX-512 has 32 registers: 24 accumulators, 2 of B, 1 of A; the others
// have 16: 12 + 2 + 1. With 2 FMA per cycle of latency 4 a tile needs 8 accumulators in flight.
constexpr int kTileRows = kVectorBytes == 64 ? 12 : 6;
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileColumns = kTileVectors * Vec<Compute<T>>::lanes;

template <class T>
static inline Vec<Compute<T>> multiply_add(Vec<Compute<T>> acc, Vec<Compute<T>> a,
                                           Vec<Compute<T>> b) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) return dot_pairs(acc, a, b);
#endif
  return fma(a, b, acc);
}

// The right operand of a tile: the vectors of one unit, then those of the next.
template <class C>
struct UnitRows {
  const C* data;
  int64_t unit;

  template <int NV>
  [[gnu::always_inline]] void load_next(Vec<C> (&row)[NV]) {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) row[j] = load(data + j * Vec<C>::lanes);
    data += unit;
  }
};

// acc[i][j] += sum over u of A[i][u] B[u][j], with A[i][u] at a[i a_row + u a_unit] and B[u] the
// u-th that b gives.
template <class T, int R, int NV, class Source>
[[gnu::always_inline]] static inline void multiply_tile(int64_t count, const Compute<T>* a,
                                                        int64_t a_row, int64_t a_unit, Source& b,
                                                        Vec<Compute<T>> (&acc)[R][NV]) {
  using V = Vec<Compute<T>>;
  V sum[R][NV];  // a copy that only constants index, so that it lives in registers
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) sum[i][j] = acc[i][j];
  const auto add_products = [&](int64_t n, V(&to)[R][NV]) __attribute__((always_inline)) {
    for (int64_t u = 0; u < n; ++u) {
      V row[NV];
      b.load_next(row);
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        const V x = V::splat(a[i * a_row]);
#pragma GCC unroll 8
        for (int j = 0; j < NV; ++j) to[i][j] = multiply_add<T>(to[i][j], x, row[j]);
      }
      a += a_unit;
    }
  };
  if constexpr (kFused) {
    add_products(count, sum);
  } else {  // products are rounded, too: shorter runs make up for it
    for (int64_t u = 0; u < count; u += kShortRun) {
      V part[R][NV] = {};
      add_products(count - u < kShortRun ? count - u : kShortRun, part);
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < NV; ++j) sum[i][j] = sum[i][j] + part[i][j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) acc[i][j] = sum[i][j];
}
// with B[u] at b[u b_unit]
template <class T, int R, int NV>
[[gnu::always_inline]] static inline void multiply_tile(int64_t count, const Compute<T>* a,
                                                        int64_t a_row, int64_t a_unit,
                                                        const Compute<T>* b, int64_t b_unit,
                                                        Vec<Compute<T>> (&acc)[R][NV]) {
  UnitRows<Compute<T>> rows{b, b_unit};
  multiply_tile<T, R, NV>(count, a, a_row, a_unit, rows, acc);
}

// Calls body(Count<n>{}) with n = rows as a compile-time constant, 1 <= rows <= kTileRows.
template <int n>
struct Count {
  static constexpr int value = n;
};
template <int n = kTileRows, class Body>
[[gnu::always_inline]] static inline void with_rows(int rows, const Body& body) {
  if constexpr (n > 1) {
    if (rows < n) return with_rows<n - 1>(rows, body);
  }
  body(Count<n>{});
}

}  // namespace
PYKERN_END_ISA

// The backward pass recomputes the weights of a chunk of query rows against a tile of keys:
//   P = 2^(score - lse)   dP = Z (dout v^T)   dS = P (dP - delta)   Z: dropout factors
// Keys are lanes; which keys a row sees is known before anything is multiplied.
#pragma once
#include "cpu/attention_memory.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kChunkRows = 96;  // P and dS of a chunk are 24 KiB each: second-level cache

// What a row's weights need: P = factor 2^(score - shift), where shift is lse rounded to C, in base
// 2, and factor makes up for the rounding. A row that sees no key has shift infinity: P = 0.
template <class C>
struct RowFacts {
  C shift, factor, delta;
};

template <class T>
struct BackwardGroup : Group<T> {
  RowList<const T> dout;
  const RowFacts<Compute<T>>* facts;  // of head h, query t: h * facts_head + t
  int64_t facts_head;
};

template <class T>
struct BackwardArrays {
  using C = Compute<T>;
  static constexpr int W = kTileColumns<T>;
  // of a tile of keys: columns of k and v, rows of k; sums of dk and dv
  C *k_columns, *v_columns, *k_rows, *dk, *dv;
  C *q_units, *dout_units;  // of a chunk of query rows, along their width
  // P and dS over the tile, [rows][64]; as operands: dS along the keys, Z P and dS along the rows
  C *p, *ds, *ds_rows, *p_pairs, *ds_pairs, *hidden;
  int64_t D_padded, E_padded;

  template <class Take>
  void layout(int64_t D, int64_t E, const Take& take) {
    constexpr int L = Vec<C>::lanes;
    D_padded = round_up(D, W), E_padded = round_up(E, W);
    k_columns = take(units<T>(D) * kKeys + L);
    v_columns = take(units<T>(E) * kKeys + L);
    k_rows = take(units<T>(kKeys) * D_padded + L);
    dk = take(kKeys * D_padded);
    dv = take(kKeys * E_padded);
    q_units = take(kChunkRows * units<T>(D) + L);
    dout_units = take(kChunkRows * units<T>(E) + L);
    p = take(kChunkRows * kKeys);
    ds = take(kChunkRows * kKeys);
    if constexpr (kPaired<T>) {
      ds_rows = take(kChunkRows * kKeys / 2);
      p_pairs = take(kChunkRows * kKeys / 2);
      ds_pairs = take(kChunkRows * kKeys / 2);
    } else {
      ds_rows = ds, p_pairs = p, ds_pairs = ds;
    }
    hidden = take((kChunkRows > kKeys ? kChunkRows : kKeys) * W);
  }
};
template <class T>
using BackwardMemory = Memory<BackwardArrays<T>>;

// Rows [0, rows) of a chunk against a tile of keys: which keys each sees.
struct Sight {
  uint64_t words[kChunkRows], any, all;
  bool partial;  // some row does not see all keys

  // Units [begin, end) of the rows that see some key of `range`, a row being 1 / unit of a unit.
  void rows_that_see(uint64_t range, int rows, int unit, int64_t& begin, int64_t& end) const {
    int first = 0, last = rows;
    if (partial) {
      while (first < last && !(words[first] & range)) ++first;
      while (last > first && !(words[last - 1] & range)) --last;
    }
    begin = first / unit, end = (last + unit - 1) / unit;
  }
};

template <class T>
static void look(const Group<T>& x, int64_t h, int64_t t0, int rows, int64_t first, int keys,
                 Sight& sight) {
  sight.any = 0, sight.all = ~uint64_t(0);
  for (int r = 0; r < rows; ++r) {
    sight.words[r] = visible(x, h, t0 + r, first);
    sight.any |= sight.words[r], sight.all &= sight.words[r];
  }
  sight.partial = sight.all != low_bits(keys);
}

// Six rows, as many vectors of keys as leave the registers of kTileRows x kTileVectors: a strip of
// rows along the diagonal then computes few scores that it does not see.
constexpr int kScoreRows = 6;
constexpr int kScoreVectors = kTileRows * kTileVectors / kScoreRows;

// s [n, 64] = n left rows times the columns of a tile, at least those that `any` marks
template <class T, int n, int NV = kScoreVectors>
static void tile_products(int64_t count, const Compute<T>* left, int64_t row,
                          const Compute<T>* columns, uint64_t any, Compute<T>* s) {
  using V = Vec<Compute<T>>;
  constexpr int L = V::lanes;
  if constexpr (NV > 1) {  // one pass over the keys needs fewer vectors
    if (kScoreVectors * L >= kKeys && !(any >> (NV - 1) * L))
      return tile_products<T, n, NV - 1>(count, left, row, columns, any, s);
  }
  for (int c = 0; c < kKeys; c += kScoreVectors * L) {
    if (!(any >> c & low_bits(kScoreVectors * L))) continue;
    V acc[n][NV] = {};
    multiply_tile<T, n, NV>(count, left, row, 1, columns + c, kKeys, acc);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) store(s + i * kKeys + c + j * L, acc[i][j]);
  }
}

// Z P and dS of query t of head h against the tile: s holds q k^T, dp holds dout v^T. With
// through_cap dS is the gradient of scale q k^T, else that of the score.
template <class T>
[[gnu::always_inline]] static inline void weights_row(
    const BackwardGroup<T>& x, int64_t h, int64_t t, int64_t first, bool through_cap,
    uint64_t& word, const Compute<T>* s, const Compute<T>* dp,
    Vec<Compute<T>> (&p)[kKeys / Vec<Compute<T>>::lanes],
    Vec<Compute<T>> (&ds)[kKeys / Vec<Compute<T>>::lanes]) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int n = kKeys / V::lanes;
  V y[n];
  finish_scores<T>(x, h, t, first, s, word, y);
  const RowFacts<C>& row = x.facts[h * x.facts_head + t];
  const V shift = V::splat(row.shift), factor = V::splat(row.factor), delta = V::splat(row.delta);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    p[i] = power2<kPaired<T>>(y[i] - shift) * factor;
    ds[i] = p[i] * (load(dp + i * V::lanes) - delta);
  }
  if (x.dropout.threshold != 0) {
    const V rest = V::splat(static_cast<C>(x.dropout.factor));
    const uint64_t keep = kept(x, h, t, first);
    for (int i = 0; i < n; ++i) {
      const Mask<C> on = lanes_of<C>(keep, i * V::lanes);
      const V dropped_dp = select(on, load(dp + i * V::lanes) * rest, V::zero());
      ds[i] = p[i] * (dropped_dp - delta);
      p[i] = select(on, p[i] * rest, V::zero());
    }
  }
  if (x.cap != 0 && through_cap)  // 1 - tanh^2
    for (int i = 0; i < n; ++i) {
      const V tanh_of = tanh(load(s + i * V::lanes) * V::splat(x.scale));
      ds[i] = ds[i] * (V::splat(C(1)) - tanh_of * tanh_of);
    }
  if (word != ~uint64_t(0))  // whatever was computed, or not, where the row does not see
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      const Mask<C> seen = lanes_of<C>(word, i * V::lanes);
      p[i] = select(seen, p[i], V::zero());
      ds[i] = select(seen, ds[i], V::zero());
    }
}

// The weights of rows r and, where numbers are paired, r + 1 of a chunk, in the forms that the
// products take.
template <class T>
static void store_weights(const BackwardGroup<T>& x, int64_t h, int64_t t0,
                          [[maybe_unused]] int64_t rows, int64_t r, int64_t first, Sight& sight,
                          BackwardMemory<T>& memory) {
  using V = Vec<Compute<T>>;
  constexpr int n = kKeys / V::lanes;
  const auto weigh = [&](int64_t i, V(&p)[n], V(&ds)[n]) __attribute__((always_inline)) {
    if (sight.words[i] == 0) {
      for (int j = 0; j < n; ++j) p[j] = ds[j] = V::zero();
      return;
    }
    weights_row<T>(x, h, t0 + i, first, true, sight.words[i], memory.p + i * kKeys,
                   memory.ds + i * kKeys, p, ds);
  };
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    V p[2][n] = {}, ds[2][n] = {};
    uint16_t* ds_rows = reinterpret_cast<uint16_t*>(memory.ds_rows);
    for (int two = 0; two < 2 && r + two < rows; ++two) {
      weigh(r + two, p[two], ds[two]);
      for (int i = 0; i < n; ++i)
        store_bf16(ds_rows + (r + two) * kKeys + i * V::lanes, ds[two][i]);
    }
    for (int i = 0; i < n; ++i) {
      store(memory.p_pairs + r / 2 * kKeys + i * V::lanes, pack_pairs(p[0][i], p[1][i]));
      store(memory.ds_pairs + r / 2 * kKeys + i * V::lanes, pack_pairs(ds[0][i], ds[1][i]));
    }
    return;
  }
#endif
  V p[n], ds[n];
  weigh(r, p, ds);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    store(memory.p + r * kKeys + i * V::lanes, p[i]);
    store(memory.ds + r * kKeys + i * V::lanes, ds[i]);
  }
}

// q k^T into memory.p and dout v^T into memory.ds, where a strip of rows sees some key.
template <class T>
static void chunk_products(const BackwardGroup<T>& x, int64_t h, int64_t t0, int64_t rows,
                           const Sight& sight, BackwardMemory<T>& memory) {
  constexpr int R = kScoreRows;
  const Operand<T> q = unit_rows<T>(x.q.at(h, t0), x.q.row, rows, 1, x.D, memory.q_units);
  const Operand<T> dout =
      unit_rows<T>(x.dout.at(h, t0), x.dout.row, rows, 1, x.E, memory.dout_units);
  for (int64_t i = 0; i < rows; i += R) {
    const int n = rows - i < R ? static_cast<int>(rows - i) : R;
    uint64_t any = 0;
    for (int64_t r = i; r < i + n; ++r) any |= sight.words[r];
    if (any == 0) continue;
    with_rows<R>(n, [&](auto strip_rows) {
      constexpr int n = strip_rows.value;
      tile_products<T, n>(units<T>(x.D), q.data + i * q.row, q.row, memory.k_columns, any,
                          memory.p + i * kKeys);
      tile_products<T, n>(units<T>(x.E), dout.data + i * dout.row, dout.row, memory.v_columns, any,
                          memory.ds + i * kKeys);
    });
  }
}

// Weights and their gradients of the rows t0 .. t0 + rows - 1 of head h against the tile at
// `first`, whose columns of k and v are packed. A bias of -inf takes its key from sight.
template <class T>
static void weights_chunk(const BackwardGroup<T>& x, int64_t h, int64_t t0, int64_t rows,
                          int64_t first, Sight& sight, BackwardMemory<T>& memory) {
  chunk_products<T>(x, h, t0, rows, sight, memory);
  for (int64_t r = 0; r < rows; r += kUnit<T>)
    store_weights<T>(x, h, t0, rows, r, first, sight, memory);
  for (int64_t r = 0; x.bias && r < rows; ++r) sight.partial |= sight.words[r] != sight.all;
}

// The gradients of the scores, in memory.ds [rows][64] as plain numbers.
template <class T>
static void score_gradients(const BackwardGroup<T>& x, int64_t h, int64_t t0, int64_t rows,
                            int64_t first, Sight& sight, BackwardMemory<T>& memory) {
  using V = Vec<Compute<T>>;
  constexpr int n = kKeys / V::lanes;
  chunk_products<T>(x, h, t0, rows, sight, memory);
  for (int64_t r = 0; r < rows; ++r) {
    V p[n] = {}, ds[n] = {};
    if (sight.words[r] != 0)
      weights_row<T>(x, h, t0 + r, first, false, sight.words[r], memory.p + r * kKeys,
                     memory.ds + r * kKeys, p, ds);
    for (int i = 0; i < n; ++i) store(memory.ds + r * kKeys + i * V::lanes, ds[i]);
  }
}

}  // namespace
PYKERN_END_ISA

// The backward pass recomputes the weights of a chunk of query rows against a tile of keys:
//   P = exp(score - lse)   dP = dout v^T   dS = P (dP - delta)
#pragma once
#include "cpu/attention_tile.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kChunkRows = 96;  // packing a chunk's rows costs as much as 3 keys of its products

// What a row's weights need: P = factor exp(score - shift), where shift is lse rounded to C and
// factor makes up for the rounding. A row that sees no key has shift infinity: P = 0.
template <class C>
struct RowFacts {
  C shift, factor, delta;
};

template <class T>
struct BackwardGroup : Group<T> {
  RowList<const T> dout;
  const RowFacts<Compute<T>>* facts;  // [heads, T]
};

// The scratch memory of one thread, cut into its arrays.
template <class T>
struct BackwardMemory {
  using C = Compute<T>;
  static constexpr int W = kTileColumns<T>, R = kTileRows;
  // of a tile of keys: columns of k and v, rows of k; sums of dk and dv
  C *k_columns, *v_columns, *k_rows, *dk, *dv;
  // of a chunk of query rows: q and dout as left operands and as rows; P and dS over the tile
  C *q_strips, *dout_strips, *q_rows, *dout_rows, *p, *ds;
  // the same weights as operands: dS by rows, P and dS by pairs of rows
  C *ds_rows, *p_pairs, *ds_pairs, *hidden;
  int64_t q_strip, dout_strip, D_padded, E_padded;

  template <class Take>
  void layout(int64_t D, int64_t E, const Take& take) {
    constexpr int L = Vec<C>::lanes;
    D_padded = round_up(D, W), E_padded = round_up(E, W);
    q_strip = units<T>(D) * R + L, dout_strip = units<T>(E) * R + L;
    k_columns = take(units<T>(D) * kKeys);
    v_columns = take(units<T>(E) * kKeys);
    k_rows = take(units<T>(kKeys) * D_padded + L);
    dk = take(kKeys * D_padded);
    dv = take(kKeys * E_padded);
    q_strips = take(kChunkRows / R * q_strip);
    dout_strips = take(kChunkRows / R * dout_strip);
    q_rows = take(units<T>(kChunkRows) * D_padded + L);
    dout_rows = take(units<T>(kChunkRows) * E_padded + L);
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
  static int64_t bytes(int64_t D, int64_t E) {
    int64_t total = 0;
    BackwardMemory().layout(D, E, [&](int64_t n) {
      total += round_up(n * sizeof(C), 64);
      return static_cast<C*>(nullptr);
    });
    return total;
  }
  BackwardMemory() = default;
  BackwardMemory(int64_t D, int64_t E, char* memory) {
    layout(D, E, [&](int64_t n) {
      C* array = reinterpret_cast<C*>(memory);
      memory += round_up(n * sizeof(C), 64);
      return array;
    });
  }
};

// s [n, 64] = strip of n left rows times the columns of a tile
template <class T, int n>
static void tile_products(int64_t count, const Compute<T>* strip, const Compute<T>* columns,
                          Compute<T>* s) {
  using V = Vec<Compute<T>>;
  constexpr int W = kTileColumns<T>;
  for (int c = 0; c < kKeys / W; ++c) {
    V acc[n][kTileVectors] = {};
    multiply_tile<T, n, kTileVectors>(count, strip, 1, kTileRows, columns + c * count * W, W, acc);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < kTileVectors; ++j) store(s + i * kKeys + c * W + j * V::lanes, acc[i][j]);
  }
}

// P and dS of query t of head h against the tile: p holds q k^T on entry, ds holds dP.
template <class T>
static void weights_row(const BackwardGroup<T>& x, int64_t h, int64_t t, int64_t first,
                        uint64_t& word, Compute<T>* p, Compute<T>* ds) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int n = kKeys / V::lanes;
  V y[n];
  finish_scores<T>(x, h, t, first, p, word, y);
  const RowFacts<C>& row = x.facts[h * x.T_ + t];
  const V shift = V::splat(row.shift), factor = V::splat(row.factor), delta = V::splat(row.delta);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    const Mask<C> seen = lanes_of<C>(word, i * V::lanes);
    const V weight = select(seen, exp(y[i] - shift) * factor, V::zero());
    const V gradient = weight * (load(ds + i * V::lanes) - delta);
    store(p + i * V::lanes, weight);
    store(ds + i * V::lanes, select(seen, gradient, V::zero()));
  }
}

// The weights of a chunk in the forms that the products take, where bf16 is multiplied in pairs.
template <class T>
static void pair_weights(BackwardMemory<T>& memory, int64_t rows) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < kKeys; i += VecF::lanes)
        store_bf16(reinterpret_cast<uint16_t*>(memory.ds_rows) + r * kKeys + i,
                   load(memory.ds + r * kKeys + i));
    for (int64_t r = 0; r < rows; r += 2)
      for (int i = 0; i < kKeys; i += VecF::lanes) {
        const float *p = memory.p + r * kKeys + i, *ds = memory.ds + r * kKeys + i;
        const VecF zero = VecF::zero();
        const bool two = r + 1 < rows;
        store(memory.p_pairs + r / 2 * kKeys + i,
              pack_pairs(load(p), two ? load(p + kKeys) : zero));
        store(memory.ds_pairs + r / 2 * kKeys + i,
              pack_pairs(load(ds), two ? load(ds + kKeys) : zero));
      }
  }
#endif
  (void)memory, (void)rows;
}

// Scores, weights and their gradients of the rows t0 .. t0 + rows - 1 of head h against the tile at
// `first`; words gets what each row sees. The columns of k and v are packed already.
template <class T>
static void weights_chunk(const BackwardGroup<T>& x, int64_t h, int64_t t0, int64_t rows,
                          int64_t first, BackwardMemory<T>& memory, uint64_t* words) {
  constexpr int R = kTileRows;
  for (int64_t i = 0; i < rows; i += R) {
    const int64_t left = rows - i;
    const int n = left < R ? static_cast<int>(left) : R;
    Compute<T>* q = memory.q_strips + i / R * memory.q_strip;
    Compute<T>* dout = memory.dout_strips + i / R * memory.dout_strip;
    pack<T>(q, R, {x.q.at(h, t0 + i), x.q.row, 1}, n, left, x.D);
    pack<T>(dout, R, {x.dout.at(h, t0 + i), x.dout.row, 1}, n, left, x.E);
    with_rows(n, [&](auto strip_rows) {
      tile_products<T, strip_rows.value>(units<T>(x.D), q, memory.k_columns, memory.p + i * kKeys);
      tile_products<T, strip_rows.value>(units<T>(x.E), dout, memory.v_columns,
                                         memory.ds + i * kKeys);
    });
    for (int64_t r = i; r < i + n; ++r) {
      words[r] = visible(x, h, t0 + r, first);
      weights_row<T>(x, h, t0 + r, first, words[r], memory.p + r * kKeys, memory.ds + r * kKeys);
    }
  }
}

}  // namespace
PYKERN_END_ISA

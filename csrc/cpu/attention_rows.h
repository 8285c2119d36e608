// Forward attention of few rows, as in decoding: keys are lanes. Online softmax over tiles of 64
// keys: for each tile a row updates its maximum m, its sum l and its output, which is rescaled when
// m moves. Tiles start at multiples of 64 and every sum runs in the order of the keys, so the bits
// of a row depend on the row and the keys it sees: prefill, chunk and decode agree.
#pragma once
#include "cpu/attention_memory.h"

PYKERN_BEGIN_ISA
namespace {

// Softmax weights of one row against one tile: updates m and l, stores the weights as the left
// operand of the product with v, returns the factor that rescales what came before.
template <class T>
static inline Compute<T> update_row(const Group<T>& x, int64_t r, int64_t first,
                                    const Compute<T>* s, uint64_t& word, Compute<T>* p,
                                    Compute<T>* m, Compute<T>* l) {
  const int64_t h = r / x.T_, t = r % x.T_;
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int n = kKeys / V::lanes;
  V y[n];
  finish_scores<T>(x, h, t, first, s, word, y);
  V top = y[0];
#pragma GCC unroll 16
  for (int i = 1; i < n; ++i) top = max(top, y[i]);
  const C tile_max = top.max();
  const C m_new = tile_max > *m ? tile_max : *m;
  const C base = m_new == C(-INFINITY) ? C(0) : m_new;  // no key seen so far: all weights are 0
  const V rescale = power2<kPaired<T>>(V::splat(*m - base)), shift = V::splat(base);
  const bool drop = x.dropout.threshold != 0;
  const V factor = V::splat(static_cast<C>(x.dropout.factor));
  const uint64_t keep = drop ? kept(x, h, t, first) : 0;
  V total = V::zero();
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    y[i] = power2<kPaired<T>>(y[i] - shift);
    total = total + y[i];
    if (drop) y[i] = select(lanes_of<C>(keep, i * V::lanes), y[i] * factor, V::zero());
    if constexpr (kPaired<T>)
      store_bf16(reinterpret_cast<uint16_t*>(p) + i * V::lanes, y[i]);
    else
      store(p + i * V::lanes, y[i]);
  }
  *l = fma(V::splat(*l), rescale, V::splat(total.sum())).r[0];
  *m = m_new;
  return rescale.r[0];
}

// The tile at `first`, whose keys and values are packed, added to n rows of the group from r0 on.
template <class T, int n>
static void add_tile(const Group<T>& x, int64_t r0, int64_t first, int64_t keys, uint64_t* words,
                     const Right<T>& values, const RowMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int W = kTileColumns<T>, R = kTileRows;
  constexpr int p_row = kKeys / kUnit<T>;  // units of a row of weights
  const int64_t width = units<T>(x.D), count = units<T>(keys), E_padded = memory.E_padded;
  for (int c = 0; c < kKeys / W; ++c) {
    V acc[n][kTileVectors] = {};
    multiply_tile<T, n, kTileVectors>(width, memory.q, 1, R, memory.keys + c * W, kKeys, acc);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < kTileVectors; ++j)
        store(memory.s + i * kKeys + c * W + j * V::lanes, acc[i][j]);
  }
  C rescale[n];
  uint64_t all = low_bits(keys);
  for (int i = 0; i < n; ++i) {
    rescale[i] = update_row<T>(x, r0 + i, first, memory.s + i * kKeys, words[i],
                               memory.p + i * p_row, memory.m + i, memory.l + i);
    all &= words[i];
  }
  const bool hide = all != low_bits(keys) && !all_finite<T>(values, count, E_padded);
  for (int64_t e = 0; e < E_padded; e += W) {
    const C* panel = values.data + e / W * values.panel;
    V acc[n][kTileVectors] = {};
    if (!hide)
      multiply_tile<T, n, kTileVectors>(count, memory.p, p_row, 1, panel, values.unit, acc);
    for (int i = 0; hide && i < n; ++i) {
      const uint64_t word = words[i];
      hide_rows<T>(memory.hidden, panel, values.unit, count,
                   [&](int64_t k) { return word >> k & 1; });
      V row[1][kTileVectors] = {};
      multiply_tile<T, 1, kTileVectors>(count, memory.p + i * p_row, p_row, 1, memory.hidden, W,
                                        row);
      for (int j = 0; j < kTileVectors; ++j) acc[i][j] = row[0][j];
    }
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < kTileVectors; ++j) {
        C* out = memory.out + i * E_padded + e + j * V::lanes;
        store(out, fma(load(out), V::splat(rescale[i]), acc[i][j]));
      }
  }
}

// Rows r0 .. r1 - 1 of the group, at most kFewRows.
template <class T>
static void forward_rows(const Group<T>& x, int64_t r0, int64_t r1, const Results& results,
                         RowMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int R = kTileRows;
  static_assert(kFewRows<T> <= R, "the rows are one strip");
  const int64_t E_padded = memory.E_padded;
  const int rows = static_cast<int>(r1 - r0);

  int64_t first_key = x.S, end_key = 0;
  for (int i = 0; i < rows; ++i) {
    const int64_t h = (r0 + i) / x.T_, t = (r0 + i) % x.T_;
    memcpy(memory.gathered + i * x.D, x.q.at(h, t), x.D * sizeof(T));
    const int64_t begin = x.first_key(t), end = x.end_key(t);
    first_key = begin < first_key ? begin : first_key;
    end_key = end > end_key ? end : end_key;
    memory.m[i] = x.sink(h);
    memory.l[i] = memory.m[i] == C(-INFINITY) ? C(0) : C(1);
  }
  pack<T>(memory.q, R, {memory.gathered, x.D, 1}, rows, rows, x.D);
  for (int64_t i = 0; i < rows * E_padded; ++i) memory.out[i] = C(0);

  for (int64_t first = first_key / kKeys * kKeys; first < end_key; first += kKeys) {
    const int64_t keys = end_key - first < kKeys ? end_key - first : kKeys;
    uint64_t words[R], any = 0;
    for (int i = 0; i < rows; ++i) {
      words[i] = visible(x, (r0 + i) / x.T_, (r0 + i) % x.T_, first);
      any |= words[i];
    }
    if (any == 0) continue;
    const TileRows<T> k = tile_keys(x, first, keys, memory.page_k);
    const TileRows<T> v = tile_values(x, first, keys, memory.page_v);
    pack_keys<T>(memory.keys, k.data, k.row, keys, x.D);
    const Right<T> values = right_rows<T>(v.data, v.row, keys, x.E, memory.values);
    with_rows(rows,
              [&](auto n) { add_tile<T, n.value>(x, r0, first, keys, words, values, memory); });
  }

  for (int i = 0; i < rows; ++i) {
    const int64_t h = (r0 + i) / x.T_, t = (r0 + i) % x.T_;
    const C l = memory.l[i];
    const C inverse = l == C(0) ? C(0) : C(1) / l;  // a row that sees no key is all zeros
    T* out = results.template out_row<T>(h, t);
    each_vector<C>(x.E, [&](int64_t e, int n) {
      store_n(out + e, load(memory.out + i * E_padded + e) * V::splat(inverse), n);
    });
    results.write_lse(h, t, memory.m[i], l);
  }
}

}  // namespace
PYKERN_END_ISA

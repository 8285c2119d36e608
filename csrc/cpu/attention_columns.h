// Forward attention of many rows: queries are lanes, three vectors of them a strip. Scores of a
// tile lie as [key][query], so that softmax runs down the lanes: no sum and no maximum across a
// register, one rescaling factor for a whole vector of queries, and neither keys nor (where numbers
// are not paired) values are packed: an element of either is broadcast against a row of queries.
//
//   s = k q^T   [64, queries]      out^T = v^T p   [E, queries]
//
// Every sum runs in the order in which attention_rows.h takes it: both give a row the same bits.
#pragma once
#include "cpu/attention_strip.h"

PYKERN_BEGIN_ISA
namespace {

// How a score is made from its product.
enum Score { scaled, masked, general };

// Scores of keys [key, key + kKeyRows) for the vectors from j0 on; top gets their maximum.
template <class T, Score score, int NV>
static void score_keys(const Group<T>& x, int64_t first, int key, const Strip<T>& strip,
                       const Compute<T>* k, int64_t k_row, const ColumnMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes, Q = Strip<T>::Q, j0 = kStripVectors - NV;
  V acc[kKeyRows][NV] = {};
  multiply_tile<T, kKeyRows, NV>(units<T>(x.D), k, k_row, 1, memory.strip_q + j0 * L - strip.lane0,
                                 Q - strip.lane0, acc);
  C *s = memory.s + key * Q + j0 * L, *top = memory.top + j0 * L;
  const V scale = V::splat(x.scale), hidden = V::splat(-INFINITY);
  if constexpr (score != general) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      V most = load(top + j * L);
#pragma GCC unroll 8
      for (int i = 0; i < kKeyRows; ++i) {
        V y = acc[i][j] * scale;
        if constexpr (score == masked) y = strip.select(strip.seen, key + i, j0 + j, y, hidden);
        most = max(most, y);
        store(s + i * Q + j * L, y);
      }
      store(top + j * L, most);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kKeyRows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) store(s + i * Q + j * L, acc[i][j]);
  for (int i = 0; i < kKeyRows; ++i)
    for (int j = 0; j < NV; ++j) {
      V y = capped(x, load(s + i * Q + j * L));
      const int at = (j0 + j) * L;
      if (x.slopes) {
        const V distance =
            abs(V::splat(static_cast<C>(first + key + i)) - load(strip.diagonal + at));
        y = fma(load(strip.slope + at), distance, y);
      }
      if (x.bias) y = add_bias(load(memory.bias + (key + i) * Q + at), y);
      if (strip.partial) y = strip.select(strip.seen, key + i, j0 + j, y, hidden);
      store(top + j * L, max(load(top + j * L), y));
      store(s + i * Q + j * L, y);
    }
}

// The values of a tile as rows of units along the keys.
template <class T>
static Operand<T> value_rows(const Group<T>& x, int64_t first, int keys,
                             const ColumnMemory<T>& memory) {
  using C = Compute<T>;
  const TileRows<T> rows = tile_values(x, first, keys, memory.page_v);
  if constexpr (sizeof(T) == sizeof(C)) return {reinterpret_cast<const C*>(rows.data), rows.row};
  for (int key = 0; key < keys; key += kUnit<T>) {
    const T* row = rows.data + key * rows.row;
    const T* next = key + 1 < keys ? row + rows.row : nullptr;
    for (int64_t e = 0; e < x.E; e += Vec<C>::lanes)
      store(memory.values + key / kUnit<T> * x.E + e,
            load_lanes<T>(row + e, next ? next + e : nullptr, x.E - e));
  }
  return {memory.values, x.E};
}

// Units [u0, u1) of the values: 0 times infinity or NaN would be NaN.
template <class T>
static bool all_finite(const Operand<T>& v, int64_t E, int64_t u0, int64_t u1) {
  using V = Vec<Compute<T>>;
  V probe = V::zero();
  for (int64_t u = u0; u < u1; ++u)
    each_vector<Compute<T>>(E, [&](int64_t e, int n) {
      probe = multiply_add<T>(probe, load_n(v.data + u * v.row + e, n), V::zero());
    });
  return bits_of(probe != probe) == 0;
}

template <class T>
static void pack_queries(const Group<T>& x, const Strip<T>& strip, const ColumnMemory<T>& memory) {
  const int first = strip.lane0, last = first + strip.rows - 1;
  Lanes<T> rows = {x.q.at(strip.h[first], strip.t[first]), x.q.row, 1};
  if (strip.h[first] != strip.h[last]) {  // rows of several heads
    for (int i = first; i <= last; ++i)
      memcpy(memory.gathered + (i - first) * x.D, x.q.at(strip.h[i], strip.t[i]), x.D * sizeof(T));
    rows = {memory.gathered, x.D, 1};
  }
  pack<T>(memory.strip_q, Strip<T>::Q - first, rows, strip.rows, strip.rows, x.D);
}

template <class T, Score score>
static void score_all(const Group<T>& x, int64_t first, const Strip<T>& strip, const Compute<T>* k,
                      int64_t k_row, const ColumnMemory<T>& memory) {
  for (int key = strip.begin; key < strip.last(); key += kKeyRows) {
    const Compute<T>* rows = k + key * k_row;
    if (key < strip.end[0])
      score_keys<T, score, 3>(x, first, key, strip, rows, k_row, memory);
    else if (key < strip.end[1])
      score_keys<T, score, 2>(x, first, key, strip, rows, k_row, memory);
    else
      score_keys<T, score, 1>(x, first, key, strip, rows, k_row, memory);
  }
}

// The scores of a tile, in base 2, and the maximum of each row: m and those of the tile.
template <class T>
static void score_tile(const Group<T>& x, int64_t first, const Strip<T>& strip, const Compute<T>* k,
                       int64_t k_row, const ColumnMemory<T>& memory) {
  using V = Vec<Compute<T>>;
  for (int i = 0; i < Strip<T>::Q; i += V::lanes) store(memory.top + i, load(memory.m + i));
  if (x.cap != 0 || x.slopes || x.bias)
    score_all<T, general>(x, first, strip, k, k_row, memory);
  else if (strip.partial)
    score_all<T, masked>(x, first, strip, k, k_row, memory);
  else
    score_all<T, scaled>(x, first, strip, k, k_row, memory);
}

// Weights of vector j from its scores: s becomes p, the factor that rescales what came before goes
// to memory.rescale; m and l are updated. The weights are added in the order of attention_rows.h.
template <class T, bool drop>
static void weigh(const Strip<T>& strip, const Dropout& dropout, int j,
                  const ColumnMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes, Q = Strip<T>::Q, n = kKeys / L;
  const V m = load(memory.m + j * L), m_new = load(memory.top + j * L);
  const V base = select(m_new == V::splat(-INFINITY), V::zero(), m_new);  // no key seen so far
  const V rescale = power2<kPaired<T>>(m - base);
  const V factor = V::splat(static_cast<C>(dropout.factor));
  // keys outside [begin, end) have weight 0
  const int begin = strip.begin, end = static_cast<int>(round_up(strip.end[j], kKeyRows));
  V total[L];  // of the keys lane, lane + L, lane + 2 L, ...
  const auto weight = [&](int key) __attribute__((always_inline)) {
    return power2<kPaired<T>>(load(memory.s + key * Q + j * L) - base);
  };
  constexpr int step = kUnit<T>;
  for (int lane = 0; lane < L; lane += step) {
    V sum[step] = {};
#pragma GCC unroll 4
    for (int i = 0; i < n; ++i) {
      const int key = i * L + lane;
      if (key + step <= begin || key >= end) continue;
      V p[step];
#pragma GCC unroll 2
      for (int u = 0; u < step; ++u) {
        p[u] = weight(key + u);
        sum[u] = sum[u] + p[u];
        if constexpr (drop) p[u] = strip.select(strip.keep, key + u, j, p[u] * factor, V::zero());
      }
#if defined(__AVX512BF16__)
      if constexpr (kPaired<T>)
        store(memory.p + key / 2 * Q + j * L, pack_pairs(p[0], p[1]));
      else
#endif
        store(memory.p + key * Q + j * L, p[0]);
    }
#pragma GCC unroll 2
    for (int u = 0; u < step; ++u) total[lane + u] = sum[u];
  }
#pragma GCC unroll 4
  for (int width = L / 2; width > 0; width /= 2)
#pragma GCC unroll 16
    for (int i = 0; i < width; ++i) total[i] = total[i] + total[i + width];
  store(memory.l + j * L, fma(load(memory.l + j * L), rescale, total[0]));
  store(memory.m + j * L, m_new);
  store(memory.rescale + j * L, rescale);
}

// acc[i][j] += sum over units of v[i] p[j], vector j up to its own end: one sum without a break,
// which later vectors go on with where earlier ones see nothing.
template <class T, int n, int NV>
[[gnu::always_inline]] static inline void sum_values(const Strip<T>& strip, const Compute<T>* v,
                                                     int64_t v_unit, int64_t u0,
                                                     const Compute<T>* p,
                                                     Vec<Compute<T>> (&acc)[n][NV]) {
  constexpr int j0 = kStripVectors - NV, Q = Strip<T>::Q;
  int64_t end = units<T>(strip.end[j0]);
  end = end < u0 ? u0 : end;
  multiply_tile<T, n, NV>(end - u0, v + u0 * v_unit, 1, v_unit, p + u0 * Q + j0 * Strip<T>::L, Q,
                          acc);
  if constexpr (NV > 1) {
    if (end < units<T>(strip.last())) {
      Vec<Compute<T>> rest[n][NV - 1];
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
        for (int j = 1; j < NV; ++j) rest[i][j - 1] = acc[i][j];
      sum_values<T, n, NV - 1>(strip, v, v_unit, end, p, rest);
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
        for (int j = 1; j < NV; ++j) acc[i][j] = rest[i][j - 1];
    }
  }
}

// out^T = out^T rescale + v^T p
template <class T>
static void add_values(int64_t E, const Strip<T>& strip, const Compute<T>* v, int64_t v_unit,
                       const ColumnMemory<T>& memory) {
  using V = Vec<Compute<T>>;
  constexpr int L = V::lanes, Q = Strip<T>::Q, NV = kStripVectors;
  V rescale[NV];
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) rescale[j] = load(memory.rescale + j * L);
  const auto rows_of = [&](auto rows, int64_t e) __attribute__((always_inline)) {
    constexpr int n = rows.value;
    V acc[n][NV] = {};
    sum_values<T, n, NV>(strip, v + e, v_unit, strip.begin / kUnit<T>, memory.p, acc);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) {
        Compute<T>* out = memory.strip_out + (e + i) * Q + j * L;
        store(out, fma(load(out), rescale[j], acc[i][j]));
      }
  };
  int64_t e = 0;
  for (; e + kKeyRows <= E; e += kKeyRows) rows_of(Count<kKeyRows>{}, e);
  for (; e < E; ++e) rows_of(Count<1>{}, e);
}

// The same where some value is not finite: lanes that do not see a key multiply 0 in its place.
template <class T>
[[gnu::noinline]] static void add_hidden_values(int64_t E, const Strip<T>& strip,
                                                const Compute<T>* v, int64_t v_unit,
                                                const ColumnMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes, Q = Strip<T>::Q;
  for (int64_t e = 0; e < E; ++e)
    for (int j = strip.idle(); j < kStripVectors; ++j) {
      C column[kKeys * L];
      const int64_t u0 = strip.begin / kUnit<T>, u1 = units<T>(strip.end[j]);
      for (int64_t u = u0; u < u1; ++u)
        for (int i = 0; i < L; ++i)
          column[u * L + i] = hide_unit<T>(v[u * v_unit + e], u, [&](int64_t key) {
            const int part = static_cast<int>(key / (8 * sizeof(C)));
            return strip.seen[part][j * L + i] >> key % (8 * sizeof(C)) & 1;
          });
      V acc[1][1] = {};
      if constexpr (kFused) {
        for (int64_t u = u0; u < u1; ++u)
          acc[0][0] =
              multiply_add<T>(acc[0][0], load(column + u * L), load(memory.p + u * Q + j * L));
      } else {
        for (int64_t u = u0; u < u1; u += 16) {  // the runs of multiply_tile
          V run = V::zero();
          for (int64_t i = u; i < u1 && i < u + 16; ++i)
            run = multiply_add<T>(run, load(column + i * L), load(memory.p + i * Q + j * L));
          acc[0][0] = acc[0][0] + run;
        }
      }
      C* out = memory.strip_out + e * Q + j * L;
      store(out, fma(load(out), load(memory.rescale + j * L), acc[0][0]));
    }
}

// Nothing is seen of a part that begins.
template <class T>
static void start_part(int64_t E, const ColumnMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int Q = Strip<T>::Q;
  for (int i = 0; i < Q; i += V::lanes) {
    store(memory.m + i, V::splat(C(-INFINITY)));
    store(memory.l + i, V::zero());
  }
  for (int64_t e = 0; e < E * Q; e += V::lanes) store(memory.strip_out + e, V::zero());
}

// fold_row() of attention_rows.h, a row in each lane.
template <class T>
static void fold_part(int64_t E, const Strip<T>& strip, const ColumnMemory<T>& memory) {
  using V = Vec<Compute<T>>;
  constexpr int L = V::lanes, Q = Strip<T>::Q;
  for (int j = strip.idle(); j < kStripVectors; ++j) {
    const V m = load(memory.m + j * L), l = load(memory.l + j * L);
    const V sum_m = load(memory.sum_m + j * L), sum_l = load(memory.sum_l + j * L);
    const auto nothing_now = l == V::zero(), nothing_before = sum_l == V::zero();
    const V top = select(m > sum_m, m, sum_m);
    const V before = power2<kPaired<T>>(sum_m - top), now = power2<kPaired<T>>(m - top);
    const auto fold = [&](V was, V is, V both) {
      return select(nothing_now, was, select(nothing_before, is, both));
    };
    for (int64_t e = 0; e < E; ++e) {
      Compute<T>* sum = memory.sum_out + e * Q + j * L;
      const V was = load(sum), is = load(memory.strip_out + e * Q + j * L);
      store(sum, fold(was, is, fma(was, before, is * now)));
    }
    store(memory.sum_l + j * L, fold(sum_l, l, fma(sum_l, before, l * now)));
    store(memory.sum_m + j * L, fold(sum_m, m, top));
  }
}

// The rows of the strip are finished: out = out^T / l, lse = m + log l.
template <class T>
static void write_strip(const Group<T>& x, const Strip<T>& strip, const Results& results,
                        const ColumnMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes, Q = Strip<T>::Q;
  for (int j = strip.idle(); j < kStripVectors; ++j) {
    const V l = load(memory.sum_l + j * L);
    // a row that sees no key is all zeros
    const V inverse = select(l == V::zero(), V::zero(), V::splat(C(1)) / l);
    for (int64_t e = 0; e < x.E; e += L) {
      V square[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load(memory.sum_out + (e + i) * Q + j * L) * inverse;
      transpose(square);
      const int n = x.E - e < L ? static_cast<int>(x.E - e) : L;
      for (int i = 0; i < L && strip.live(j * L + i); ++i) {
        T* out = results.template out_row<T>(strip.h[j * L + i], strip.t[j * L + i]);
        store_n(out + e, square[i], n);
      }
    }
  }
  for (int i = strip.lane0; strip.live(i); ++i)
    results.write_lse(strip.h[i], strip.t[i], memory.sum_m[i], memory.sum_l[i]);
}

// Rows [r0, r1) of the group, at most kBlockRows.
template <class T>
static void forward_columns(const Group<T>& x, int64_t r0, int64_t r1, const Results& results,
                            ColumnMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes, Q = Strip<T>::Q;
  const int strips = static_cast<int>((r1 - r0 + Q - 1) / Q);
  Strip<T> block[ColumnMemory<T>::strips];
  int64_t first_key = x.S, end_key = 0;
  for (int i = 0; i < strips; ++i) {
    Strip<T>& strip = block[i];
    memory.select(i);
    place_strip(x, r0 + i * Q, r1, strip);
    pack_queries(x, strip, memory);
    first_key = strip.first_key < first_key ? strip.first_key : first_key;
    end_key = strip.end_key > end_key ? strip.end_key : end_key;
    for (int r = strip.lane0; r < Q; ++r) {
      memory.sum_m[r] = x.sink(strip.h[r]);
      memory.sum_l[r] = memory.sum_m[r] == C(-INFINITY) ? C(0) : C(1);
    }
    for (int64_t e = 0; e < x.E * Q; e += L) store(memory.sum_out + e, V::zero());
    start_part<T>(x.E, memory);
  }

  const int64_t begin = first_key / kKeys * kKeys;
  for (int64_t first = begin; first < end_key; first += kKeys) {
    for (int i = 0; i < strips && first > begin && first % kPartKeys == 0; ++i) {
      memory.select(i);
      fold_part(x.E, block[i], memory);
      start_part<T>(x.E, memory);
    }
    const int keys = static_cast<int>(x.S - first < kKeys ? x.S - first : kKeys);
    bool packed = false;
    Operand<T> k, v;
    for (int i = 0; i < strips; ++i) {
      Strip<T>& strip = block[i];
      if (!look(x, first, strip)) continue;
      memory.select(i);
      if (!packed) {
        const TileRows<T> rows = tile_keys(x, first, keys, memory.page_k);
        k = unit_rows<T>(rows.data, rows.row, keys, kKeyRows, x.D, memory.keys);
        v = value_rows(x, first, keys, memory);
        packed = true;
      }
      if (x.bias) bias_columns(x, first, keys, strip, memory.bias);
      score_tile(x, first, strip, k.data, k.row, memory);
      for (int j = strip.idle(); j < kStripVectors; ++j)
        if (x.dropout.threshold == 0)
          weigh<T, false>(strip, x.dropout, j, memory);
        else
          weigh<T, true>(strip, x.dropout, j, memory);
      if (!strip.partial || all_finite<T>(v, x.E, strip.begin / kUnit<T>, units<T>(strip.last())))
        add_values<T>(x.E, strip, v.data, v.row, memory);
      else
        add_hidden_values<T>(x.E, strip, v.data, v.row, memory);
    }
  }
  for (int i = 0; i < strips; ++i) {
    memory.select(i);
    fold_part(x.E, block[i], memory);
    write_strip(x, block[i], results, memory);
  }
}

}  // namespace
PYKERN_END_ISA

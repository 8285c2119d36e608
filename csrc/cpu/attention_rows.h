// Forward attention of few rows, as in decoding: keys are lanes. Online softmax over tiles of 64
// keys: for each tile a row updates its maximum m, its sum l and its output, which is rescaled when
// m moves. Tiles start at multiples of 64, parts of tiles at multiples of kPartKeys, and every sum
// runs in the order of the keys, so the bits of a row depend on the row and the keys it sees:
// prefill, chunk and decode agree, and so do parts that different threads have summed.
#pragma once
#include "cpu/attention_memory.h"
#include "cpu/fetcher.h"

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

// The next kPart units of as many rows as a vector has lanes, turned: to[u] = unit u of every row.
template <class T>
[[gnu::always_inline]] static inline void load_columns(const T* p, int64_t row,
                                                       Vec<Compute<T>> (&to)[kPart<Compute<T>>]) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int n = kPart<C>, bytes = n * kUnit<T> * sizeof(T);
#pragma GCC unroll 4
  for (int i = 0; i < n; ++i) {
    const auto all =
        load_pieces<bytes>(reinterpret_cast<const char*>(p + i * row), n * row * sizeof(T));
    if constexpr (sizeof all == sizeof to[i].r) {
      to[i].r = (typename V::Reg)all;
    } else {
      T numbers[V::lanes];
      memcpy(numbers, &all, sizeof numbers);
      to[i] = load(numbers);
    }
  }
  transpose_parts(to);
}

// Scores of n rows before they are scaled, against `count` keys that lie in rows, a multiple of
// kTileColumns: keys are turned in the registers. The sums are those of multiply_tile, bit for bit.
template <class T, int n>
static void multiply_keys(const T* keys, int64_t row, int64_t count, int64_t width,
                          const Compute<T>* q, Fetcher ahead, Compute<T>* s) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int NV = kTileVectors, part = kPart<C>;
  constexpr int lines = NV * V::lanes * part * kUnit<T> * sizeof(T) / 64;  // read in a step
  for (int64_t first = 0; first < count; first += NV * V::lanes) {
    const T* p = keys + first * row;
    V sum[n][NV] = {}, run[n][NV] = {};
    for (int64_t u = 0; u < width; u += part, p += part * kUnit<T>) {
      ahead.fetch(lines);
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        V column[part];
        load_columns<T>(p + j * V::lanes * row, row, column);
#pragma GCC unroll 4
        for (int i = 0; i < part; ++i)
#pragma GCC unroll 8
          for (int r = 0; r < n; ++r)
            run[r][j] = multiply_add<T>(run[r][j], V::splat(q[(u + i) * kTileRows + r]), column[i]);
      }
      if (!kFused && ((u + part) % kShortRun == 0 || u + part >= width))
        for (int r = 0; r < n; ++r)
          for (int j = 0; j < NV; ++j) sum[r][j] = sum[r][j] + run[r][j], run[r][j] = V::zero();
    }
#pragma GCC unroll 8
    for (int r = 0; r < n; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j)
        store(s + r * kKeys + first + j * V::lanes, kFused ? run[r][j] : sum[r][j]);
  }
}

// Values as the right operand of a tile: widened on the way or, where the operand is a pair,
// paired.
template <class T>
struct ValueRows {
  using V = Vec<Compute<T>>;
  const T *data, *end;  // end: of the values that there are
  int64_t row;
  Fetcher& ahead;

  template <int NV>
  [[gnu::always_inline]] void load_next(V (&to)[NV]) {
    ahead.fetch(NV * V::lanes * kUnit<T> * sizeof(T) / 64);
    if constexpr (kPaired<T>) {
      const T* next = data + row;
      const bool paired = next < end;
#pragma GCC unroll 4
      for (int j = 0; j < NV; j += 2) {
        using Halves [[gnu::vector_size(kVectorBytes)]] = int16_t;
        constexpr auto lanes = std::make_integer_sequence<int, 2 * V::lanes>();
        const Halves even = load_bits<Halves>(data + j * V::lanes);
        const Halves odd = paired ? load_bits<Halves>(next + j * V::lanes) : Halves{};
        to[j].r = (typename V::Reg)zip_low(even, odd, lanes);
        to[j + 1].r = (typename V::Reg)zip_high(even, odd, lanes);
      }
    } else {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) to[j] = load(data + j * V::lanes);
    }
    data += kUnit<T> * row;
  }
  template <class R>
  [[gnu::always_inline]] static R load_bits(const T* p) {
    R r;
    memcpy(&r, p, sizeof r);
    return r;
  }
};

// out = out rescale + weights values for n rows, in NV vectors of columns from e on
template <class T, int n, int NV, class Source>
[[gnu::always_inline]] static inline void add_values(int64_t count, const RowMemory<T>& memory,
                                                     const Compute<T>* rescale, Source values,
                                                     int64_t e) {
  using C = Compute<T>;
  using V = Vec<C>;
  V acc[n][NV] = {};
  multiply_tile<T, n, NV>(count, memory.p, kKeys / kUnit<T>, 1, values, acc);
#pragma GCC unroll 8
  for (int i = 0; i < n; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) {
      C* out = memory.out + i * memory.E_padded + e + j * V::lanes;
      store(out, fma(load(out), V::splat(rescale[i]), acc[i][j]));
    }
}

// A tile of keys and values where they lie, and one that lies ahead.
template <class T>
struct TileOf {
  int64_t first, keys;
  TileRows<T> k, v;
  Fetcher next_k, next_v;
};

// Vectors of values that n rows take at a time, as many as the registers hold with a number of each
// row.
constexpr int value_vectors(int n) {
  constexpr int registers = kVectorBytes == 64 ? 32 : 16;
  int most = 4 * kTileVectors;
  while (n > 1 && most > kTileVectors && (n + 1) * most + 1 > registers) most /= 2;
  return most;
}

// The tile added to n rows of the group from r0 on.
template <class T, int n>
static void add_tile(const Group<T>& x, int64_t r0, const TileOf<T>& tile, uint64_t* words,
                     const RowMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int W = kTileColumns<T>, R = kTileRows;
  constexpr int p_row = kKeys / kUnit<T>;  // units of a row of weights
  const int64_t keys = tile.keys, count = units<T>(keys), E_padded = memory.E_padded;
  const int64_t turned = x.D % (kPart<C> * kUnit<T>) == 0 ? keys / W * W : 0;
  multiply_keys<T, n>(tile.k.data, tile.k.row, turned, units<T>(x.D), memory.q, tile.next_k,
                      memory.s);
  for (int64_t c = turned; c < keys; c += W) {
    const int64_t left = keys - c;
    pack<T>(memory.keys, W, {tile.k.data + c * tile.k.row, tile.k.row, 1},
            left < W ? static_cast<int>(left) : W, left, x.D);
    V acc[n][kTileVectors] = {};
    multiply_tile<T, n, kTileVectors>(units<T>(x.D), memory.q, 1, R, memory.keys, W, acc);
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kTileVectors; ++j)
        store(memory.s + i * kKeys + c + j * V::lanes, acc[i][j]);
  }
  C rescale[n];
  uint64_t all = low_bits(keys);
  for (int i = 0; i < n; ++i) {
    rescale[i] = update_row<T>(x, r0 + i, tile.first, memory.s + i * kKeys, words[i],
                               memory.p + i * p_row, memory.m + i, memory.l + i);
    all &= words[i];
  }
  const bool whole = all == low_bits(keys);
  if (whole && x.E % W == 0) {
    constexpr int NV = value_vectors(n);
    int64_t e = 0;
    Fetcher next = tile.next_v;
    const auto add = [&](auto vectors) {
      const T* values = tile.v.data + e;
      add_values<T, n, vectors.value>(
          count, memory, rescale,
          ValueRows<T>{values, values + keys * tile.v.row, tile.v.row, next}, e);
      e += vectors.value * V::lanes;
    };
    while (e + NV * V::lanes <= x.E) add(Count<NV>{});
    if (NV > 2 * kTileVectors && e + 2 * W <= x.E) add(Count<2 * kTileVectors>{});
    while (e < x.E) add(Count<kTileVectors>{});
    return;
  }
  const Right<T> values = right_rows<T>(tile.v.data, tile.v.row, keys, x.E, memory.values);
  const bool hide = !whole && !all_finite<T>(values, count, E_padded);
  for (int64_t e = 0; e < E_padded; e += W) {
    const C* panel = values.data + e / W * values.panel;
    if (!hide) {
      add_values<T, n, kTileVectors>(count, memory, rescale, UnitRows<C>{panel, values.unit}, e);
      continue;
    }
    for (int i = 0; i < n; ++i) {
      const uint64_t word = words[i];
      hide_rows<T>(memory.hidden, panel, values.unit, count,
                   [&](int64_t k) { return word >> k & 1; });
      V row[1][kTileVectors] = {};
      multiply_tile<T, 1, kTileVectors>(count, memory.p + i * p_row, p_row, 1, memory.hidden, W,
                                        row);
      for (int j = 0; j < kTileVectors; ++j) {
        C* out = memory.out + i * E_padded + e + j * V::lanes;
        store(out, fma(load(out), V::splat(rescale[i]), row[0][j]));
      }
    }
  }
}

// Readies n rows from r0 on: their queries are packed, their sums hold nothing but the sink.
template <class T>
static void start_rows(const Group<T>& x, int64_t r0, int n, const RowMemory<T>& memory) {
  using C = Compute<T>;
  for (int i = 0; i < n; ++i) {
    const int64_t h = (r0 + i) / x.T_, t = (r0 + i) % x.T_;
    memcpy(memory.gathered + i * x.D, x.q.at(h, t), x.D * sizeof(T));
    memory.sum_m[i] = x.sink(h);
    memory.sum_l[i] = memory.sum_m[i] == C(-INFINITY) ? C(0) : C(1);
  }
  pack<T>(memory.q, kTileRows, {memory.gathered, x.D, 1}, n, n, x.D);
  for (int64_t i = 0; i < n * memory.E_padded; ++i) memory.sum_out[i] = C(0);
}

// The keys that some of the n rows see.
struct KeyRange {
  int64_t first, end;
};
template <class T>
static KeyRange keys_of_rows(const Group<T>& x, int64_t r0, int n) {
  KeyRange range{x.S, 0};
  for (int i = 0; i < n; ++i) {
    const int64_t t = (r0 + i) % x.T_, first = x.first_key(t), end = x.end_key(t);
    range.first = first < range.first ? first : range.first;
    range.end = end > range.end ? end : range.end;
  }
  return range;
}

// Bytes between the row at hand and the one that is fetched: memory answers meanwhile, and what has
// come stays in the smallest second-level cache.
constexpr int64_t kBytesAhead = 32 << 10;
template <class T>
static int64_t keys_ahead(int64_t D) {
  return round_up(kBytesAhead / (D * static_cast<int64_t>(sizeof(T)) + 1) + 1, kKeys);
}

// Fetches a tile from key `first` on: behind the last one, `end`, from the rows `then` on.
template <class T>
static Fetcher fetch_tile(const Group<T>& x, const T* base, int64_t row, int64_t page_stride,
                          int64_t first, int64_t end, const char* then, int64_t width) {
  const int64_t size = x.k_scale ? 1 : sizeof(T);  // of a number in the cache
  if (first >= end && then) {
    then += (first - round_up(end, kKeys)) * row * size;
  } else {
    const int64_t key = first < end ? first : end - 1;
    then = reinterpret_cast<const char*>(base) + offset_of_key(x, row, page_stride, key) * size;
  }
  return {then, row * size, width * size};
}

// m, l and out of n rows, from the keys in range that are of part `part`.
template <class T>
[[gnu::noinline]] static void sum_part(const Group<T>& x, int64_t r0, int n, int64_t part,
                                       KeyRange range, const RowMemory<T>& memory) {
  using C = Compute<T>;
  for (int i = 0; i < n; ++i) memory.m[i] = C(-INFINITY), memory.l[i] = C(0);
  for (int64_t i = 0; i < n * memory.E_padded; ++i) memory.out[i] = C(0);
  const int64_t begin = part * kPartKeys, behind = begin + kPartKeys;
  const int64_t from = range.first > begin ? range.first / kKeys * kKeys : begin;
  const int64_t end = range.end < behind ? range.end : behind;
  for (int64_t first = from; first < end; first += kKeys) {
    const int64_t keys = end - first < kKeys ? end - first : kKeys;
    uint64_t words[kTileRows], any = 0;
    for (int i = 0; i < n; ++i) {
      words[i] = visible(x, (r0 + i) / x.T_, (r0 + i) % x.T_, first);
      any |= words[i];
    }
    if (any == 0) continue;
    const int64_t ahead = first + keys_ahead<T>(x.D);
    const TileOf<T> tile{first,
                         keys,
                         tile_keys(x, first, keys, memory.page_k),
                         tile_values(x, first, keys, memory.page_v),
                         fetch_tile(x, x.k, x.k_row, x.k_page, ahead, range.end, x.then_k, x.D),
                         fetch_tile(x, x.v, x.v_row, x.v_page, ahead, range.end, x.then_v, x.E)};
    with_rows<kFewRows<T>>(n,
                           [&](auto rows) { add_tile<T, rows.value>(x, r0, tile, words, memory); });
  }
}

// Adds what a row saw of a part, m, l and out, to what it saw before. A part of which it sees
// nothing changes no bit, and the first of which it sees something is taken as it is.
template <class T>
static void fold_row(Compute<T> m, Compute<T> l, const Compute<T>* out, int i,
                     const RowMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  C *sum_m = memory.sum_m + i, *sum_l = memory.sum_l + i;
  C* sum_out = memory.sum_out + i * memory.E_padded;
  if (l == C(0)) return;
  if (*sum_l == C(0)) {
    *sum_m = m, *sum_l = l;
    memcpy(sum_out, out, memory.E_padded * sizeof(C));
    return;
  }
  const C top = m > *sum_m ? m : *sum_m;
  const V before = power2<kPaired<T>>(V::splat(*sum_m - top));
  const V now = power2<kPaired<T>>(V::splat(m - top));
  for (int64_t e = 0; e < memory.E_padded; e += V::lanes)
    store(sum_out + e, fma(load(sum_out + e), before, load(out + e) * now));
  *sum_l = fma(V::splat(*sum_l), before, V::splat(l) * now).r[0];
  *sum_m = top;
}

// out = sum_out / sum_l, lse = sum_m + log sum_l
template <class T>
static void write_rows(const Group<T>& x, int64_t r0, int n, const Results& results,
                       const RowMemory<T>& memory) {
  using C = Compute<T>;
  using V = Vec<C>;
  for (int i = 0; i < n; ++i) {
    const int64_t h = (r0 + i) / x.T_, t = (r0 + i) % x.T_;
    const C l = memory.sum_l[i];
    const C inverse = l == C(0) ? C(0) : C(1) / l;  // a row that sees no key is all zeros
    T* out = results.template out_row<T>(h, t);
    each_vector<C>(x.E, [&](int64_t e, int lanes) {
      store_n(out + e, load(memory.sum_out + i * memory.E_padded + e) * V::splat(inverse), lanes);
    });
    results.write_lse(h, t, memory.sum_m[i], l);
  }
}

// Rows r0 .. r1 - 1 of the group, at most kFewRows.
template <class T>
static void forward_rows(const Group<T>& x, int64_t r0, int64_t r1, const Results& results,
                         RowMemory<T>& memory) {
  static_assert(kFewRows<T> <= kTileRows, "the rows are one strip");
  const int n = static_cast<int>(r1 - r0);
  start_rows(x, r0, n, memory);
  const KeyRange range = keys_of_rows(x, r0, n);
  for (int64_t part = range.first / kPartKeys; part * kPartKeys < range.end; ++part) {
    sum_part(x, r0, n, part, range, memory);
    for (int i = 0; i < n; ++i)
      fold_row<T>(memory.m[i], memory.l[i], memory.out + i * memory.E_padded, i, memory);
  }
  write_rows(x, r0, n, results, memory);
}

}  // namespace
PYKERN_END_ISA

// What forward, backward and decode share: the query heads that read one key head, as one list of
// rows, against tiles of 64 keys. Which keys of a tile a row sees is one 64-bit word.
//
// Scores are kept in base 2, score / ln 2, so that a weight is 2^(score - shift): no product with
// log2 e in the inner loop.
#pragma once
#include "cpu/dropout.h"
#include "cpu/math.h"
#include "cpu/pack.h"
#include "cpu/rows.h"
#include "ops/attention.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kKeys = 64;  // bits of a word; tiles start at multiples, so chunked queries agree
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// A matrix of rows with unit stride along them.
template <class T>
struct RowList {
  T* data;
  int64_t head, row;  // distance to the next head, to the next row
  T* at(int64_t h, int64_t i) const { return data + h * head + i * row; }
};

// The query heads of key head g in sequence b. Row r is query r % T of head r / T.
template <class T>
struct Group {
  using C = Compute<T>;
  int64_t heads, T_, S, D, E;
  RowList<const T> q;
  const T* k;
  const T* v;
  int64_t k_row, v_row;
  const int32_t* pages;  // null: keys lie in order; else key s is slot first_slot + s of the pages
  int64_t pages_step, page, k_page, v_page, first_slot;
  const float *k_scale, *v_scale;  // null: none; else pages hold int8, row i of page p times scale
  int64_t scale_page;              // p scale_page + i
  const uint8_t* mask;             // null: none; element (h, t, s) by strides
  int64_t mask_head, mask_row, mask_key;
  const T* bias;
  int64_t bias_head, bias_row, bias_key;
  const float* slopes;  // null: none; of head h at h * slope_head
  int64_t slope_head;
  const T* sinks;
  int64_t sink_head;
  int64_t left, right;  // -1: unlimited
  C scale;              // in base 2; with a cap, that of tanh's argument
  C cap;                // in base 2; 0: none
  Dropout dropout;
  int64_t sequence, head0;      // of the whole call, for dropout
  const char *then_k, *then_v;  // what the same thread probably reads next; null: nobody knows

  int64_t rows() const { return heads * T_; }
  int64_t diagonal(int64_t t) const { return S - T_ + t; }
  // Query t sees no key before first_key(t), and none from end_key(t) on.
  int64_t first_key(int64_t t) const {
    const int64_t first = left < 0 ? 0 : diagonal(t) - left;
    return first < 0 ? 0 : first;
  }
  int64_t end_key(int64_t t) const {
    const int64_t end = right < 0 || diagonal(t) + right >= S ? S : diagonal(t) + right + 1;
    return end < 0 ? 0 : end;
  }
  C slope(int64_t h) const {  // in base 2
    return slopes ? static_cast<C>(slopes[h * slope_head] * kLog2E) : C(0);
  }
  // The logit without a key, in base 2, or -infinity.
  C sink(int64_t h) const {
    return sinks ? static_cast<C>(widen(sinks[h * sink_head]) * kLog2E) : C(-INFINITY);
  }
};

// The first row of sequence b, when sequences lie end to end.
static inline int64_t offset_of(const Tensor& cu_seqlens, int64_t b) {
  return static_cast<const int32_t*>(cu_seqlens.data)[b * cu_seqlens.stride[0]];
}

static inline int64_t sequences_of(const AttentionInputs& op) {
  return op.cu_seqlens_q.given ? op.cu_seqlens_q.size[0] - 1 : op.q.size[0];
}

// Where the rows of sequence b begin in a [B, H, rows, .] tensor: batch and row.
struct Place {
  int64_t batch, q_row, k_row, queries, keys;
};
static inline Place place_of(const AttentionInputs& op, int64_t b) {
  if (!op.cu_seqlens_q.given) return {b, 0, 0, op.q.size[2], op.k.size[2]};
  const int64_t q0 = offset_of(op.cu_seqlens_q, b), k0 = offset_of(op.cu_seqlens_k, b);
  return {0, q0, k0, offset_of(op.cu_seqlens_q, b + 1) - q0,
          offset_of(op.cu_seqlens_k, b + 1) - k0};
}

// Limits beyond every key are cut to what cannot overflow beside a position.
template <class T>
static void set_window(Group<T>& x, int64_t left, int64_t right) {
  const int64_t most = x.S + x.T_;
  x.left = left > most ? most : left;
  x.right = right > most ? most : right;
}

template <class T>
static void set_scores(Group<T>& x, double scale, double softcap) {
  x.cap = static_cast<Compute<T>>(softcap * kLog2E);
  x.scale = static_cast<Compute<T>>(softcap == 0 ? scale * kLog2E : scale / softcap);
}

template <class T>
static Group<T> group_of(const AttentionInputs& op, int64_t b, int64_t g) {
  const int64_t heads = op.q.size[1] / op.k.size[1], h = g * heads;
  const Place at = place_of(op, b);
  Group<T> x = {};
  x.heads = heads, x.D = op.q.size[3], x.E = op.v.size[3];
  x.T_ = at.queries, x.S = at.keys;
  x.q = {row_at<const T>(op.q, at.batch, h, at.q_row), op.q.stride[1], op.q.stride[2]};
  x.k = row_at<const T>(op.k, at.batch, g, at.k_row), x.k_row = op.k.stride[2];
  x.v = row_at<const T>(op.v, at.batch, g, at.k_row), x.v_row = op.v.stride[2];
  if (op.mask.given) x.mask = row_at<const uint8_t>(op.mask, b, h, 0);
  x.mask_head = op.mask.stride[1], x.mask_row = op.mask.stride[2], x.mask_key = op.mask.stride[3];
  if (op.bias.given) x.bias = row_at<const T>(op.bias, b, h, 0);
  x.bias_head = op.bias.stride[1], x.bias_row = op.bias.stride[2], x.bias_key = op.bias.stride[3];
  x.slope_head = op.alibi_slopes.stride[1];
  if (op.alibi_slopes.given)
    x.slopes = static_cast<const float*>(op.alibi_slopes.data) + b * op.alibi_slopes.stride[0] +
               h * x.slope_head;
  x.sink_head = op.sinks.stride[0];
  if (op.sinks.given) x.sinks = static_cast<const T*>(op.sinks.data) + h * x.sink_head;
  set_window(x, op.left, op.right);
  set_scores(x, op.scale, op.softcap);
  x.dropout = dropout_of(op.seed, op.dropout_p);
  x.sequence = b, x.head0 = h;
  return x;
}

// lse and its gradient, float or double
static inline double stat_at(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  return t.dtype == DType::f64 ? row_at<double>(t, b, h, i)[0] : row_at<float>(t, b, h, i)[0];
}

// 2^(rounded - lse): what the weights 2^(score - rounded) lack, lse being in base 2 and exact.
template <class C>
static inline C rounding_factor(C rounded, double lse) {
  return lse == -INFINITY ? C(1) : static_cast<C>(::exp((rounded - lse) * kLn2));
}

static inline uint64_t low_bits(int64_t n) {
  return n <= 0 ? 0 : n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
}

// The keys of the tile at `first` that query t of head h sees.
template <class T>
static inline uint64_t visible(const Group<T>& x, int64_t h, int64_t t, int64_t first) {
  uint64_t word = low_bits(x.end_key(t) - first);
  if (x.left >= 0) word &= ~low_bits(x.first_key(t) - first);
  if (!x.mask || word == 0) return word;
  const uint8_t* mask = x.mask + h * x.mask_head + t * x.mask_row + first * x.mask_key;
  const int n = 64 - __builtin_clzll(word);
  if (x.mask_key == 0) return *mask ? word : 0;
  if (x.mask_key == 1) return word & nonzero_bytes(mask, n);
  for (int i = 0; i < n; ++i)
    if (!mask[i * x.mask_key]) word &= ~(uint64_t(1) << i);
  return word;
}

// The keys of the tile whose weight dropout keeps, for query t of head h.
template <class T>
static inline uint64_t kept(const Group<T>& x, int64_t h, int64_t t, int64_t first) {
  return keep_word(x.dropout, x.sequence, x.head0 + h, t, first / kKeys);
}

// Base-2 scores of some pairs, before slopes and bias, from their dot products.
template <class T>
[[gnu::always_inline]] static inline Vec<Compute<T>> capped(const Group<T>& x,
                                                            Vec<Compute<T>> dot) {
  using V = Vec<Compute<T>>;
  const V y = dot * V::splat(x.scale);
  return x.cap == 0 ? y : V::splat(x.cap) * tanh(y);
}

// A bias in base 2 is added as b log2 e; the least finite numbers, which serve as masks, would
// become -infinity. This is as low as it may be.
template <class C>
constexpr C kLeastBias = static_cast<C>(sizeof(C) == 4 ? -2.3e38 : -1.2e308);

// score + bias, in base 2
template <class C>
static inline Vec<C> add_bias(Vec<C> bias, Vec<C> score) {
  return fma(max(bias, Vec<C>::splat(kLeastBias<C>)), Vec<C>::splat(static_cast<C>(kLog2E)), score);
}

// n bias numbers of a row from key s on
template <class T>
static inline Vec<Compute<T>> bias_lanes(const Group<T>& x, const T* row, int64_t s, int n) {
  using V = Vec<Compute<T>>;
  if (x.bias_key == 1) return load_n(row + s, n);
  if (x.bias_key == 0) return V::splat(widen(*row));
  Compute<T> lanes[V::lanes] = {};
  for (int i = 0; i < n; ++i) lanes[i] = widen(row[(s + i) * x.bias_key]);
  return load(lanes);
}

// The position of each lane: 0, 1, 2, ...
template <class C>
static inline Vec<C> lane_numbers() {
  C lanes[Vec<C>::lanes];
  for (int i = 0; i < Vec<C>::lanes; ++i) lanes[i] = static_cast<C>(i);
  return load(lanes);
}

// Scores of one row against a tile, from the dot products in s; -inf where hidden. A bias of -inf
// hides a key, too: word is updated.
template <class T>
[[gnu::always_inline]] static inline void finish_scores(
    const Group<T>& x, int64_t h, int64_t t, int64_t first, const Compute<T>* s, uint64_t& word,
    Vec<Compute<T>> (&y)[kKeys / Vec<Compute<T>>::lanes]) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int n = kKeys / V::lanes;
  const V hidden = V::splat(-INFINITY);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) y[i] = capped(x, load(s + i * V::lanes));
  if (x.slopes) {
    const V slope = V::splat(-x.slope(h)), numbers = lane_numbers<C>();
    for (int i = 0; i < n; ++i) {
      const C start = static_cast<C>(first + i * V::lanes - x.diagonal(t));
      y[i] = fma(slope, abs(V::splat(start) + numbers), y[i]);
    }
  }
  if (x.bias) {
    const T* row = x.bias + h * x.bias_head + t * x.bias_row;
    for (int i = 0; i < n; ++i) {
      const int64_t left = x.S - first - i * V::lanes;
      V b = V::zero();
      if (left > 0)
        b = bias_lanes(x, row, first + i * V::lanes,
                       left < V::lanes ? static_cast<int>(left) : V::lanes);
      y[i] = add_bias(b, y[i]);
      word &= ~(bits_of(b == hidden) << (i * V::lanes));
    }
  }
  if (word != ~uint64_t(0))
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) y[i] = select(lanes_of<C>(word, i * V::lanes), y[i], hidden);
}

static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Where the row of a key begins in a cache of keys or of values, in its numbers.
template <class T>
static int64_t offset_of_key(const Group<T>& x, int64_t row, int64_t page_stride, int64_t key) {
  if (!x.pages) return key * row;
  const int64_t slot = x.first_slot + key;
  return x.pages[slot / x.page * x.pages_step] * page_stride + slot % x.page * row;
}

// Rows of a tile of keys or values: in place, or copied together from their pages.
template <class T>
struct TileRows {
  const T* data;
  int64_t row;
};
template <class T>
static TileRows<T> widened_rows(const Group<T>& x, const int8_t* base, int64_t row,
                                int64_t page_stride, const float* scales, int64_t first,
                                int64_t count, int64_t width, T* copy) {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t slot = x.first_slot + first + i, in_page = slot % x.page;
    const int64_t page = x.pages[slot / x.page * x.pages_step];
    const int8_t* from = base + page * page_stride + in_page * row;
    const float scale = scales[page * x.scale_page + in_page];
    for (int64_t d = 0; d < width; ++d)
      copy[i * width + d] = narrow<T>(static_cast<Compute<T>>(from[d] * scale));
  }
  return {copy, width};
}
template <class T>
static TileRows<T> tile_rows(const Group<T>& x, const T* base, const float* scales, int64_t row,
                             int64_t page_stride, int64_t first, int64_t count, int64_t width,
                             Compute<T>* memory) {
  if (!x.pages) return {base + first * row, row};
  if (scales)
    return widened_rows(x, reinterpret_cast<const int8_t*>(base), row, page_stride, scales, first,
                        count, width, reinterpret_cast<T*>(memory));
  const auto place = [&](int64_t key) { return base + offset_of_key(x, row, page_stride, key); };
  if ((x.first_slot + first) % x.page + count <= x.page) return {place(first), row};
  T* copy = reinterpret_cast<T*>(memory);
  for (int64_t i = 0; i < count; ++i) memcpy(copy + i * width, place(first + i), width * sizeof(T));
  return {copy, width};
}
template <class T>
static TileRows<T> tile_keys(const Group<T>& x, int64_t first, int64_t count, Compute<T>* memory) {
  return tile_rows(x, x.k, x.k_scale, x.k_row, x.k_page, first, count, x.D, memory);
}
template <class T>
static TileRows<T> tile_values(const Group<T>& x, int64_t first, int64_t count,
                               Compute<T>* memory) {
  return tile_rows(x, x.v, x.v_scale, x.v_row, x.v_page, first, count, x.E, memory);
}

// Keys as columns: [units(width)][64] of a tile, 0 behind the last key.
template <class T>
static void pack_keys(Compute<T>* out, const T* rows, int64_t row, int64_t count, int64_t width) {
  pack<T>(out, kKeys, {rows, row, 1}, static_cast<int>(count), count, width);
}

// The right operand of a sum over rows: number (unit u, column i) at data[u unit + i / W panel +
// i % W], W = kTileColumns; whole panels may be read.
template <class T>
struct Right {
  const Compute<T>* data;
  int64_t unit, panel;
};

// Rows whose numbers serve as such an operand where they are.
template <class T>
static bool rows_in_place(int64_t width) {
  return sizeof(T) == sizeof(Compute<T>) && width % kTileColumns<T> == 0;
}

// Rows as a right operand: where they are, or packed into `copy`.
template <class T>
static Right<T> right_rows(const T* rows, int64_t row, int64_t count, int64_t width,
                           Compute<T>* copy) {
  constexpr int W = kTileColumns<T>;
  if (rows_in_place<T>(width)) return {reinterpret_cast<const Compute<T>*>(rows), row, W};
  const int64_t panel = units<T>(count) * W;
  for (int64_t first = 0; first < width; first += W) {
    const int64_t left = width - first;
    pack<T>(copy + first / W * panel, W, {rows + first, 1, row},
            left < W ? static_cast<int>(left) : W, left, count);
  }
  return {copy, W, panel};
}

// Units [0, count) of an operand of whole panels: 0 times infinity or NaN would be NaN.
template <class T>
static bool all_finite(const Right<T>& b, int64_t count, int64_t width) {
  using V = Vec<Compute<T>>;
  constexpr int W = kTileColumns<T>;
  V probe = V::zero();
  for (int64_t column = 0; column < width; column += W)
    for (int64_t u = 0; u < count; ++u)
      for (int i = 0; i < W; i += V::lanes)
        probe =
            multiply_add<T>(probe, load(b.data + u * b.unit + column / W * b.panel + i), V::zero());
  return bits_of(probe != probe) == 0;
}

// A matrix of units in memory, in place or a copy.
template <class T>
struct Operand {
  const Compute<T>* data;
  int64_t row;  // in units
};

// Rows as units along their width, at least count rounded up to a multiple of them: in place where
// the numbers lie as units do, else a copy with zeros behind.
template <class T>
static Operand<T> unit_rows(const T* rows, int64_t row, int64_t count, int multiple, int64_t width,
                            Compute<T>* copy) {
  using C = Compute<T>;
  if constexpr (sizeof(T) == sizeof(C)) {
    if (count % multiple == 0) return {reinterpret_cast<const C*>(rows), row};
  } else if constexpr (kPaired<T>) {  // pairs are read as floats, which need their alignment
    if (count % multiple == 0 && width % 2 == 0 && row % 2 == 0 &&
        reinterpret_cast<uintptr_t>(rows) % sizeof(C) == 0)
      return {reinterpret_cast<const C*>(rows), row / 2};
  }
  const int64_t length = units<T>(width);
  for (int64_t i = 0; i < round_up(count, multiple); ++i)
    for (int64_t u = 0; u < length; u += Vec<C>::lanes) {
      const int64_t left = width - u * kUnit<T>;
      store(copy + i * length + u,
            i < count ? load_units<T>(rows + i * row + u * kUnit<T>, left) : Vec<C>::zero());
    }
  return {copy, length};
}

// A number, or the numbers of a pair, that see(k) refuses made 0: for a row that does not see them.
template <class T, class See>
static inline Compute<T> hide_unit(Compute<T> number, int64_t u, const See& see) {
  if constexpr (kPaired<T>) {
    uint16_t half[2];
    memcpy(half, &number, sizeof half);
    for (int p = 0; p < 2; ++p)
      if (!see(u * 2 + p)) half[p] = 0;
    memcpy(&number, half, sizeof half);
    return number;
  } else {
    return see(u) ? number : Compute<T>(0);
  }
}

// A copy of a panel, with units W apart, in which the numbers that see(k) refuses are 0: for a row
// that does not see them while a tile mate does. Only for panels with numbers that are not finite.
template <class T, class See>
[[gnu::noinline]] static void hide_rows(Compute<T>* out, const Compute<T>* panel, int64_t unit,
                                        int64_t count, const See& see) {
  constexpr int W = kTileColumns<T>;
  for (int64_t u = 0; u < count; ++u)
    for (int i = 0; i < W; ++i) out[u * W + i] = hide_unit<T>(panel[u * unit + i], u, see);
}

}  // namespace
PYKERN_END_ISA

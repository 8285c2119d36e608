// What forward, backward and decode share: the query heads that read one key head, as one list of
// rows, against tiles of 64 keys. Which keys of a tile a row sees is one 64-bit word.
#pragma once
#include "cpu/math.h"
#include "cpu/pack.h"
#include "cpu/rows.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kKeys = 64;  // bits of a word; tiles start at multiples, so chunked queries agree

// A matrix of rows with unit stride along them.
template <class T>
struct RowList {
  T* data;
  int64_t head, row;  // distance to the next head, to the next row
  T* at(int64_t h, int64_t i) const { return data + h * head + i * row; }
};

// The query heads of key head g in batch b. Row r is query r % T of head r / T.
template <class T>
struct Group {
  int64_t heads, T_, S, D, E;
  RowList<const T> q;
  const T* k;
  const T* v;
  int64_t k_row, v_row;
  const uint8_t* mask;  // null: none; element (h, t, s) by strides
  int64_t mask_head, mask_row, mask_key;
  const T* bias;
  int64_t bias_head, bias_row, bias_key;
  bool causal;
  Compute<T> scale;

  int64_t rows() const { return heads * T_; }
  // Keys 0 .. limit - 1 come before the causal boundary of query t.
  int64_t limit(int64_t t) const {
    const int64_t end = causal ? S - T_ + t + 1 : S;
    return end < 0 ? 0 : end;
  }
};

template <class T, class Op>
static Group<T> group_of(const Op& op, int64_t b, int64_t g) {
  const int64_t heads = op.q.size[1] / op.k.size[1], h = g * heads;
  Group<T> x;
  x.heads = heads;
  x.T_ = op.q.size[2];
  x.S = op.k.size[2];
  x.D = op.q.size[3];
  x.E = op.v.size[3];
  x.q = {row_at<const T>(op.q, b, h, 0), op.q.stride[1], op.q.stride[2]};
  x.k = row_at<const T>(op.k, b, g, 0);
  x.v = row_at<const T>(op.v, b, g, 0);
  x.k_row = op.k.stride[2];
  x.v_row = op.v.stride[2];
  x.mask = op.mask.given ? row_at<const uint8_t>(op.mask, b, h, 0) : nullptr;
  x.mask_head = op.mask.stride[1], x.mask_row = op.mask.stride[2], x.mask_key = op.mask.stride[3];
  x.bias = op.bias.given ? row_at<const T>(op.bias, b, h, 0) : nullptr;
  x.bias_head = op.bias.stride[1], x.bias_row = op.bias.stride[2], x.bias_key = op.bias.stride[3];
  x.causal = op.causal;
  x.scale = static_cast<Compute<T>>(op.scale);
  return x;
}

// lse and its gradient, float or double
static inline double stat_at(const Tensor& t, int64_t b, int64_t h, int64_t i) {
  return t.dtype == DType::f64 ? row_at<double>(t, b, h, i)[0] : row_at<float>(t, b, h, i)[0];
}

static inline uint64_t low_bits(int64_t n) {
  return n <= 0 ? 0 : n >= 64 ? ~uint64_t(0) : (uint64_t(1) << n) - 1;
}

// The keys of the tile at `first` that query t of head h sees.
template <class T>
static uint64_t visible(const Group<T>& x, int64_t h, int64_t t, int64_t first) {
  uint64_t word = low_bits(x.limit(t) - first);
  if (!x.mask || word == 0) return word;
  const uint8_t* mask = x.mask + h * x.mask_head + t * x.mask_row + first * x.mask_key;
  const int n = 64 - __builtin_clzll(word);
  if (x.mask_key == 0) return *mask ? word : 0;
  if (x.mask_key == 1) return word & nonzero_bytes(mask, n);
  for (int i = 0; i < n; ++i)
    if (!mask[i * x.mask_key]) word &= ~(uint64_t(1) << i);
  return word;
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

// Scores of one row against a tile, from the dot products in s: scale, bias, and -inf where hidden.
// A bias of -inf hides a key, too: word is updated.
template <class T>
[[gnu::always_inline]] static inline void finish_scores(
    const Group<T>& x, int64_t h, int64_t t, int64_t first, const Compute<T>* s, uint64_t& word,
    Vec<Compute<T>> (&y)[kKeys / Vec<Compute<T>>::lanes]) {
  using V = Vec<Compute<T>>;
  constexpr int n = kKeys / V::lanes;
  const V scale = V::splat(x.scale), hidden = V::splat(-INFINITY);
  if (x.bias) {
    const T* row = x.bias + h * x.bias_head + t * x.bias_row;
    for (int i = 0; i < n; ++i) {
      const int64_t left = x.S - first - i * V::lanes;
      V b = V::zero();
      if (left > 0)
        b = bias_lanes(x, row, first + i * V::lanes,
                       left < V::lanes ? static_cast<int>(left) : V::lanes);
      y[i] = fma(load(s + i * V::lanes), scale, b);
      word &= ~(bits_of(b == hidden) << (i * V::lanes));
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) y[i] = load(s + i * V::lanes) * scale;
  }
  if (word != ~uint64_t(0))
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i)
      y[i] = select(lanes_of<Compute<T>>(word, i * V::lanes), y[i], hidden);
}

static inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// Keys as columns: panels of [units(width)][W] over the 64 keys of a tile.
template <class T>
static void pack_keys(Compute<T>* out, const T* rows, int64_t row, int64_t count, int64_t width) {
  constexpr int W = kTileColumns<T>;
  for (int p = 0; p < kKeys / W; ++p) {
    const int64_t left = count - p * W;
    pack<T>(out + p * units<T>(width) * W, W, {rows + p * W * row, row, 1},
            left < 0   ? 0
            : left < W ? static_cast<int>(left)
                       : W,
            left, width);
  }
}

// Rows as they are: panels of [units(count)][W] over the width, for a sum over the rows. Returns
// false when some number is not finite: 0 times it would be NaN.
template <class T>
static bool pack_rows(Compute<T>* out, const T* rows, int64_t row, int64_t count, int64_t width) {
  using V = Vec<Compute<T>>;
  constexpr int W = kTileColumns<T>;
  const int64_t panel = units<T>(count) * W;
  V probe = V::zero();
  for (int64_t first = 0; first < width; first += W, out += panel) {
    const int64_t left = width - first;
    pack<T>(out, W, {rows + first, 1, row}, left < W ? static_cast<int>(left) : W, left, count);
    for (int64_t i = 0; i < panel; i += V::lanes)
      probe = multiply_add<T>(probe, load(out + i), V::zero());
  }
  return bits_of(probe != probe) == 0;
}

// A copy of a panel in which the numbers that see(k) refuses are 0, for a row that does not see
// them while a tile mate does. Only for panels with numbers that are not finite.
template <class T, class See>
[[gnu::noinline]] static void hide_rows(Compute<T>* out, const Compute<T>* panel, int64_t count,
                                        const See& see) {
  using C = Compute<T>;
  constexpr int W = kTileColumns<T>;
  for (int64_t u = 0; u < units<T>(count); ++u)
    for (int i = 0; i < W; ++i) {
      C number = panel[u * W + i];
      if constexpr (kPaired<T>) {
        uint16_t half[2];
        memcpy(half, &number, sizeof half);
        for (int p = 0; p < 2; ++p)
          if (!see(u * 2 + p)) half[p] = 0;
        memcpy(&number, half, sizeof half);
      } else if (!see(u)) {
        number = C(0);
      }
      out[u * W + i] = number;
    }
}

}  // namespace
PYKERN_END_ISA

// What the kernels of attention share: where rows lie, which keys of a tile a row sees, as one word
// of 64 bits, and what becomes of a product of a query with a key before it is a score.
//
// Scores are kept in base 2, score / ln 2, so that a weight is 2^(score - shift).
#pragma once
#include "cuda/launch.h"
#include "cuda/math.cuh"
#include "cuda/philox.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "ops/attention.h"

namespace pykern::cuda {

constexpr int kKeys = 64;  // of a tile: bits of a word; tiles begin at multiples
constexpr int64_t kMostHeadSize = 256;
constexpr int64_t kMostRows = int64_t{1} << 30;  // of a sequence: positions are ints
constexpr double kBitsPerNat = 1.4426950408889634, kNatsPerBit = 0.6931471805599453;  // log2 e

// Rows of a tensor [B, H, rows, .] with a unit last stride.
template <class T>
struct HeadRows {
  T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;  // strides, in elements

  __device__ __forceinline__ T* at(int64_t b, int64_t h, int64_t i) const {
    return data + b * batch + h * head + i * row;
  }
};
template <class T>
HeadRows<T> head_rows(const Tensor& t) {
  return {static_cast<T*>(t.data), t.stride[0], t.stride[1], t.stride[2]};
}

// A number for each [B, H, row], float or double.
struct Stats {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  bool doubles = false;

  __device__ __forceinline__ double at(int64_t b, int64_t h, int64_t i) const {
    const int64_t place = b * batch + h * head + i * row;
    return doubles ? static_cast<const double*>(data)[place]
                   : static_cast<double>(static_cast<const float*>(data)[place]);
  }
  __device__ __forceinline__ void set(int64_t b, int64_t h, int64_t i, double x) const {
    const int64_t place = b * batch + h * head + i * row;
    if (doubles)
      static_cast<double*>(data)[place] = x;
    else
      static_cast<float*>(data)[place] = static_cast<float>(x);
  }
};
inline Stats stats_of(const Tensor& t) {
  return {t.given ? t.data : nullptr, t.stride[0], t.stride[1], t.stride[2], t.dtype == DType::f64};
}

// ---- the mask, packed (attention_mask.cu)

// What a tile of 64 queries by 64 keys has, joined by |.
enum Class : uint8_t { kSeen = 1, kHidden = 2 };

struct MaskBits {
  const uint64_t* words = nullptr;   // a word for each query and tile of keys; null: no mask
  const uint8_t* classes = nullptr;  // for each tile of queries and tile of keys
  int64_t batch = 0, head = 0, row = 0;
  int64_t class_batch = 0, class_head = 0, class_row = 0;

  __device__ __forceinline__ uint64_t word(int b, int h, int t, int tile) const {
    return words[b * batch + h * head + t * row + tile];
  }
  // of the queries [t0, t1]
  __device__ __forceinline__ int of(int b, int h, int t0, int t1, int tile) const {
    const uint8_t* at = classes + b * class_batch + h * class_head + tile;
    int found = at[t0 / kKeys * class_row];
    for (int i = t0 / kKeys + 1; i <= t1 / kKeys; ++i) found |= at[i * class_row];
    return found;
  }
};

// Packs a mask for the length of a call; of none nothing is made.
class PackedMask {
 public:
  PackedMask(const Tensor& mask, Stream stream);
  const MaskBits& bits() const { return bits_; }

 private:
  struct Sizes {
    int64_t batches, heads, rows, words, row_tiles;
    explicit Sizes(const Tensor& mask);
    int64_t all_words() const { return batches * heads * rows * words; }
    int64_t all_tiles() const { return batches * heads * row_tiles * words; }
  };
  Sizes sizes_;
  Workspace memory_;
  MaskBits bits_;
};

// ---- the scores of a call

// Where a sequence lies: its rows are those of batch `batch` from q_row and k_row on.
struct Place {
  int batch, q_row, k_row;
  int queries, keys;
  __device__ __forceinline__ int diagonal(int t) const { return keys - queries + t; }
};

template <class T>
struct Scores {
  using C = Compute<T>;
  int sequences, H, group;  // group: query heads of a key head
  int D, E;                 // widths of q and k, of v and out
  int queries, keys;        // of all sequences
  const int32_t *cu_q = nullptr, *cu_k = nullptr;
  int64_t cu_q_step = 0, cu_k_step = 0;
  int left, right;  // -1: unlimited
  C scale;          // in base 2; with a cap, that of tanh's argument
  C cap;            // in base 2; 0: none
  const float* slopes = nullptr;
  int64_t slope_batch = 0, slope_head = 0;
  const T* sinks = nullptr;
  int64_t sink_head = 0;
  HeadRows<const T> bias;
  int64_t bias_key = 0;
  MaskBits mask;
  Dropout dropout;

  // Offsets come from the device, unchecked: cut to the rows that there are.
  __device__ __forceinline__ Place place(int b) const {
    if (!cu_q) return {b, 0, 0, queries, keys};
    const auto within = [](int at, int from, int most) {
      return at < from ? from : at > most ? most : at;
    };
    const int q0 = within(cu_q[b * cu_q_step], 0, queries);
    const int q1 = within(cu_q[(b + 1) * cu_q_step], q0, queries);
    const int k0 = within(cu_k[b * cu_k_step], 0, keys);
    const int k1 = within(cu_k[(b + 1) * cu_k_step], k0, keys);
    return {0, q0, k0, q1 - q0, k1 - k0};
  }
  // Query t sees no key before first_key(t), and none from end_key(t) on.
  __device__ __forceinline__ int first_key(const Place& at, int t) const {
    const int first = left < 0 ? 0 : at.diagonal(t) - left;
    return first < 0 ? 0 : first;
  }
  __device__ __forceinline__ int end_key(const Place& at, int t) const {
    const int end =
        right < 0 || at.diagonal(t) >= at.keys - right ? at.keys : at.diagonal(t) + right + 1;
    return end < 0 ? 0 : end;
  }
  // The queries [t0, t1) outside of which nobody sees the keys [first, last].
  __device__ __forceinline__ int first_query(const Place& at, int first) const {
    const int t = right < 0 ? 0 : first - right - at.diagonal(0);
    return t < 0 ? 0 : t;
  }
  __device__ __forceinline__ int end_query(const Place& at, int last) const {
    if (left < 0 || last >= at.diagonal(at.queries) - left) return at.queries;
    const int t = last + left - at.diagonal(0) + 1;
    return t < 0 ? 0 : t;
  }
  // The keys of a tile that query t sees, as far as window and mask decide it.
  __device__ __forceinline__ uint64_t visible(const Place& at, int b, int h, int t,
                                              int tile) const {
    if (t >= at.queries) return 0;
    const int first = tile * kKeys;
    uint64_t word = low_bits(end_key(at, t) - first) & ~low_bits(first_key(at, t) - first);
    if (mask.words && word != 0) word &= mask.word(b, h, t, tile);
    return word;
  }
  // What a tile has for the queries [t0, t1].
  __device__ __forceinline__ int look(const Place& at, int b, int h, int t0, int t1,
                                      int tile) const {
    const int first = tile * kKeys, end = first + kKeys;
    if (first >= end_key(at, t1) || end <= first_key(at, t0)) return kHidden;  // or behind all keys
    int found = first >= first_key(at, t1) && end <= end_key(at, t0) ? kSeen : kSeen | kHidden;
    if (mask.words) {
      const int masked = mask.of(b, h, t0, t1, tile);
      found = !(masked & kSeen) ? kHidden : found | masked;
    }
    return found;
  }

  __device__ __forceinline__ static uint64_t low_bits(int n) {
    return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  }
  __device__ __forceinline__ C slope(int b, int h) const {  // in base 2
    return slopes ? static_cast<C>(slopes[b * slope_batch + h * slope_head] * kBitsPerNat) : C(0);
  }
  // The logit without a key, in base 2, or -infinity.
  __device__ __forceinline__ C sink(int h) const {
    return sinks ? static_cast<C>(widen(sinks[h * sink_head]) * C(kBitsPerNat)) : C(-INFINITY);
  }
  __host__ __device__ bool plain() const {  // a score is scale times the product, scale > 0
    return cap == 0 && !slopes && !bias.data && dropout.threshold == 0 && scale > 0;
  }
};

template <class T>
Scores<T> scores_of(const AttentionInputs& op, const MaskBits& mask) {
  using C = Compute<T>;
  const bool ragged = op.cu_seqlens_q.given;
  const int64_t sequences = ragged ? op.cu_seqlens_q.size[0] - 1 : op.q.size[0];
  const int64_t D = op.q.size[3], E = op.v.size[3], T_ = op.q.size[2], S = op.k.size[2];
  PYKERN_CHECK(value, D <= kMostHeadSize && E <= kMostHeadSize, "attention: head sizes ", D,
               " and ", E, " must be at most ", kMostHeadSize, " on CUDA");
  PYKERN_CHECK(value, T_ < kMostRows && S < kMostRows && sequences < kMostRows, "attention: ", T_,
               " queries, ", S, " keys and ", sequences, " sequences must be fewer than ",
               kMostRows, " on CUDA");
  Scores<T> x{};
  x.sequences = static_cast<int>(sequences), x.H = static_cast<int>(op.q.size[1]);
  x.group = op.k.size[1] > 0 ? x.H / static_cast<int>(op.k.size[1]) : 1;
  x.D = static_cast<int>(D), x.E = static_cast<int>(E);
  x.queries = static_cast<int>(T_), x.keys = static_cast<int>(S);
  if (ragged) {
    x.cu_q = static_cast<const int32_t*>(op.cu_seqlens_q.data);
    x.cu_k = static_cast<const int32_t*>(op.cu_seqlens_k.data);
    x.cu_q_step = op.cu_seqlens_q.stride[0], x.cu_k_step = op.cu_seqlens_k.stride[0];
  }
  x.left = op.left < kMostRows ? static_cast<int>(op.left) : -1;
  x.right = op.right < kMostRows ? static_cast<int>(op.right) : -1;
  x.cap = static_cast<C>(op.softcap * kBitsPerNat);
  x.scale = static_cast<C>(op.softcap == 0 ? op.scale * kBitsPerNat : op.scale / op.softcap);
  if (op.alibi_slopes.given) {
    x.slopes = static_cast<const float*>(op.alibi_slopes.data);
    x.slope_batch = op.alibi_slopes.stride[0], x.slope_head = op.alibi_slopes.stride[1];
  }
  if (op.sinks.given) {
    x.sinks = static_cast<const T*>(op.sinks.data);
    x.sink_head = op.sinks.stride[0];
  }
  if (op.bias.given) {
    x.bias = head_rows<const T>(op.bias);
    x.bias_key = op.bias.stride[3];
  }
  x.mask = mask;
  x.dropout = dropout_of(op.seed, op.dropout_p);
  return x;
}

// ---- one score

// tanh in the accuracy that a score needs of which weights of type T are made; of halves 1e-7 off
template <class T>
__device__ __forceinline__ Compute<T> hyperbolic_tangent_for(Compute<T> x) {
  if constexpr (kHalf<T>)
    return 1 - 2 * rcp_approx(1 + exp2_approx(x * static_cast<float>(2 * kBitsPerNat)));
  else
    return tanh(x);
}
__device__ __forceinline__ float power2(float x) { return exp2_approx(x); }
__device__ __forceinline__ double power2(double x) { return exp2(x); }

// A bias in base 2 is added as b log2 e; the least finite numbers, which serve as masks, would
// become -infinity. This is as low as it may be.
template <class C>
constexpr C kLeastBias = static_cast<C>(sizeof(C) == 4 ? -2.3e38 : -1.2e308);
template <class C>
__device__ __forceinline__ C least_bias(C bias) {  // a NaN stays
  const C least = kLeastBias<C>;
  return bias < least ? least : bias;
}

// What the scores of a row need beside its products.
template <class T>
struct RowOptions {
  using C = Compute<T>;
  C slope, diagonal;
  const T* bias;  // null: none

  __device__ __forceinline__ RowOptions(const Scores<T>& x, const Place& at, int b, int h, int t)
      : slope(x.slope(b, h)),
        diagonal(static_cast<C>(at.diagonal(t))),
        bias(x.bias.data && t < at.queries ? x.bias.at(b, h, t) : nullptr) {}

  // The score of key s, which the row sees, from q_t k_s; a bias of -infinity hides the key, and
  // the score is -infinity. Rounded as it is: in one operation with what follows it would have
  // other bits where a tile is partly hidden.
  __device__ __forceinline__ C score(const Scores<T>& x, C dot, int s) const {
    C y = product(dot, x.scale);
    if (x.cap != 0) y = product(x.cap, hyperbolic_tangent_for<T>(y));
    const C distance = diagonal - static_cast<C>(s);
    if (x.slopes) y = fma(-slope, distance < 0 ? -distance : distance, y);
    if (bias) {
      const C added = widen(bias[s * x.bias_key]);
      if (added == C(-INFINITY)) return added;
      y = fma(least_bias(added), C(kBitsPerNat), y);
    }
    return y;
  }
};

// What the weights of a row need: P = factor 2^(score - shift), where shift is lse rounded to C, in
// base 2, and factor makes up for the rounding. A row that sees no key has shift infinity: P = 0.
template <class C>
struct RowFacts {
  C shift, factor, delta;
};

template <class C>
__device__ __forceinline__ RowFacts<C> facts_of(double lse, C delta) {
  if (lse == -INFINITY) return {C(INFINITY), C(1), delta};
  const C shift = static_cast<C>(lse * kBitsPerNat);
  return {shift, static_cast<C>(exp((shift - lse * kBitsPerNat) * kNatsPerBit)), delta};
}

// What a backward pass reads and writes row by row.
template <class T>
struct GradientRows {
  HeadRows<const T> q, k, v, dout;
  HeadRows<T> dq, dk, dv;
};
template <class T>
GradientRows<T> gradient_rows(const AttentionBackward& op) {
  return {head_rows<const T>(op.q),    head_rows<const T>(op.k), head_rows<const T>(op.v),
          head_rows<const T>(op.dout), head_rows<T>(op.dq),      head_rows<T>(op.dk),
          head_rows<T>(op.dv)};
}

// ---- which block takes what

// Blocks of `rows` queries (or keys) of all sequences: a sequence's, one after the other. Ragged
// sequences have at most blocks_of() of them; those behind the last one have nothing to do.
inline int64_t blocks_of(int64_t sequences, int64_t total, bool ragged, int rows) {
  return ragged ? total / rows + sequences : sequences * ceil_div(total, rows);
}

struct BlockPlace {
  int sequence, first;  // sequence < 0: there is no such block
};

// Block i of ragged sequences: a warp adds up the blocks of 32 sequences at a time.
template <int rows>
__device__ __forceinline__ BlockPlace ragged_block(const int32_t* offsets, int64_t step,
                                                   int sequences, int total, int block) {
  const int lane = threadIdx.x % kWarp;
  int before = 0;  // blocks of the sequences before these 32
  for (int from = 0; from < sequences; from += kWarp) {
    const int b = from + lane;
    int blocks = 0;
    if (b < sequences) {
      int begin = offsets[b * step], end = offsets[(b + 1) * step];
      begin = begin < 0 ? 0 : begin > total ? total : begin;
      end = end < begin ? begin : end > total ? total : end;
      blocks = (end - begin + rows - 1) / rows;
    }
    int through = blocks;  // of these up to this one
#pragma unroll
    for (int lanes = 1; lanes < kWarp; lanes *= 2) {
      const int more = __shfl_sync(kAllLanes, through, lane >= lanes ? lane - lanes : lane);
      through += lane >= lanes ? more : 0;
    }
    const unsigned behind = __ballot_sync(kAllLanes, before + through > block);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      const int start = before + __shfl_sync(kAllLanes, through - blocks, found);
      return {from + found, (block - start) * rows};
    }
    before += __shfl_sync(kAllLanes, through, kWarp - 1);
  }
  return {-1, 0};
}

}  // namespace pykern::cuda

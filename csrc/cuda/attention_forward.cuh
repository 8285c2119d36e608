// Forward attention of halves: a block owns 128 queries of a head (64 of wide heads) and walks over
// tiles of 64 keys, a warp owns 32 (16) of the queries.
//   s = q k^T   m, l = running maximum and sum   out = out 2^(m_before - m) + 2^(s - m) v
// Scores, weights and sums stay in registers. Values are under way while scores are multiplied, the
// next keys while values are; tiles that nobody sees are not read.
//
// Bound, per tile of 64 keys, row and processor: 4 x 64 x D products on tensor cores, 64 powers,
// 16 a cycle. mma.sync reaches some 0.62 of Hopper's rate.
#pragma once
#include "cuda/attention_halves.cuh"
#include "cuda/attention_halves.h"

namespace pykern::cuda {

constexpr int kForwardThreads = 128;

template <class T>
struct ForwardHalves {
  Scores<T> scores;
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  Stats lse;
  bool q_words, k_words, v_words, out_words;
  int blocks;  // of a sequence; ragged ones are looked for
};

template <class T, int kD>
struct ForwardTiles {
  static constexpr int kUp = kD <= 128 ? 2 : 1;  // 16 rows each of a warp
  static constexpr int kWarpRows = 16 * kUp, kRows = kForwardThreads / kWarp * kWarpRows;
  Tile<T, kRows, kD> q;  // and then the results
  Tile<T, kKeys, kD> k, v;
  // Of each row maximum and sum so far (the sum of this thread's columns): registers are for scores
  // and results.
  struct {
    float m, l;
  } row[2 * kUp][kForwardThreads];
  uint32_t strange[kKeys / 32];  // which of the values are not finite
};

// s = q k^T of a warp's rows with a tile of keys
template <class T, int kUp, int kD>
__device__ __forceinline__ void multiply_keys(const T* q, const T* k,
                                              float (&s)[kUp][kKeys / 8][4]) {
  const LaneRows<true, kD> down;
  const LaneRows<false, kD> right;
#pragma unroll
  for (int i = 0; i < kUp; ++i)
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int r = 0; r < 4; ++r) s[i][n][r] = 0;
#pragma unroll
  for (int d = 0; d < kD / 16; ++d) {
    uint32_t a[kUp][4];
#pragma unroll
    for (int i = 0; i < kUp; ++i) ldmatrix_x4(a[i], down(q, 16 * i, d));
#pragma unroll
    for (int n = 0; n < kKeys / 16; ++n) {
      uint32_t b[4];
      ldmatrix_x4(b, right(k, 16 * n, d));
#pragma unroll
      for (int i = 0; i < kUp; ++i) {
        multiply(s[i][2 * n], a[i], b[0], b[1], T{});
        multiply(s[i][2 * n + 1], a[i], b[2], b[3], T{});
      }
    }
  }
}

// out += p v
template <class T, int kUp, int kD>
__device__ __forceinline__ void multiply_values(const uint32_t (&p)[kUp][kKeys / 16][4], const T* v,
                                                float (&out)[kUp][kD / 8][4]) {
  const LaneRows<true, kD> down;
#pragma unroll
  for (int key = 0; key < kKeys / 16; ++key)
#pragma unroll
    for (int e = 0; e < kD / 16; ++e) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, down(v, 16 * key, e));
#pragma unroll
      for (int i = 0; i < kUp; ++i) {
        multiply(out[i][2 * e], p[i][key], b[0], b[1], T{});
        multiply(out[i][2 * e + 1], p[i][key], b[2], b[3], T{});
      }
    }
}

// The scores of a row's keys in this lane's columns, from their products: s[n][r] is that of key
// first + 8 n + r, which the row sees where has(word, n, r). A bias of -infinity hides a key.
template <class T>
__device__ __forceinline__ void finish_scores(const Scores<T>& x, const Place& at, int b, int h,
                                              int t, int first, uint64_t word,
                                              float (&s)[kKeys / 8][2]) {
  const auto each = [&](const auto& body) {
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) body(s[n][r], n, r);
  };
  each([&](float& y, int, int) { y *= x.scale; });
  if (x.cap != 0) each([&](float& y, int, int) { y = x.cap * hyperbolic_tangent_for<T>(y); });
  if (x.slopes) {
    const float slope = -x.slope(b, h);
    const float distance = static_cast<float>(at.diagonal(t) - first);
    each([&](float& y, int n, int r) {
      y = fmaf(slope, fabsf(distance - static_cast<float>(8 * n + r)), y);
    });
  }
  if (x.bias.data) {
    const T* bias = x.bias.at(b, h, t) + first * x.bias_key;
    each([&](float& y, int n, int r) {
      const float added = has(word, n, r) ? widen(bias[(8 * n + r) * x.bias_key]) : -INFINITY;
      y = added == -INFINITY ? added : fmaf(least_bias(added), float(kBitsPerNat), y);
    });
  }
}

template <class Join>
__device__ __forceinline__ float across_quad(float x, Join join) {
  return across_lanes<4>(x, join);
}

// Values that are not finite, of keys that query t sees, into its columns of out: a warp, where
// they were replaced before they were multiplied.
template <class T>
__device__ __forceinline__ void restore_strange(const ForwardHalves<T>& a, const Place& at, int b,
                                                int h, int t) {
  const Scores<T>& x = a.scores;
  T* out = a.out.at(at.batch, h, at.q_row + t);
#pragma unroll 1
  for (int e = threadIdx.x % kWarp; e < x.E; e += kWarp) {
    float strange = 0;
    for (int key = x.first_key(at, t); key < x.end_key(at, t); ++key) {
      const T v = a.v.at(at.batch, h / x.group, at.k_row + key)[e];
      if (!is_finite(v) && (x.visible(at, b, h, t, key / kKeys) >> key % kKeys & 1) != 0 &&
          unbiased(x, b, h, t, key))
        strange += widen(v);
    }
    if (strange != 0) out[e] = narrow<T>(strange);
  }
}

template <class T, int kD, bool kPlain>
__global__ void __launch_bounds__(kForwardThreads, 2)
    attention_forward_halves(const ForwardHalves<T> a) {
  using Tiles = ForwardTiles<T, kD>;
  constexpr int kUp = Tiles::kUp, kRows = Tiles::kRows, kWide = kKeys / 8,
                kThreads = kForwardThreads;
  auto& shared = shared_memory<Tiles>();
  const Scores<T>& x = a.scores;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;

  // Which queries: the last ones first, since causal ones see the most keys.
  const int h = static_cast<int>(blockIdx.x % x.H), rest = static_cast<int>(blockIdx.x / x.H);
  BlockPlace mine{rest % x.sequences, (a.blocks - 1 - rest / x.sequences) * kRows};
  if (x.cu_q) mine = ragged_block<kRows>(x.cu_q, x.cu_q_step, x.sequences, x.queries, rest);
  if (mine.sequence < 0) return;
  const int b = mine.sequence, first = mine.first;
  const Place at = x.place(b);
  if (first >= at.queries) return;
  const int last = (first + kRows < at.queries ? first + kRows : at.queries) - 1;
  const auto row_of = [&](int i, int half) {
    return warp * Tiles::kWarpRows + 16 * i + 8 * half + lane / 4;
  };

  const int end = (x.end_key(at, last) + kKeys - 1) / kKeys;
  int tile = x.first_key(at, first) / kKeys, found = kHidden;
  const auto seek = [&](int from) {  // the next tile of which something is seen
    for (tile = from; tile < end; ++tile)
      if ((found = x.look(at, b, h, first, last, tile)) != kHidden) break;
  };
  seek(tile);

  const int g = h / x.group;
  const Fetch<T, decltype(shared.q), kThreads> fetch_q(a.q.at(at.batch, h, at.q_row), a.q.row, x.D,
                                                       a.q_words);
  const auto fetch = [&](const HeadRows<const T>& rows, int width, bool words, auto& to) {
    // kept(): the address is computed again, instead of in registers all the time
    Fetch<T, Tile<T, kKeys, kD>, kThreads>(rows.at(at.batch, kept(g), at.k_row), rows.row, width,
                                           words)(to, tile * kKeys, at.keys);
  };
  const T* q = shared.q.of + warp * Tiles::kWarpRows * kD;

  float out[kUp][kD / 8][4] = {};
  for (int i = 0; i < 2 * kUp; ++i) shared.row[i][threadIdx.x] = {-INFINITY, 0};
  const float factor = kPlain ? x.scale : 1.0f;  // of m and of what is kept of scores
  int seen_strange = 0;  // bit 2 i + half: by that row, in a tile where it was replaced
  if (threadIdx.x < 2) shared.strange[threadIdx.x] = 0;

  fetch_q(shared.q, first, last + 1);
  if (tile < end) fetch(a.k, x.D, a.k_words, shared.k);
  cp_async_commit();
  while (tile < end) {
    const int now = tile;
    const bool partial = (found & kHidden) != 0;
    cp_async_wait<0>();
    __syncthreads();  // the keys are there, the values before have been read
    fetch(a.v, x.E, a.v_words, shared.v);
    cp_async_commit();
    float s[kUp][kWide][4];
    multiply_keys<T, kUp, kD>(q, shared.k.of, s);
    cp_async_wait<0>();
    __syncthreads();  // the values are there, the keys have been read
    seek(now + 1);
    if (tile < end) fetch(a.k, x.D, a.k_words, shared.k);
    cp_async_commit();

    uint32_t p[kUp][kKeys / 16][4];  // weights, as a left factor
#pragma unroll
    for (int i = 0; i < kUp; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int t = first + row_of(i, half);
        float y[kWide][2];
#pragma unroll
        for (int n = 0; n < kWide; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) y[n][r] = s[i][n][2 * half + r];
        if (partial || !kPlain) {
          const uint64_t word = of_lane(x.visible(at, b, h, t, now));
          if constexpr (!kPlain) finish_scores(x, at, b, h, t, now * kKeys + lane % 4 * 2, word, y);
#pragma unroll
          for (int n = 0; n < kWide; ++n)
#pragma unroll
            for (int r = 0; r < 2; ++r)
              if (!has(word, n, r)) y[n][r] = -INFINITY;
        }
        auto& row = shared.row[2 * i + half][threadIdx.x];
        const float before = row.m;
        float top = before;
#pragma unroll
        for (int n = 0; n < kWide; ++n) top = fmaxf(top, fmaxf(y[n][0], y[n][1]));
        top = across_quad(top, Larger());
        const float base = top == -INFINITY ? 0.0f : top * factor;  // no key seen so far
        const float rescale = exp2_approx(before * factor - base);
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kWide; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            y[n][r] = exp2_approx(fmaf(y[n][r], factor, -base));
            sum += y[n][r];
          }
        row = {top, row.l * rescale + sum};
        if constexpr (!kPlain) {
          if (x.dropout.threshold != 0) {
            const uint64_t kept = kept_of_lane(x, b, h, t, now);
            const float grown = static_cast<float>(x.dropout.factor);
#pragma unroll
            for (int n = 0; n < kWide; ++n)
#pragma unroll
              for (int r = 0; r < 2; ++r) y[n][r] = has(kept, n, r) ? y[n][r] * grown : 0.0f;
          }
        }
#pragma unroll
        for (int n = 0; n < kWide; ++n)  // pieces of s as left_factors() has them
          p[i][n / 2][n % 2 * 2 + half] = rounded_pair<T>(y[n][0], y[n][1]);
#pragma unroll
        for (int e = 0; e < kD / 8; ++e)
#pragma unroll
          for (int r = 0; r < 2; ++r) out[i][e][2 * half + r] *= rescale;
      }

    if (partial || !kPlain) {
      find_strange<kThreads>(shared.v, shared.strange);
      __syncthreads();
      const uint64_t strange = shared.strange[0] | uint64_t{shared.strange[1]} << 32;
      if (strange != 0) {  // rare
        for (int i = 0; i < 2 * kUp; ++i)
          if (x.visible(at, b, h, first + row_of(i / 2, i % 2), now) & strange)
            seen_strange |= 1 << i;
        replace_strange<kThreads>(shared.v);
        if (threadIdx.x < 2) shared.strange[threadIdx.x] = 0;
      }
    }
    multiply_values<T, kUp, kD>(p, shared.v.of, out);
  }

  // out / l, by way of the tile of the warp's queries, so that rows are written 16 bytes at a time
  cp_async_wait<0>();
  const Place to = x.place(kept(b));  // again, instead of in registers all the time
#pragma unroll
  for (int i = 0; i < kUp; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(i, half), t = first + row;
      const auto& so_far = shared.row[2 * i + half][threadIdx.x];
      const float sum = across_quad(so_far.l, Add());
      const float shift = so_far.m * factor, sink = x.sink(h);
      const float base = fmaxf(shift, sink), before = base == -INFINITY ? 0.0f : base;
      const float scale = exp2_approx(shift - before);
      const float total = sum * scale + exp2_approx(sink - before);
      const float inverse = total == 0 ? 0.0f : scale * rcp_approx(total);
#pragma unroll
      for (int e = 0; e < kD / 8; ++e)
        *reinterpret_cast<uint32_t*>(shared.q.chunk(row, e) + lane % 4 * 2) =
            rounded_pair<T>(out[i][e][2 * half] * inverse, out[i][e][2 * half + 1] * inverse);
      if (a.lse.data && t <= last && lane % 4 == 0)
        a.lse.set(to.batch, h, to.q_row + t,
                  total == 0 ? -INFINITY : (double(base) + log2f(total)) * kNatsPerBit);
    }
  __syncwarp();
#pragma unroll 1
  for (int i = lane; i < Tiles::kWarpRows * (kD / kChunk); i += kWarp) {
    const int row = warp * Tiles::kWarpRows + i / (kD / kChunk), c = i % (kD / kChunk);
    const int valid = x.E - c * kChunk;
    if (first + row > last || valid <= 0) continue;
    float v[kChunk];
    load(shared.q.chunk(row, c), kChunk, true, v);
    store(a.out.at(to.batch, h, to.q_row + first + row) + c * kChunk, valid, a.out_words, v);
  }
  if (!__any_sync(kAllLanes, seen_strange != 0)) return;
  __syncwarp();
#pragma unroll 1
  for (int row = 0; row < Tiles::kWarpRows; ++row) {
    const int which = __shfl_sync(kAllLanes, seen_strange, row % 8 * 4);
    const int t = first + warp * Tiles::kWarpRows + row;
    if (which >> row / 8 & 1) restore_strange(a, to, b, h, t);
  }
}

template <class T>
void halves_forward(const AttentionForward& op, const Scores<T>& x, Stream stream) {
  const bool ragged = x.cu_q != nullptr;
  const auto start = [&]<int kD, bool plain>() {
    constexpr int kRows = ForwardTiles<T, kD>::kRows;
    const int64_t blocks = blocks_of(x.sequences, x.queries, ragged, kRows);
    const ForwardHalves<T> a{.scores = x,
                             .q = head_rows<const T>(op.q),
                             .k = head_rows<const T>(op.k),
                             .v = head_rows<const T>(op.v),
                             .out = head_rows<T>(op.out),
                             .lse = stats_of(op.lse),
                             .q_words = takes_packs<T>(op.q),
                             .k_words = takes_packs<T>(op.k),
                             .v_words = takes_packs<T>(op.v),
                             .out_words = takes_packs<T>(op.out),
                             .blocks = static_cast<int>(ceil_div(x.queries, kRows))};
    launch("attention_forward", attention_forward_halves<T, kD, plain>,
           Grid{.blocks = dim3(blocks * x.H),
                .threads = dim3(kForwardThreads),
                .shared = sizeof(ForwardTiles<T, kD>)},
           stream, a);
  };
  const auto with_width = [&]<bool plain>() {
    const int width = x.D > x.E ? x.D : x.E;
    if (width <= 64) return start.template operator()<64, plain>();
    if (width <= 128) return start.template operator()<128, plain>();
    return start.template operator()<256, plain>();
  };
  if (x.plain())
    with_width.template operator()<true>();
  else
    with_width.template operator()<false>();
}

}  // namespace pykern::cuda

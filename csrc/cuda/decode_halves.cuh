// Decode of halves by mma.sync: a block has 16 rows of a key head and a part of its keys, a warp
// every so manieth tile of 16 keys, with a ring of its own under way by cp.async, a maximum and
// sums of its own: warps meet when the part is at its end.
//
//   s [16 rows, 16 keys] = q k^T     o [16 rows, E] += p v
#pragma once
#include "cuda/decode.cuh"
#include "cuda/gemm_halves.cuh"

namespace pykern::cuda {

constexpr int kDecodeRows = 16, kDecodeKeys = 16;  // of a tile: those of one mma

// Of heads up to kWidth. Two or three blocks run on a processor, so 64 to 200 KB are asked for
// while others are multiplied; a block has at most 96 KB, as every GPU from sm_80 on allows.
template <int kWidth>
struct DecodeShape {
  static constexpr int kWarps = kWidth == 256 ? 2 : 4;
  static constexpr int kStages = kWidth == 64 ? 4 : kWidth == 128 ? 3 : 2;
};

template <class T, int kWidth>
struct HalvesShared {
  using Sums = WarpSums<float, kDecodeRows, kWidth>;
  struct Stage {
    T k[kDecodeKeys * kWidth], v[kDecodeKeys * kWidth];
  };
  union alignas(128) OfWarp {
    Stage stage[DecodeShape<kWidth>::kStages];
    Sums sums;
  };
  OfWarp warp[DecodeShape<kWidth>::kWarps];
  uint4 queries[kWidth == 256 ? kWidth / 16 * kWarp : 1];  // fragments, where registers are few
  BlockShared block;
};

__device__ __forceinline__ uint32_t pair_bits(float a, float b, bf16) { return bf16_pair(a, b); }
__device__ __forceinline__ uint32_t pair_bits(float a, float b, f16) { return f16_pair(a, b); }

// Two halves, of which those that are infinite or NaN are 0
template <class T>
__device__ __forceinline__ uint32_t finite_halves(uint32_t word) {
  constexpr uint32_t exponent = std::is_same_v<T, bf16> ? 0x7f80 : 0x7c00;
  if ((word & exponent) == exponent) word &= 0xffff0000;
  if ((word >> 16 & exponent) == exponent) word &= 0xffff;
  return word;
}

// Lines of 16-byte chunks, permuted so that eight that ldmatrix reads at once are in different
// banks.
template <int kWidth>
__device__ __forceinline__ int in_tile(int key, int chunk) {
  return key * kWidth + (chunk ^ key % 8) * kChunk;
}

// A warp asks for the keys and values of a tile; behind `end`, and up to the next 16 columns, 0.
template <class T, int kWidth>
__device__ __forceinline__ void fetch_tile(const Decode<T>& a, const Task& task, int padding,
                                           int first, int end,
                                           typename HalvesShared<T, kWidth>::Stage& stage) {
  constexpr int kChunks = kWidth / kChunk, kTogether = kWarp / kChunks;
  const int lane = threadIdx.x % kWarp, chunk = lane % kChunks, column = chunk * kChunk;
  const int D = a.scores.D, E = a.scores.E;
  const auto valid = [&](int width) {
    return width <= column ? 0 : width - column < kChunk ? width - column : kChunk;
  };
  const int k_valid = valid(D), v_valid = valid(E);
  const bool k_wanted = column < (D + 15) / 16 * 16, v_wanted = column < (E + 15) / 16 * 16;
  const auto move = [&](const T* from, T* to, int there, bool vectors) {
    if (vectors) {
      cp_async16(to, from, there * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) to[j] = j < there ? from[j] : T{};
    }
  };
  const Slots::At start = a.slots.at(task.b, padding + first);
  const bool together = a.slots.together(start, kDecodeKeys);
#pragma unroll
  for (int i = 0; i < kDecodeKeys; i += kTogether) {
    const int key = i + lane / kChunks;
    const bool there = first + key < end;
    Slots::At at{start.batch, start.row + key};
    if (!together && there) at = a.slots.at(task.b, padding + first + key);
    const T* k = there ? a.k.at(at.batch, task.g, at.row) + column : a.k.data;
    const T* v = there ? a.v.at(at.batch, task.g, at.row) + column : a.v.data;
    if (k_wanted) move(k, stage.k + in_tile<kWidth>(key, chunk), there ? k_valid : 0, a.k_vectors);
    if (v_wanted) move(v, stage.v + in_tile<kWidth>(key, chunk), there ? v_valid : 0, a.v_vectors);
  }
}

// Queries d and d + 1 of a row
template <class T>
__device__ __forceinline__ uint32_t query_pair(const T* q, int d, int D, bool pairs) {
  if (pairs && d + 1 < D) return *reinterpret_cast<const uint32_t*>(q + d);
  const uint32_t low = d < D ? q[d].bits : 0, high = d + 1 < D ? q[d + 1].bits : 0;
  return low | high << 16;
}

// The sums of a warp's 16 rows: a lane has rows lane / 4 and lane / 4 + 8, of 16 keys or of 8
// columns two neighbours each.
template <class T, int kWidth>
class HalvesSums {
  static constexpr int kSteps = kWidth / 16;

 public:
  __device__ __forceinline__ HalvesSums(const Decode<T>& a, const Task& task) : a_(a), task_(task) {
    o_ = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = threadIdx.x % kWarp / 4 + 8 * i, t = task.t(a, row);
      first_[i] = a.scores.first_key(task.at, t), end_[i] = a.scores.end_key(task.at, t);
    }
    all_from_ = a.scores.first_key(task.at, task.t(a, task.rows - 1));
    all_to_ = a.scores.end_key(task.at, task.t(a, 0));
  }

  // Adds the tile at key `first`.
  template <class Query>
  __device__ __forceinline__ void add(const typename HalvesShared<T, kWidth>::Stage& stage,
                                      int first, const Query& query) {
    const int lane = threadIdx.x % kWarp;
    const bool whole = first >= all_from_ && first + kDecodeKeys <= all_to_;
    float p[2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (16 * k >= a_.scores.D) break;
      uint32_t q[4], keys[4];
      query(k, q);
      ldmatrix_x4(keys, stage.k + in_tile<kWidth>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      multiply(p[0], q, keys[0], keys[1], T{});
      multiply(p[1], q, keys[2], keys[3], T{});
    }
    bool moved = false;
    float rescale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      rescale[i] = weigh(p, i, first, whole);
      moved = moved || rescale[i] != 1;
    }
    if (__any_sync(kAllLanes, moved)) {
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) o_.of[j][i] *= rescale[i / 2];
    }
    const uint32_t weights[4] = {pair_bits(p[0][0], p[0][1], T{}), pair_bits(p[0][2], p[0][3], T{}),
                                 pair_bits(p[1][0], p[1][1], T{}),
                                 pair_bits(p[1][2], p[1][3], T{})};
    const auto values = [&](int e, uint32_t (&v)[4]) {
      ldmatrix_x4_trans(v, stage.v + in_tile<kWidth>(lane % 16, 2 * e + lane / 16));
    };
    // 0 times infinity would be NaN: a row that does not see such a value must not multiply it
    bool odd = false;
    if (!whole) {
#pragma unroll
      for (int e = 0; e < kSteps; ++e) {
        if (16 * e >= a_.scores.E) break;
        uint32_t v[4];
        values(e, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) odd = odd || finite_halves<T>(v[i]) != v[i];
      }
      odd = __any_sync(kAllLanes, odd);
    }
#pragma unroll
    for (int e = 0; e < kSteps; ++e) {
      if (16 * e >= a_.scores.E) break;
      uint32_t v[4];
      values(e, v);
      if (odd) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = finite_halves<T>(v[i]);
      }
      multiply(o_.of[2 * e], weights, v[0], v[1], T{});
      multiply(o_.of[2 * e + 1], weights, v[2], v[3], T{});
    }
    if (odd) add_odd(stage, first, weights);
  }

  __device__ __forceinline__ void leave(typename HalvesShared<T, kWidth>::Sums& to) const {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      const float l = across_lanes<4>(l_[i], Add{});
      if (lane % 4 == 0) to.m[row] = m_[i], to.l[row] = l;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) to.out[row][8 * j + lane % 4 * 2 + c] = o_.of[j][2 * i + c];
    }
  }

 private:
  struct Sums {
    float of[kWidth / 8][4];
  };

  // Products with row i become weights; returns the factor of what came before.
  __device__ __forceinline__ float weigh(float (&p)[2][4], int i, int first, bool whole) {
    const int lane = threadIdx.x % kWarp, row = lane / 4 + 8 * i;
    float top = -INFINITY;
    const auto each = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) body(p[n][2 * i + c], first + 8 * n + lane % 4 * 2 + c);
    };
    if (a_.scores.plain()) {
      each([&](float& x, int) { x *= a_.scores.scale; });
    } else {
      const RowOptions<T> options(a_.scores, task_.at, task_.b, task_.h(a_, row), task_.t(a_, row));
      each([&](float& x, int key) { x = options.score(a_.scores, x, key); });
    }
    each([&](float& x, int key) {
      if (!whole && (key < first_[i] || key >= end_[i])) x = -INFINITY;
      top = larger(top, x);
    });
    const float m = larger(m_[i], across_lanes<4>(top, Larger{}));
    const float base = m == -INFINITY ? 0 : m;  // no key seen so far: all weights are 0
    const float rescale = power2(m_[i] - base);
    float sum = 0;
    each([&](float& x, int) { sum += x = power2(x - base); });
    l_[i] = fma(l_[i], rescale, sum);
    m_[i] = m;
    return rescale;
  }

  // The values that the product left out, for the rows that see them.
  __device__ __forceinline__ void add_odd(const typename HalvesShared<T, kWidth>::Stage& stage,
                                          int first, const uint32_t (&weights)[4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll 1
    for (int key = 0; key < kDecodeKeys; ++key) {
      float p[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = __shfl_sync(kAllLanes, key < 8 ? weights[i] : weights[2 + i],
                                          (lane & ~3) + key % 8 / 2);
        p[i] = widen(T{static_cast<uint16_t>(key % 2 ? pair >> 16 : pair)});
      }
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j) {
        if (8 * j >= a_.scores.E) break;
        const uint32_t word =
            *reinterpret_cast<const uint32_t*>(stage.v + in_tile<kWidth>(key, j) + lane % 4 * 2);
        const uint32_t odd = word & ~finite_halves<T>(word);
        if (finite_halves<T>(word) == word) continue;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const T half{static_cast<uint16_t>(odd >> 16 * c)};
#pragma unroll
          for (int i = 0; i < 2; ++i)
            if (half.bits != 0 && first + key >= first_[i] && first + key < end_[i])
              o_.of[j][2 * i + c] = fma(p[i], widen(half), o_.of[j][2 * i + c]);
        }
      }
    }
  }

  const Decode<T>& a_;
  const Task& task_;
  Sums o_;
  float m_[2] = {-INFINITY, -INFINITY}, l_[2] = {};  // l: of this lane's keys
  int first_[2], end_[2];                            // the keys that a row sees
  int all_from_, all_to_;                            // those that all rows see
};

template <class T, int kWidth>
__global__ void __launch_bounds__(DecodeShape<kWidth>::kWarps* kWarp, 2)
    decode_halves(const Decode<T> a) {
  constexpr int kWarps = DecodeShape<kWidth>::kWarps, kStages = DecodeShape<kWidth>::kStages;
  constexpr int kSteps = kWidth / 16;
  constexpr bool kQueriesShared = kWidth == 256;
  auto& shared = shared_memory<HalvesShared<T, kWidth>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = blockIdx.x / a.tasks;
  const Task task(a, blockIdx.x - split * a.tasks, kDecodeRows);
  if (split >= task.parts) return;
  const int padding = a.padding.at(task.b);
  auto& own = shared.warp[warp];

  // the queries as left factors
  uint32_t held[kQueriesShared ? 1 : kSteps][4];
  const auto read_queries = [&] {
    const T* q[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      q[i] = a.q.at(task.b, task.h(a, lane / 4 + 8 * i), task.t(a, lane / 4 + 8 * i));
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (16 * k >= a.scores.D || (kQueriesShared && k % kWarps != warp)) continue;
      uint32_t r[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        r[i] = query_pair(q[i % 2], 16 * k + i / 2 * 8 + lane % 4 * 2, a.scores.D, a.q_pairs);
      if constexpr (kQueriesShared) {
        shared.queries[k * kWarp + lane] = {r[0], r[1], r[2], r[3]};
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) held[k][i] = r[i];
      }
    }
    if (kQueriesShared) __syncthreads();
  };
  const auto query = [&](int k, uint32_t (&r)[4]) {
    if constexpr (kQueriesShared) {
      const uint4 word = shared.queries[k * kWarp + lane];
      r[0] = word.x, r[1] = word.y, r[2] = word.z, r[3] = word.w;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) r[i] = held[k][i];
    }
  };
  if (task.at.keys >= 0) read_queries();

  const auto sum = [&](int begin, int end) {
    constexpr int kStep = kWarps * kDecodeKeys;
    // this warp's first tile: tiles are dealt by their place
    const int tile = begin / kDecodeKeys;
    const int start = (tile + (warp + kWarps - tile % kWarps) % kWarps) * kDecodeKeys;
    HalvesSums<T, kWidth> sums(a, task);
    const auto fetch = [&](int first, int stage) {
      if (first < end) fetch_tile<T, kWidth>(a, task, padding, first, end, own.stage[stage]);
      cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(start + i * kStep, i);
    int stage = 0;
    for (int first = start; first < end; first += kStep) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // the tile is there for all lanes, and all have read the one before
      fetch(first + (kStages - 1) * kStep, stage == 0 ? kStages - 1 : stage - 1);
      sums.add(own.stage[stage], first, query);
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    __syncwarp();  // the ring has been read: the sums take its place
    sums.leave(own.sums);
  };
  const auto sums_of = [&](int w) -> const auto& { return shared.warp[w].sums; };
  take_parts<kWarps>(a, task, split, shared.block, sum, sums_of);
}

}  // namespace pykern::cuda

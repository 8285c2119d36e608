// Decode of halves by mma.sync: a block has 16 to 64 rows of a key head and a part of its keys, a
// warp every so manieth tile of 16 keys, with a ring of its own under way by cp.async, maxima and
// sums of its own: warps meet when the part is at its end.
//
//   s [rows, 16 keys] = q k^T     o [rows, E] += p v
#pragma once
#include "cuda/decode_ring.cuh"

namespace pykern::cuda {

// Heads up to kWidth, kTiles tiles of rows. More rows at a time read the keys less often, but their
// sums are all the registers that there are for them: 256 numbers a row of lanes, and the queries
// stay in shared memory. Two or three blocks run on a processor, so 64 to 200 KB are asked for
// while others are multiplied.
template <int kWidth, int kTiles>
struct DecodeShape {
  static constexpr int kRows = kTile * kTiles;
  static constexpr bool kFull = kWidth * kTiles == 256;
  static constexpr int kWarps = kWidth == 256 ? 2 : 4;
  static constexpr int kStages = kWidth == 64 ? 4 : kWidth == 128 && !kFull ? 3 : 2;
  static constexpr int kThreads = kWarps * kWarp;
};

template <class T, int kWidth, int kTiles, bool kInt8>
struct HalvesShared {
  using Shape = DecodeShape<kWidth, kTiles>;
  using Sums = WarpSums<float, Shape::kRows, kWidth>;
  using Ring = std::conditional_t<kInt8, Int8Ring<T, kWidth, Shape::kStages>,
                                  HalvesRing<T, kWidth, Shape::kStages>>;
  union alignas(128) OfWarp {
    typename Ring::Memory ring;
    Sums sums;
  };
  OfWarp warp[Shape::kWarps];
  uint4 queries[Shape::kFull ? kTiles * kWidth / kTile * kWarp : 1];  // fragments
  BlockShared block;
};

// Queries d and d + 1 of a row
template <class T>
__device__ __forceinline__ uint32_t query_pair(const T* q, int d, int D, bool pairs) {
  if (pairs && d + 1 < D) return *reinterpret_cast<const uint32_t*>(q + d);
  const uint32_t low = d < D ? q[d].bits : 0, high = d + 1 < D ? q[d + 1].bits : 0;
  return low | high << 16;
}

// The sums of a warp's rows: of each tile a lane has rows lane / 4 and lane / 4 + 8, of 16 keys or
// of 8 columns two neighbours each.
template <class T, int kWidth, int kTiles>
class HalvesSums {
  using Stage = KeyTile<T, kWidth>;
  using Sums = WarpSums<float, kTile * kTiles, kWidth>;
  static constexpr int kSteps = kWidth / kTile;

 public:
  __device__ __forceinline__ HalvesSums(const Decode<T>& a, const Task& task)
      : a_(a),
        task_(task),
        all_from_(a.scores.first_key(task.at, task.t(a, task.rows - 1))),
        all_to_(a.scores.end_key(task.at, task.t(a, 0))) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) m_[i][r] = -INFINITY, l_[i][r] = 0;
  }

  // Adds the tile at key `first`; query(i, k, fragment) of tile i of rows and step k; scales of the
  // keys and values, see decode_ring.cuh.
  template <class Query, class Scales>
  __device__ __forceinline__ void add(const Stage& stage, int first, const Query& query,
                                      const Scales& scales) {
    const int lane = threadIdx.x % kWarp;
    const bool whole = first >= all_from_ && first + kTile <= all_to_;
    float p[kTiles][2][4] = {};
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      if (kTile * k >= a_.scores.D) break;
      uint32_t keys[4];
      ldmatrix_x4(keys, stage.k + in_tile<kWidth>(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
      each_tile([&](int i) {
        uint32_t q[4];
        query(i, k, q);
        multiply(p[i][0], q, keys[0], keys[1], T{});
        multiply(p[i][1], q, keys[2], keys[3], T{});
      });
    }
    uint32_t weights[kTiles][4];
    each_tile([&](int i) {
      float rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) rescale[r] = weigh(p[i], i, r, first, whole, scales);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        weights[i][j] = rounded_pair<T>(p[i][j / 2][j % 2 * 2], p[i][j / 2][j % 2 * 2 + 1]);
      if (!__any_sync(kAllLanes, rescale[0] != 1 || rescale[1] != 1)) return;
#pragma unroll
      for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) o_[i][j][c] *= rescale[c / 2];
    });
    const auto values = [&](int e, uint32_t (&v)[4]) {
      ldmatrix_x4_trans(v, stage.v + in_tile<kWidth>(lane % 16, 2 * e + lane / 16));
    };
    // 0 times infinity would be NaN: a row that does not see such a value must not multiply it
    bool odd = false;
    if (!whole) {
#pragma unroll
      for (int e = 0; e < kSteps; ++e) {
        if (kTile * e >= a_.scores.E) break;
        uint32_t v[4];
        values(e, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) odd = odd || finite_halves<T>(v[i]) != v[i];
      }
      odd = __any_sync(kAllLanes, odd);
    }
#pragma unroll
    for (int e = 0; e < kSteps; ++e) {
      if (kTile * e >= a_.scores.E) break;
      uint32_t v[4];
      values(e, v);
      if (odd) {
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = finite_halves<T>(v[i]);
      }
      each_tile([&](int i) {
        multiply(o_[i][2 * e], weights[i], v[0], v[1], T{});
        multiply(o_[i][2 * e + 1], weights[i], v[2], v[3], T{});
      });
    }
    if (odd) each_tile([&](int i) { add_odd(stage, first, i, weights[i]); });
  }

  __device__ __forceinline__ void leave(Sums& to) const {
    const int lane = threadIdx.x % kWarp;
    each_tile([&](int i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int row = row_of(i, r);
        const float l = across_lanes<4>(l_[i][r], Add{});
        if (lane % 4 == 0) to.m[row] = m_[i][r], to.l[row] = l;
#pragma unroll
        for (int j = 0; j < kWidth / 8; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c) to.out[row][8 * j + lane % 4 * 2 + c] = o_[i][j][2 * r + c];
      }
    });
  }

 private:
  // body(i) for the tiles that have a row
  template <class Body>
  __device__ __forceinline__ void each_tile(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i > 0 && kTile * i >= task_.rows) break;
      body(i);
    }
  }
  __device__ __forceinline__ static int row_of(int i, int r) {
    return kTile * i + threadIdx.x % kWarp / 4 + 8 * r;
  }

  // Products with half r of a tile become weights; returns the factor of what came before.
  template <class Scales>
  __device__ __forceinline__ float weigh(float (&p)[2][4], int i, int r, int first, bool whole,
                                         const Scales& scales) {
    const int lane = threadIdx.x % kWarp;
    const auto each = [&](const auto& body) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) body(p[n][2 * r + c], first + 8 * n + lane % 4 * 2 + c);
    };
    scales.of_keys([&](int n, int c, float scale) { p[n][2 * r + c] *= scale; });
    if (a_.scores.plain()) {
      each([&](float& x, int) { x *= a_.scores.scale; });
    } else {
      const int t = task_.t(a_, row_of(i, r)), h = task_.h(a_, row_of(i, r));
      const RowOptions<T> options(a_.scores, task_.at, task_.b, h, t);
      each([&](float& x, int key) { x = options.score(a_.scores, x, key); });
    }
    if (!whole) {
      const int t = task_.t(a_, row_of(i, r));
      const int from = a_.scores.first_key(task_.at, t), to = a_.scores.end_key(task_.at, t);
      each([&](float& x, int key) { x = key < from || key >= to ? -INFINITY : x; });
    }
    float top = -INFINITY;
    each([&](float& x, int) { top = larger(top, x); });
    const float m = larger(m_[i][r], across_lanes<4>(top, Larger{}));
    const float base = m == -INFINITY ? 0 : m;  // no key seen so far: all weights are 0
    const float rescale = power2(m_[i][r] - base);
    float sum = 0;
    each([&](float& x, int) { sum += x = power2(x - base); });
    l_[i][r] = fma(l_[i][r], rescale, sum);
    m_[i][r] = m;
    scales.of_values([&](int n, int c, float scale) {
      float& x = p[n][2 * r + c];
      x = !whole && x == 0 ? 0 : x * scale;  // a key that is not seen may have a scale of NaN
    });
    return rescale;
  }

  // The values that the products of tile i left out, for the rows that see them.
  __device__ __forceinline__ void add_odd(const Stage& stage, int first, int i,
                                          const uint32_t (&weights)[4]) {
    const int lane = threadIdx.x % kWarp;
    int from[2], to[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int t = task_.t(a_, row_of(i, r));
      from[r] = a_.scores.first_key(task_.at, t), to[r] = a_.scores.end_key(task_.at, t);
    }
#pragma unroll 1
    for (int key = 0; key < kTile; ++key) {
      float p[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t pair = __shfl_sync(kAllLanes, key < 8 ? weights[r] : weights[2 + r],
                                          (lane & ~3) + key % 8 / 2);
        p[r] = widen(T{static_cast<uint16_t>(key % 2 ? pair >> 16 : pair)});
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
          for (int r = 0; r < 2; ++r)
            if (half.bits != 0 && first + key >= from[r] && first + key < to[r])
              o_[i][j][2 * r + c] = fma(p[r], widen(half), o_[i][j][2 * r + c]);
        }
      }
    }
  }

  const Decode<T>& a_;
  const Task& task_;
  float o_[kTiles][kWidth / 8][4] = {};
  float m_[kTiles][2], l_[kTiles][2];  // l: of this lane's keys
  const int all_from_, all_to_;        // the keys that all rows see
};

template <class T, int kWidth, int kTiles, bool kInt8>
__global__ void __launch_bounds__(DecodeShape<kWidth, kTiles>::kThreads, 2)
    decode_halves(const Decode<T> a) {
  using Shape = DecodeShape<kWidth, kTiles>;
  using Shared = HalvesShared<T, kWidth, kTiles, kInt8>;
  constexpr int kWarps = Shape::kWarps, kStages = Shape::kStages, kSteps = kWidth / kTile;
  auto& shared = shared_memory<Shared>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = blockIdx.x / a.tasks;
  const Task task(a, blockIdx.x - split * a.tasks, Shape::kRows);
  if (split >= task.parts) return;
  const int padding = a.padding.at(task.b);
  auto& own = shared.warp[warp];

  // The queries as left factors: of one tile each warp has all, of several they are shared.
  uint32_t held[Shape::kFull ? 1 : kSteps][4];
  const auto read_query = [&](int i, int k, uint32_t (&r)[4]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = kTile * i + lane / 4 + 8 * half;
      const T* q = a.q.at(task.b, task.h(a, row), task.t(a, row));
#pragma unroll
      for (int side = 0; side < 2; ++side)
        r[half + 2 * side] =
            query_pair(q, kTile * k + 8 * side + lane % 4 * 2, a.scores.D, a.q_pairs);
    }
  };
  if (task.at.keys >= 0) {
    if constexpr (Shape::kFull) {
#pragma unroll 1
      for (int place = warp; place < kTiles * kSteps; place += kWarps) {
        uint32_t r[4];
        read_query(place / kSteps, place % kSteps, r);
        shared.queries[place * kWarp + lane] = {r[0], r[1], r[2], r[3]};
      }
      __syncthreads();
    } else {
#pragma unroll
      for (int k = 0; k < kSteps; ++k) read_query(0, k, held[k]);
    }
  }
  const auto query = [&](int i, int k, uint32_t (&r)[4]) {
    if constexpr (Shape::kFull) {
      const uint4 word = shared.queries[(i * kSteps + k) * kWarp + lane];
      r[0] = word.x, r[1] = word.y, r[2] = word.z, r[3] = word.w;
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) r[j] = held[k][j];
    }
  };

  const auto sum = [&](int begin, int end) {
    constexpr int kStep = kWarps * kTile;
    // this warp's first tile: tiles are dealt by their place
    const int tile = begin / kTile;
    const int start = (tile + (warp + kWarps - tile % kWarps) % kWarps) * kTile;
    HalvesSums<T, kWidth, kTiles> sums(a, task);
    typename Shared::Ring ring(a, task, padding, own.ring);
    const auto fetch = [&](int first, int stage) {
      ring.fetch(first, end, stage);
      cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(start + i * kStep, i);
    int stage = 0;
    for (int first = start; first < end; first += kStep) {
      cp_async_wait<kStages - 2>();
      __syncwarp();  // the tile is there for all lanes, and all have read the one before
      fetch(first + (kStages - 1) * kStep, stage == 0 ? kStages - 1 : stage - 1);
      const auto& tile = ring.tile(stage);
      sums.add(tile, first, query, ring.scales());
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

// What the backward kernel of halves works with: its arguments, its plan and its tiles in shared
// memory.
#pragma once
#include "cuda/attention_halves.cuh"
#include "cuda/attention_halves.h"

namespace pykern::cuda {

constexpr int kM = 64;  // queries of a tile

template <class T>
struct BackwardHalves {
  Scores<T> scores;
  GradientRows<T> rows;
  bool q_words, k_words, v_words, dout_words, dq_words, dk_words, dv_words;
  const RowFacts<float>* facts;  // [B, H, T]
  float scale;                   // of dq and dk
  float* sums;                   // of dq, tiles of kM x kD
  uint32_t* turns;               // for each tile: 1 + the last block of keys that has added to it
  uint32_t* tickets;             // how many blocks have begun

  // The tile that begins with query `first` of sequence b.
  __device__ __forceinline__ int tile(const Place& at, int b, int h, int first) const {
    const Scores<T>& x = scores;
    if (x.cu_q) return h * (x.queries / kM + x.sequences) + at.q_row / kM + b + first / kM;
    return (b * x.H + h) * ((x.queries + kM - 1) / kM) + first / kM;
  }
};

// What a block does, for all its threads: in shared memory, since registers are for the sums.
struct BackwardPlan {
  Place at;
  int b, g, first, last;  // its keys
  int begin, end;         // tiles of queries of each head that may see them
  int next_h, next_m;     // the next tile that does; none: next_h is the head behind the last one
  int next_found;         // Class
  int h, m, found;        // the tile that is taken now
  int tile;               // of dq, to which this block adds; those before are said to be done
  bool others;            // blocks before this one have added to it
  bool strange_keys;      // some are not finite
  bool strange_dout;      // some were replaced
};

template <class T, int kD_, int kN_>
struct BackwardTiles {
  static constexpr int kD = kD_, kN = kN_;
  // Wide heads: two warps hold the sums of the same keys, half of the columns each.
  static constexpr int kSplit = kD > 128 ? 2 : 1, kOwn = kD / kSplit;
  static constexpr int kKeyWarps = kN / 16, kWarps = kKeyWarps * kSplit, kThreads = kWarps * kWarp;
  static constexpr int kStages = kD * kN <= 128 * 128 && kN == 128 ? 2 : 1;
  // Of dq a warp makes 32 rows by kDqColumns.
  static constexpr int kDqColumns = kD / (kWarps / 2), kDqPieces = kDqColumns / 8;

  struct Stage {
    Tile<T, kM, kD> q, dout;
    alignas(16) float shift[kM], delta[kM];
    alignas(16) uint64_t words[kN / kKeys][kM];  // which keys each query sees, if not all see all
  };
  Tile<T, kN, kD> k, v;  // and then their gradients
  Tile<T, kN, kM> ds;
  Stage stage[kStages];
  uint32_t strange_keys[kN / 32], strange_queries[kM / 32], strange_dout[kM / 32];
  BackwardPlan plan;
};

// Numbers of dout that are not finite, of queries that see the key, into its columns of dv: a warp,
// where they were replaced before they were multiplied.
template <class T>
__device__ __forceinline__ void restore_strange_dout(const BackwardHalves<T>& a,
                                                     const BackwardPlan& plan, int key) {
  const Scores<T>& x = a.scores;
  const Place& at = plan.at;
  T* dv = a.rows.dv.at(at.batch, plan.g, at.k_row + key);
#pragma unroll 1
  for (int e = threadIdx.x % kWarp; e < x.E; e += kWarp) {
    float strange = 0;
    for (int h = plan.g * x.group; h < (plan.g + 1) * x.group; ++h)
      for (int t = plan.begin * kM; t < plan.end * kM && t < at.queries; ++t) {
        const T dout = a.rows.dout.at(at.batch, h, at.q_row + t)[e];
        if (!is_finite(dout) &&
            (x.visible(at, plan.b, h, t, key / kKeys) >> key % kKeys & 1) != 0 &&
            unbiased(x, plan.b, h, t, key))
          strange += widen(dout);
      }
    if (strange != 0) dv[e] = narrow<T>(strange);
  }
}

}  // namespace pykern::cuda

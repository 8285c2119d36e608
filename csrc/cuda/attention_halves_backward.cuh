// What surrounds the backward kernel of halves: its launch, and dq from its sums.
#pragma once
#include "cuda/attention_backward.cuh"

namespace pykern::cuda {

// dq = scale times its sums, a block per tile of queries; 0 where nobody has added.
template <class T, int kD, int kN>
__global__ void __launch_bounds__(256) finish_dq(const BackwardHalves<T> a) {
  using Tiles = BackwardTiles<T, kD, kN>;
  const Scores<T>& x = a.scores;
  const int h = static_cast<int>(blockIdx.x % x.H), rest = static_cast<int>(blockIdx.x / x.H);
  BlockPlace mine{rest % x.sequences, rest / x.sequences * kM};
  if (x.cu_q) mine = ragged_block<kM>(x.cu_q, x.cu_q_step, x.sequences, x.queries, rest);
  if (mine.sequence < 0) return;
  const Place at = x.place(mine.sequence);
  const int64_t tile = a.tile(at, mine.sequence, h, mine.first);
  const bool some = a.turns[tile] != 0;
  const float* sums = a.sums + tile * (kM * kD);
#pragma unroll 1
  for (int i = threadIdx.x; i < kM * (kD / kChunk); i += 256) {
    const int row = i / (kD / kChunk), column = i % (kD / kChunk) * kChunk;
    if (mine.first + row >= at.queries || column >= x.D) continue;
    // the warp that made these numbers, its first lane of the row, and its first piece of them
    const int warp = column / Tiles::kDqColumns * 2 + row / 32, lane = row % 8 * 4;
    const int piece = row / 16 % 2 * Tiles::kDqPieces + column % Tiles::kDqColumns / 8;
    const float* from =
        sums + (piece * 4 + row / 8 % 2 * 2) * Tiles::kThreads + warp * kWarp + lane;
    float even[4] = {}, odd[4] = {}, v[kChunk];
    if (some) {
      load(from, 4, true, even);
      load(from + Tiles::kThreads, 4, true, odd);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) v[2 * j] = even[j] * a.scale, v[2 * j + 1] = odd[j] * a.scale;
    store(a.rows.dq.at(at.batch, h, at.q_row + mine.first + row) + column, x.D - column, a.dq_words,
          v);
  }
}

template <class T>
bool halves_backward(const AttentionBackward& op, const Scores<T>& x, const RowFacts<float>* facts,
                     Stream stream) {
  int most_shared = 0;
  require(cudaDeviceGetAttribute(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                 op.q.device_index),
          "cudaDeviceGetAttribute");
  const bool ragged = x.cu_q != nullptr;
  const auto start = [&]<int kD, int kN, bool plain>() {
    using Tiles = BackwardTiles<T, kD, kN>;
    if (sizeof(Tiles) > static_cast<size_t>(most_shared)) return false;
    const int64_t tiles = x.H * blocks_of(x.sequences, x.queries, ragged, kM);
    const Workspace turns((tiles + 1) * sizeof(uint32_t), stream);
    const Workspace sums(tiles * kM * kD * sizeof(float), stream);
    require(cudaMemsetAsync(turns.at<void>(), 0, (tiles + 1) * sizeof(uint32_t),
                            static_cast<cudaStream_t>(stream)),
            "cudaMemsetAsync");
    const BackwardHalves<T> a{.scores = x,
                              .rows = gradient_rows<T>(op),
                              .q_words = takes_packs<T>(op.q),
                              .k_words = takes_packs<T>(op.k),
                              .v_words = takes_packs<T>(op.v),
                              .dout_words = takes_packs<T>(op.dout),
                              .dq_words = takes_packs<T>(op.dq),
                              .dk_words = takes_packs<T>(op.dk),
                              .dv_words = takes_packs<T>(op.dv),
                              .facts = facts,
                              .scale = static_cast<float>(op.scale),
                              .sums = sums.template at<float>(),
                              .turns = turns.template at<uint32_t>(),
                              .tickets = turns.template at<uint32_t>() + tiles};
    const int64_t blocks = x.H / x.group * blocks_of(x.sequences, x.keys, ragged, kN);
    if (blocks > 0)
      launch(
          "attention_backward", attention_backward_halves<T, kD, kN, plain>,
          Grid{.blocks = dim3(blocks), .threads = dim3(Tiles::kThreads), .shared = sizeof(Tiles)},
          stream, a);
    if (tiles > 0)
      launch("finish_dq", finish_dq<T, kD, kN>, Grid{.blocks = dim3(tiles), .threads = dim3(256)},
             stream, a);
    return true;
  };
  const auto with_width = [&]<bool plain>() {
    const int width = x.D > x.E ? x.D : x.E;
    if (width <= 64) return start.template operator()<64, 128, plain>();
    if (width <= 128)  // the smaller tile is for GPUs with 99 KB of shared memory
      return start.template operator()<128, 128, plain>() ||
             start.template operator()<128, 64, plain>();
    return start.template operator()<256, 64, plain>();
  };
  return x.plain() ? with_width.template operator()<true>()
                   : with_width.template operator()<false>();
}

}  // namespace pykern::cuda

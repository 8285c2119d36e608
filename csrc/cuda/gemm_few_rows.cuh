// Products A B^T of at most 16 rows of halves, which are B on its way from memory: a block is a
// warp with 8 or 32 columns and a ring of its own, so that many columns' rows of B are under way
// and nobody waits for another's. Sums run over k as those of gemm_halves do: a row has the same
// bits in both.
#pragma once
#include "cuda/gemm.cuh"
#include "cuda/mma.cuh"

namespace pykern::cuda {

constexpr int kFewRows = 16, kFewDepth = 64;  // k of a stage: lines of 128 bytes
constexpr int kFewColumns = 8, kFewWideColumns = 32;

template <int kColumns>
constexpr int kFewStages = kColumns == kFewColumns ? 8 : 6;

template <class T, int kColumns>
struct FewShared {
  union {
    struct {
      alignas(128) T a[kFewStages<kColumns>][kFewRows * kFewDepth];
      alignas(128) T b[kFewStages<kColumns>][kColumns * kFewDepth];
    } stages;
    float sums[kFewRows][kColumns + 4];
  };
};

// Chunk c of line l is at l * 8 + (c ^ l % 8): eight lines' chunks c are in different banks.
constexpr int kFewChunks = kFewDepth / kChunk;

// Copies the 64 k from k on, of which `left` exist, of kLines rows; what is not there becomes 0.
template <int kLines, class T>
__device__ __forceinline__ void fetch_lines(const Factor& f, int64_t first_row, int64_t k,
                                            int64_t left, T* stage) {
  const int line = threadIdx.x / kFewChunks, chunk = threadIdx.x % kFewChunks;
  const int64_t k_left = left - chunk * kChunk;
  const int there = k_left < 0 ? 0 : k_left > kChunk ? kChunk : static_cast<int>(k_left);
#pragma unroll
  for (int i = 0; i < kLines; i += kWarp / kFewChunks) {
    const int64_t row = first_row + i + line;
    const T* from = static_cast<const T*>(f.data) + row * f.stride + k + chunk * kChunk;
    cp_async16(stage + ((i + line) * kFewChunks + (chunk ^ (i + line) % 8)) * kChunk, from,
               row < f.rows ? there * static_cast<int>(sizeof(T)) : 0);
  }
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kWarp) gemm_few_rows(const Product<T> p) {
  constexpr int kStages = kFewStages<kColumns>, kTiles = kColumns / 8;
  auto& shared = shared_memory<FewShared<T, kColumns>>();
  auto& stages = shared.stages;
  const int lane = threadIdx.x;
  const int64_t n0 = blockIdx.x * int64_t(kColumns), first = p.first_k(), K = p.end_k() - first;
  const int depths = static_cast<int>((K + kFewDepth - 1) / kFewDepth);
  const auto fetch = [&](int depth) {
    if (depth < depths) {
      const int64_t k = int64_t(depth) * kFewDepth;
      fetch_lines<kFewRows>(p.a, 0, first + k, K - k, stages.a[depth % kStages]);
      fetch_lines<kColumns>(p.b, n0, first + k, K - k, stages.b[depth % kStages]);
    }
    cp_async_commit();
  };
  // A chunk of 8 k of this lane's line, for ldmatrix: A's lines 0..15, B's 0..7 of a tile
  const auto a_at = [&](const T* stage, int k) {
    return stage + (lane % 16 * kFewChunks + ((k / kChunk + lane / 16) ^ lane % 8)) * kChunk;
  };
  const auto b_at = [&](const T* stage, int tile, int k) {
    return stage +
           ((8 * tile + lane % 8) * kFewChunks + ((k / kChunk + lane / 8) ^ lane % 8)) * kChunk;
  };

  float sum[kTiles][4] = {};
  for (int depth = 0; depth < kStages - 1; ++depth) fetch(depth);
#pragma unroll 1
  for (int depth = 0; depth < depths; ++depth) {
    cp_async_wait<kStages - 2>();
    __syncwarp();  // this stage is there for all, and all have read the one before
    fetch(depth + kStages - 1);
    const T *left = stages.a[depth % kStages], *right = stages.b[depth % kStages];
#pragma unroll
    for (int k = 0; k < kFewDepth; k += 32) {
      uint32_t a[2][4], b[4];
      ldmatrix_x4(a[0], a_at(left, k));
      ldmatrix_x4(a[1], a_at(left, k + 16));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        ldmatrix_x4(b, b_at(right, tile, k));
        multiply(sum[tile], a[0], b[0], b[1], T{});
        multiply(sum[tile], a[1], b[2], b[3], T{});
      }
    }
  }

  cp_async_wait<0>();
  __syncwarp();  // the stages have been read
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
    for (int r = 0; r < 4; ++r)
      shared.sums[lane / 4 + r / 2 * 8][8 * tile + lane % 4 * 2 + r % 2] = sum[tile][r];
  __syncwarp();
  finish_rows<kChunk>(p, shared.sums, kColumns, 0, n0);
}

}  // namespace pykern::cuda

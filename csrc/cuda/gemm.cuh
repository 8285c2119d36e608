// C [M, N] = A B^T with sums in float over k, in order: the bits of a row depend on nothing else.
//   A(m, k) and B(n, k) lie with either index contiguous, so no product needs a transposed copy.
// Halves go through mma.sync: 128 x 128 of C per block, 64 x 32 per warp, four stages of 32 k under
// way by cp.async. float and double are multiplied as they are, 64 x 64 per block.
#pragma once
#include "cuda/activate.cuh"
#include "cuda/gemm.h"
#include "cuda/rows.cuh"

namespace pykern::cuda {

// One factor: `rows` (m or n) by k numbers, `stride` between neighbours of the other index.
struct Factor {
  const void* data;
  int64_t rows, stride;
  bool aligned;  // 16 bytes at a time
};

// What becomes of a sum: out = activation(sum + bias) + residual, pre = sum + bias
template <class T>
struct Epilogue {
  Numbers<T> bias, residual, out, pre;
  Rows residual_rows, out_rows, pre_rows;
  Activation activation = Activation::none;
  bool vectors = false;  // neighbours are moved together

  // count neighbours of a row from column n on
  template <int count>
  __device__ __forceinline__ void operator()(int64_t m, int64_t n, int64_t valid,
                                             Compute<T> (&v)[count]) const {
    using C = Compute<T>;
    C more[count];
    if (bias.data) {
      bias.load(n, valid, vectors, more);
#pragma unroll
      for (int i = 0; i < count; ++i) v[i] += more[i];
    }
    if (pre.data) pre.store(pre_rows.offset(m) + n, valid, vectors, v);
    if (activation != Activation::none) {
#pragma unroll
      for (int i = 0; i < count; ++i) v[i] = activate(activation, v[i]);
    }
    if (residual.data) {
      residual.load(residual_rows.offset(m) + n, valid, vectors, more);
#pragma unroll
      for (int i = 0; i < count; ++i) v[i] += more[i];
    }
    out.store(out_rows.offset(m) + n, valid, vectors, v);
  }
};

// Which tile of C a block computes: tiles of eight rows of tiles one column after the other, so
// that blocks that run together read few rows of A and B.
struct TileOrder {
  int64_t rows, columns;  // of tiles

  __device__ __forceinline__ void at(int64_t block, int64_t* row, int64_t* column) const {
    constexpr int64_t kTall = 8;
    const int64_t band = quotient(block, kTall * columns), first = band * kTall;
    const int64_t tall = rows - first < kTall ? rows - first : kTall;
    const int64_t within = block - band * kTall * columns;
    *column = quotient(within, tall);
    *row = first + within - *column * tall;
  }
};

template <class T>
struct Product {
  Factor a, b;
  int64_t K;
  TileOrder order;
  Epilogue<T> epilogue;
};

// ---- halves, on the tensor cores

constexpr int kTile = 128, kDepth = 32, kStages = 4;
constexpr int kGemmThreads = 256;  // eight warps, two by four
constexpr int kChunk = 8;          // numbers of 16 bytes

template <class T>
struct Stages {
  alignas(128) T a[kStages][kTile * kDepth], b[kStages][kTile * kDepth];
};

// Half a tile of sums, rows apart by more than the banks.
constexpr int kRowsOfWarp = 64, kColumnsOfWarp = 32;
struct Sums {
  float of[kRowsOfWarp][kTile + 4];
};

// Where a chunk of 8 numbers lies, so that eight that ldmatrix reads at once are in different
// banks. k contiguous: [row][k], 4 chunks a row. Else [k][row], 16 chunks a row.
template <bool k_contiguous>
__device__ __forceinline__ int chunk_at(int line, int chunk) {
  if constexpr (k_contiguous)
    return (line * (kDepth / kChunk) + (chunk ^ (line / 2 % 4))) * kChunk;
  else
    return (line * (kTile / kChunk) + (chunk ^ (line % 8))) * kChunk;
}

// Starts the copies of one stage: the tile that begins at `row` and `k`; outside of the factor
// zeros.
template <bool k_contiguous, class T>
__device__ __forceinline__ void fetch(const Factor& f, int64_t row, int64_t k, int64_t K,
                                      T* stage) {
  constexpr int kPerLine = (k_contiguous ? kDepth : kTile) / kChunk;
  constexpr int kLines = k_contiguous ? kTile : kDepth;
#pragma unroll
  for (int i = threadIdx.x; i < kLines * kPerLine; i += kGemmThreads) {
    const int line = i / kPerLine, chunk = i % kPerLine;
    const int64_t outer = (k_contiguous ? row : k) + line;
    const int64_t inner = (k_contiguous ? k : row) + chunk * kChunk;
    const int64_t left = (k_contiguous ? K : f.rows) - inner;
    int64_t valid = outer < (k_contiguous ? f.rows : K) ? left : 0;
    valid = valid < 0 ? 0 : valid > kChunk ? kChunk : valid;
    const T* from = static_cast<const T*>(f.data) + (valid > 0 ? outer * f.stride + inner : 0);
    T* to = stage + chunk_at<k_contiguous>(line, chunk);
    if (f.aligned) {
      cp_async16(to, from, static_cast<int>(valid * sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) to[j] = j < valid ? from[j] : T{0};
    }
  }
}

// The 16 x 16 numbers of A at (row, k) of a stage, as mma wants them.
template <bool k_contiguous, class T>
__device__ __forceinline__ void read_a(uint32_t (&r)[4], const T* stage, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (k_contiguous)
    ldmatrix_x4(r, stage + chunk_at<true>(row + lane % 16, k / kChunk + lane / 16));
  else
    ldmatrix_x4_trans(
        r, stage + chunk_at<false>(k + lane % 8 + lane / 16 * 8, row / kChunk + lane / 8 % 2));
}
// 16 rows of B: b0 and b1 of two mma
template <bool k_contiguous, class T>
__device__ __forceinline__ void read_b(uint32_t (&r)[4], const T* stage, int row, int k) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (k_contiguous)
    ldmatrix_x4(r,
                stage + chunk_at<true>(row + lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2));
  else
    ldmatrix_x4_trans(
        r, stage + chunk_at<false>(k + lane % 8 + lane / 8 % 2 * 8, row / kChunk + lane / 16));
}

__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, bf16) {
  mma_bf16(d, a, b0, b1);
}
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1, f16) {
  mma_f16(d, a, b0, b1);
}

template <class T, bool a_by_k, bool b_by_k>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_halves(const Product<T> p) {
  constexpr int kUp = kRowsOfWarp / 16, kAcross = kColumnsOfWarp / 8;
  auto& stages = shared_memory<Stages<T>>();
  int64_t tile_row, tile_column;
  p.order.at(blockIdx.x, &tile_row, &tile_column);
  const int64_t m0 = tile_row * kTile, n0 = tile_column * kTile;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int up = warp / 4 * kRowsOfWarp, across = warp % 4 * kColumnsOfWarp;
  const int64_t depths = (p.K + kDepth - 1) / kDepth;

  const auto start = [&](int64_t depth) {
    if (depth < depths) {
      fetch<a_by_k>(p.a, m0, depth * kDepth, p.K, stages.a[depth % kStages]);
      fetch<b_by_k>(p.b, n0, depth * kDepth, p.K, stages.b[depth % kStages]);
    }
    cp_async_commit();  // also of nothing: groups are counted
  };

  float sum[kUp][kAcross][4] = {};
  for (int depth = 0; depth < kStages - 1; ++depth) start(depth);
  for (int64_t depth = 0; depth < depths; ++depth) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the stage is there for all, and the one before has been read by all
    start(depth + kStages - 1);
    const T *a = stages.a[depth % kStages], *b = stages.b[depth % kStages];
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[kUp][4], right[kAcross / 2][4];
#pragma unroll
      for (int i = 0; i < kUp; ++i) read_a<a_by_k>(left[i], a, up + 16 * i, k);
#pragma unroll
      for (int j = 0; j < kAcross / 2; ++j) read_b<b_by_k>(right[j], b, across + 16 * j, k);
#pragma unroll
      for (int i = 0; i < kUp; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j)
          multiply(sum[i][j], left[i], right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1], T{});
    }
  }

  // Through shared memory, so that neighbours of a row are written together, by one copy of the
  // epilogue: the upper four warps' half of the tile, then the lower's.
  cp_async_wait<0>();
  auto& sums = reinterpret_cast<Sums&>(stages);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // the stages, or the first half, have been read
    if (warp / 4 == half) {
#pragma unroll
      for (int i = 0; i < kUp; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r)
            sums.of[16 * i + lane / 4 + r / 2 * 8][across + 8 * j + lane % 4 * 2 + r % 2] =
                sum[i][j][r];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < kRowsOfWarp * (kTile / kChunk); i += kGemmThreads) {
      const int row = i / (kTile / kChunk), column = i % (kTile / kChunk) * kChunk;
      const int64_t m = m0 + half * kRowsOfWarp + row, n = n0 + column;
      float v[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) v[j] = sums.of[row][column + j];
      if (m < p.a.rows && n < p.b.rows) p.epilogue(m, n, p.b.rows - n, v);
    }
  }
}

// ---- float and double, as they are

constexpr int kPlainTile = 64, kPlainDepth = 16, kPlainEach = 4;
constexpr int kPlainThreads = (kPlainTile / kPlainEach) * (kPlainTile / kPlainEach);
constexpr int kChain = 128;  // units of k that are added in one chain: longer ones round more

template <class T>
struct PlainStage {
  T a[kPlainDepth][kPlainTile + 1], b[kPlainDepth][kPlainTile + 1];
};

template <bool k_contiguous, class T>
__device__ __forceinline__ void fetch_plain(const Factor& f, int64_t row, int64_t k, int64_t K,
                                            T (&stage)[kPlainDepth][kPlainTile + 1]) {
  for (int i = threadIdx.x; i < kPlainTile * kPlainDepth; i += kPlainThreads) {
    const int r = k_contiguous ? i / kPlainDepth : i % kPlainTile;
    const int d = k_contiguous ? i % kPlainDepth : i / kPlainTile;
    const int64_t at = k_contiguous ? (row + r) * f.stride + k + d : (k + d) * f.stride + row + r;
    stage[d][r] = row + r < f.rows && k + d < K ? static_cast<const T*>(f.data)[at] : T(0);
  }
}

template <class T, bool a_by_k, bool b_by_k>
__global__ void __launch_bounds__(kPlainThreads) gemm_plain(const Product<T> p) {
  auto& stage = shared_memory<PlainStage<T>>();
  int64_t tile_row, tile_column;
  p.order.at(blockIdx.x, &tile_row, &tile_column);
  const int64_t m0 = tile_row * kPlainTile, n0 = tile_column * kPlainTile;
  const int up = threadIdx.x / (kPlainTile / kPlainEach) * kPlainEach;
  const int across = threadIdx.x % (kPlainTile / kPlainEach) * kPlainEach;

  T sum[kPlainEach][kPlainEach] = {}, chain[kPlainEach][kPlainEach] = {};
  const auto end_chain = [&] {
#pragma unroll
    for (int i = 0; i < kPlainEach; ++i)
#pragma unroll
      for (int j = 0; j < kPlainEach; ++j) sum[i][j] += chain[i][j], chain[i][j] = 0;
  };
  for (int64_t k = 0; k < p.K; k += kPlainDepth) {
    if (k % kChain == 0 && k > 0) end_chain();
    __syncthreads();  // the stage before has been read
    fetch_plain<a_by_k>(p.a, m0, k, p.K, stage.a);
    fetch_plain<b_by_k>(p.b, n0, k, p.K, stage.b);
    __syncthreads();
#pragma unroll
    for (int d = 0; d < kPlainDepth; ++d)
#pragma unroll
      for (int i = 0; i < kPlainEach; ++i)
#pragma unroll
        for (int j = 0; j < kPlainEach; ++j)
          chain[i][j] = fma(stage.a[d][up + i], stage.b[d][across + j], chain[i][j]);
  }
  end_chain();
#pragma unroll
  for (int i = 0; i < kPlainEach; ++i) {
    const int64_t m = m0 + up + i, n = n0 + across;
    if (m < p.a.rows && n < p.b.rows) p.epilogue(m, n, p.b.rows - n, sum[i]);
  }
}

}  // namespace pykern::cuda

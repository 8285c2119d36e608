// Products of float and double as they are: 64 x 64 of C per block, 4 x 4 per thread.
#pragma once
#include "cuda/gemm.cuh"

namespace pykern::cuda {

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
  const int64_t end = p.end_k();
  for (int64_t k = p.first_k(); k < end; k += kPlainDepth) {
    if ((k - p.first_k()) % kChain == 0) end_chain();
    __syncthreads();  // the stage before has been read
    fetch_plain<a_by_k>(p.a, m0, k, end, stage.a);
    fetch_plain<b_by_k>(p.b, n0, k, end, stage.b);
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
  for (int i = 0; i < kPlainEach; ++i) p.finish(m0 + up + i, n0 + across, sum[i]);
}

}  // namespace pykern::cuda

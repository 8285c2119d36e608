// Products of float and double as they are: a block of 256 threads has 128 x 128 of C (double 64 x
// 64), a thread two by two quads of neighbours. The next 16 k are on their way to registers while
// those in shared memory are multiplied.
#pragma once
#include "cuda/gemm.cuh"

namespace pykern::cuda {

constexpr int kPlainThreads = 256, kPlainDepth = 16;
constexpr int kChain = 128;  // units of k that are added in one chain: longer ones round more

template <class T>
constexpr int kPlainTile = 32 * kPack<T>;  // 16 threads, two quads each

// [k][row], lines apart by more than the banks
template <class T>
using PlainStage = T[kPlainDepth][kPlainTile<T> + kPack<T>];

template <class T>
struct PlainShared {
  union {
    struct {
      PlainStage<T> a[2], b[2];
    } stages;
    T sums[kPlainTile<T> / 2][kPlainTile<T> + kPack<T>];  // of the upper or lower half of the tile
  };
};

// Takes one factor's part of each stage through registers, a pack at a time.
template <class T, bool k_contiguous>
class PlainFetcher {
  static constexpr int V = kPack<T>, kTile = kPlainTile<T>;
  static constexpr int kPerLine = (k_contiguous ? kPlainDepth : kTile) / V;
  static constexpr int kStep = kPlainThreads / kPerLine;
  static constexpr int kTimes = (k_contiguous ? kTile : kPlainDepth) / kStep;

 public:
  __device__ __forceinline__ PlainFetcher(const Factor& f, int64_t first_row)
      : factor_(f), line_(threadIdx.x / kPerLine), inner_(threadIdx.x % kPerLine * V) {
    first_row_ = first_row;
  }
  __device__ __forceinline__ void load(int64_t k, int64_t end) {
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int64_t outer = (k_contiguous ? first_row_ : k) + line_ + i * kStep;
      const int64_t inner = (k_contiguous ? k : first_row_) + inner_;
      const int64_t left = (k_contiguous ? end : factor_.rows) - inner;
      const bool there = outer < (k_contiguous ? factor_.rows : end) && left > 0;
      const T* from = static_cast<const T*>(factor_.data) + outer * factor_.stride + inner;
      read(from, there ? left : 0, true, held_[i]);
    }
  }
  __device__ __forceinline__ void store(PlainStage<T>& stage) const {
#pragma unroll
    for (int i = 0; i < kTimes; ++i)
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int line = line_ + i * kStep, inner = inner_ + j;
        stage[k_contiguous ? inner : line][k_contiguous ? line : inner] = held_[i].of[j];
      }
  }

 private:
  const Factor& factor_;
  Pack<T, V> held_[kTimes];
  int64_t first_row_;
  int line_, inner_;
};

template <class T, bool a_by_k, bool b_by_k>
__global__ void __launch_bounds__(kPlainThreads, 1) gemm_plain(const Product<T> p) {
  constexpr int V = kPack<T>, kTile = kPlainTile<T>, kEach = 2 * V;
  auto& shared = shared_memory<PlainShared<T>>();
  auto& stages = shared.stages;
  int64_t tile_row, tile_column;
  p.order.at(blockIdx.x, &tile_row, &tile_column);
  const int64_t m0 = tile_row * kTile, n0 = tile_column * kTile;
  // a warp has 4 by 8 threads, so that what it reads at once are few words of 16 bytes
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int up = (warp / 2 * 4 + lane / 8) * V, across = (warp % 2 * 8 + lane % 8) * V;

  T sum[kEach][kEach] = {}, chain[kEach][kEach] = {};
  const auto end_chain = [&] {
#pragma unroll
    for (int i = 0; i < kEach; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j) sum[i][j] += chain[i][j], chain[i][j] = 0;
  };
  // two quads of line d, half a tile apart
  const auto quads = [](const PlainStage<T>& stage, int d, int at, T(&v)[kEach]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Pack<T, V> pack;
      read(&stage[d][at + half * (kTile / 2)], V, true, pack);
#pragma unroll
      for (int i = 0; i < V; ++i) v[half * V + i] = pack.of[i];
    }
  };

  const int64_t first = p.first_k(), end = p.end_k();
  PlainFetcher<T, a_by_k> fetch_a(p.a, m0);
  PlainFetcher<T, b_by_k> fetch_b(p.b, n0);
  const auto load = [&](int64_t k) {
    fetch_a.load(k, end);
    fetch_b.load(k, end);
  };
  const auto store = [&](int which) {
    fetch_a.store(stages.a[which]);
    fetch_b.store(stages.b[which]);
  };
  load(first);
  store(0);
  __syncthreads();
  int which = 0;
  for (int64_t k = first; k < end; k += kPlainDepth, which ^= 1) {
    const bool more = k + kPlainDepth < end;
    if (more) load(k + kPlainDepth);
    if ((k - first) % kChain == 0) end_chain();
#pragma unroll
    for (int d = 0; d < kPlainDepth; ++d) {
      T a[kEach], b[kEach];
      quads(stages.a[which], d, up, a);
      quads(stages.b[which], d, across, b);
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) chain[i][j] = fma(a[i], b[j], chain[i][j]);
    }
    if (more) {
      store(which ^ 1);  // the stage before: all have read it
      __syncthreads();
    }
  }
  end_chain();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // the stages, or the upper half, have been read
#pragma unroll
    for (int i = 0; i < V; ++i)
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        shared.sums[up + i][across + j / V * (kTile / 2) + j % V] = sum[half * V + i][j];
    __syncthreads();
    finish_rows<V>(p, shared.sums, kTile, m0 + half * (kTile / 2), n0);
  }
}

}  // namespace pykern::cuda

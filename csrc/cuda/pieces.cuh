// One block per row: which numbers of it each thread takes. Warp w takes the w-th run of kHeld * 32
// packs, in any row, so a sum over a row does not change its order, nor its bits, when the row is
// padded with zeros.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

namespace pykern::cuda {

constexpr int kHeld = 2;  // packs of a row that a thread holds: 16 numbers of a half type
constexpr int kRowThreads = 512;

// Threads that hold a row of D numbers, if kRowThreads can.
template <class T>
int row_threads(int64_t D) {
  int threads = kWarp;
  while (threads < kRowThreads && threads * kHeld * kPack<T> < D) threads *= 2;
  return threads;
}

// A row of D numbers in chunks; of each chunk a thread has kHeld packs.
template <class T>
struct Pieces {
  int64_t D;
  bool vectors;  // rows begin where packs can be moved as a whole

  __device__ __forceinline__ int64_t chunks() const {
    const int64_t width = int64_t(kHeld) * blockDim.x * kPack<T>;
    return D > width ? (D + width - 1) / width : 1;
  }
  // body(p, first, valid): pack p of the chunk begins at number `first`, `valid` are left of the
  // row
  template <class Body>
  __device__ __forceinline__ void each_pack(int64_t chunk, const Body& body) const {
    const int64_t run = chunk * (blockDim.x / kWarp) + threadIdx.x / kWarp;
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int64_t first = ((run * kHeld + p) * kWarp + threadIdx.x % kWarp) * kPack<T>;
      if (first < D) body(p, first, D - first);
    }
  }
};

// A block per row, with scratch for reductions of n numbers of C.
template <class T, class C, int n>
Grid row_grid(int64_t rows, int64_t D) {
  return {.blocks = dim3(rows < kMaxBlocks ? rows : kMaxBlocks),
          .threads = dim3(row_threads<T>(D)),
          .shared = sizeof(BlockScratch<C, n>)};
}

}  // namespace pykern::cuda

// Rows of numbers on rows of a block's threads: which numbers of its row each thread takes. Warp w
// takes the w-th run of kHeld * 32 packs, in any row, so a sum over a row does not change its
// order, nor its bits, when the row is padded with zeros.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"

namespace pykern::cuda {

constexpr int kHeld = 2;  // packs of a row that a thread holds: 16 numbers of a half type
constexpr int kRowThreads = 512;
constexpr int kBlockThreads = 256;  // of a block with several rows

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

  // A block meets in its barriers as a whole: a row that is not there has no numbers.
  __device__ __forceinline__ Pieces where(bool there) const { return {there ? D : 0, vectors}; }
  __device__ __forceinline__ int64_t width() const {  // of a chunk
    return int64_t(kHeld) * blockDim.x * kPack<T>;
  }
  __device__ __forceinline__ int64_t chunks() const {
    return D > width() ? (D + width() - 1) / width() : 1;
  }
  // The number at which this thread's packs of the first chunk begin; in others a width further
  __device__ __forceinline__ int64_t begin() const {
    return (threadIdx.x / kWarp * (kHeld * kWarp) + threadIdx.x % kWarp) * kPack<T>;
  }
  // body(p, first, valid): pack p of the chunk begins at number `first`, `valid` are left of the
  // row
  template <class Body>
  __device__ __forceinline__ void each_pack(int64_t chunk, const Body& body) const {
    const int64_t from = begin() + chunk * width();
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int64_t first = from + p * (kWarp * kPack<T>);
      if (first < D) body(p, first, D - first);
    }
  }
  // body(p, first, valid, vectors) of the chunk in which this thread's packs begin at number
  // `from`. Where all are whole and aligned, `valid` and `vectors` are constants: the body is
  // short.
  template <class Body>
  __device__ __forceinline__ void each_pack_from(int64_t from, const Body& body) const {
    constexpr int W = kPack<T>, kStep = kWarp * W;
    if (vectors && from + (kHeld - 1) * kStep + W <= D) {
#pragma unroll
      for (int p = 0; p < kHeld; ++p) body(p, from + p * kStep, int64_t(W), true);
    } else {
#pragma unroll
      for (int p = 0; p < kHeld; ++p)
        if (from + p * kStep < D) body(p, from + p * kStep, D - from - p * kStep, vectors);
    }
  }
  // body(p, first, valid, vectors) of rows of one chunk; whole: all packs are whole and aligned,
  // and `valid` and `vectors` are constants
  template <bool whole, class Body>
  __device__ __forceinline__ void each_held(const Body& body) const {
    const int from = static_cast<int>(begin()), end = static_cast<int>(D);
#pragma unroll
    for (int p = 0; p < kHeld; ++p) {
      const int first = from + p * (kWarp * kPack<T>);
      if (first < end) body(p, first, whole ? kPack<T> : end - first, whole || vectors);
    }
  }
};

// How many rows of D numbers a block takes at a time.
template <class T>
int rows_together(int64_t D) {
  const int threads = row_threads<T>(D);
  return threads < kBlockThreads ? kBlockThreads / threads : 1;
}

// `together` rows a block, with scratch for reductions of n numbers of C.
template <class C, int n, class T>
Grid row_grid(T, int64_t rows, int64_t D, int together) {
  const int64_t blocks = ceil_div(rows, together);
  return {.blocks = dim3(blocks < kMaxBlocks ? blocks : kMaxBlocks),
          .threads = dim3(row_threads<T>(D), together),
          .shared = sizeof(RowScratch<C, n>)};
}

}  // namespace pykern::cuda

// C [M, N] = A B^T with sums in float over k, in order: the bits of a row depend on nothing else.
//   A(m, k) and B(n, k) lie with either index contiguous, so no product needs a transposed copy.
// What the kernels share: gemm_halves.cuh for the tensor cores, gemm_plain.cuh for float and
// double.
#pragma once
#include "cuda/activate.cuh"
#include "cuda/gemm.h"
#include "cuda/rows.cuh"

namespace pykern::cuda {

// One factor: `rows` (m or n) by k numbers, `stride` between neighbours of the other index.
struct Factor {
  const void* data;
  int64_t rows, stride;
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
    if (activation != Activation::none)
      with_kind(activation, [&](Activation kind) {
#pragma unroll
        for (int i = 0; i < count; ++i) v[i] = activate<C, T>(kind, v[i]);
      });
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
  // A part of k for each blockIdx.z; with several, their sums are left here for a second kernel.
  int64_t k_of_part;
  Compute<T>* partial;  // [parts, M, N], or null

  __device__ __forceinline__ int64_t first_k() const { return blockIdx.z * k_of_part; }
  __device__ __forceinline__ int64_t end_k() const {
    const int64_t end = first_k() + k_of_part;
    return end < K ? end : K;
  }
  // count neighbours of row m from column n on
  template <int count>
  __device__ __forceinline__ void finish(int64_t m, int64_t n, Compute<T> (&v)[count]) const {
    const int64_t M = a.rows, N = b.rows;
    if (m >= M || n >= N) return;
    if (partial)
      store(partial + (blockIdx.z * M + m) * N + n, N - n, N % count == 0, v);
    else
      epilogue(m, n, N - n, v);
  }
};

// Rows of sums in shared memory: all threads of the block finish them, `count` neighbours at a
// time, with one copy of the epilogue.
template <int count, class T, int rows, int width>
__device__ __forceinline__ void finish_rows(const Product<T>& p,
                                            const Compute<T> (&sums)[rows][width], int columns,
                                            int64_t m0, int64_t n0) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * (columns / count); i += blockDim.x) {
    const int row = i / (columns / count), column = i % (columns / count) * count;
    Compute<T> v[count];
#pragma unroll
    for (int j = 0; j < count; ++j) v[j] = sums[row][column + j];
    p.finish(m0 + row, n0 + column, v);
  }
}

}  // namespace pykern::cuda

// Sums over rows: shares of some rows each are added per column, in their order and in double.
#pragma once
#include "cuda/rows.cuh"

namespace pykern::cuda {

constexpr int kColumns = 32, kGroups = 32;  // of a block of column_sums

struct ColumnScratch {
  double partial[kGroups][kColumns];
};

// One result, or two side by side: a share is a row of the first and a row of the second.
template <class T>
struct ColumnSums {
  const Compute<T>* shares;
  int64_t count, step, D;
  Numbers<T> out[2];
};

// out[y][i] = sum of shares[s * step + y * D + i]: thread (i, g) adds every kGroups-th share, then
// groups are added.
template <class T>
__global__ void __launch_bounds__(kColumns* kGroups) column_sums(const ColumnSums<T> a) {
  using C = Compute<T>;
  auto& scratch = shared_memory<ColumnScratch>();
  const int64_t column = blockIdx.x * int64_t(kColumns) + threadIdx.x;
  const Numbers<T> out = blockIdx.y == 0 ? a.out[0] : a.out[1];
  if (!out.data) return;
  const C* shares = a.shares + blockIdx.y * a.D + column;
  double sum = 0;
  if (column < a.D) {
#pragma unroll 8
    for (int64_t s = threadIdx.y; s < a.count; s += kGroups) sum += shares[s * a.step];
  }
  scratch.partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= a.D) return;
#pragma unroll 8
  for (int g = 1; g < kGroups; ++g) sum += scratch.partial[g][threadIdx.x];
  const C result[1] = {static_cast<C>(sum)};
  out.store(column, 1, false, result);
}

// Of shares [count, 2, D] to first and second [D], or [count, D] to first alone.
template <class T>
void add_columns(const Compute<T>* shares, int64_t count, int64_t D, const Tensor& first,
                 const Tensor* second, Stream stream) {
  const bool two = second != nullptr;
  if (D == 0 || !(first.given || (two && second->given))) return;
  const Grid grid{.blocks = dim3(ceil_div(D, kColumns), two ? 2 : 1),
                  .threads = dim3(kColumns, kGroups),
                  .shared = sizeof(ColumnScratch)};
  launch("column_sums", column_sums<T>, grid, stream,
         ColumnSums<T>{shares,
                       count,
                       two ? 2 * D : D,
                       D,
                       {numbers_of<T>(first), two ? numbers_of<T>(*second) : Numbers<T>{}}});
}

}  // namespace pykern::cuda

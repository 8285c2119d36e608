// Sums over rows: shares of some rows each are added per column, in their order and in double.
#pragma once
#include "cuda/rows.cuh"

namespace pykern::cuda {

constexpr int kColumns = 32, kGroups = 16;  // of a block of column_sums

struct ColumnScratch {
  double partial[kGroups][kColumns];
};

// out[i] = sum of shares[s * step + i]: thread (i, g) adds every kGroups-th share, then groups are
// added.
template <class T, class C = Compute<T>>
__global__ void column_sums(const C* shares, int64_t count, int64_t step, int64_t D,
                            Numbers<T> out) {
  auto& scratch = shared_memory<ColumnScratch>();
  const int64_t column = blockIdx.x * int64_t(kColumns) + threadIdx.x;
  double sum = 0;
  if (column < D)
    for (int64_t s = threadIdx.y; s < count; s += kGroups) sum += shares[s * step + column];
  scratch.partial[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= D) return;
  for (int g = 1; g < kGroups; ++g) sum += scratch.partial[g][threadIdx.x];
  const C result[1] = {static_cast<C>(sum)};
  out.store(column, 1, false, result);
}

template <class T>
void add_columns(const Compute<T>* shares, int64_t count, int64_t step, const Tensor& out,
                 Stream stream) {
  if (!out.given || out.size[0] == 0) return;
  const Grid grid{.blocks = dim3(ceil_div(out.size[0], kColumns)),
                  .threads = dim3(kColumns, kGroups),
                  .shared = sizeof(ColumnScratch)};
  launch("column_sums", column_sums<T>, grid, stream, shares, count, step, out.size[0],
         numbers_of<T>(out));
}

}  // namespace pykern::cuda

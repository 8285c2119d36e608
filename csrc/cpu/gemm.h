// C = A B for A [M, K] and B [K, N] at any strides, in every dtype.
//
// A is packed once, in strips of kTileRows rows. A task takes a block of columns of B, packs it
// into its own cache, and walks the strips. Along k, sums run over chunks of kChunk<T> units, which
// are then added in order: the order depends on K alone, so a row's bits depend on nothing but the
// row.
#pragma once
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA
namespace {

// Units summed in one go: short sums keep the rounding error of long ones down, at 2 % of the time.
template <class T>
constexpr int64_t kChunk = kPaired<T> ? 512 : 128;
constexpr int64_t kBlockBytes = 400 << 10;  // packed columns of one task: under half of a 1 MiB L2

// Element (i, j) is data[i * row + j * column].
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// One tile: rows x kTileColumns, the sum over all k, handed to epilogue(row, column, vector, n).
template <class T, int R, class Epilogue>
[[gnu::noinline]] static void gemm_tile(int64_t count, const Compute<T>* a, const Compute<T>* b,
                                        int64_t row, int64_t column, int64_t N,
                                        const Epilogue& epilogue) {
  using V = Vec<Compute<T>>;
  constexpr int NV = kTileVectors, W = kTileColumns<T>;
  V sum[R][NV] = {};
  multiply_tile<T, R, NV>(count < kChunk<T> ? count : kChunk<T>, a, 1, kTileRows, b, W, sum);
  if (count > kChunk<T>) {
    V total[R][NV];
    memcpy(total, sum, sizeof sum);
    for (int64_t u = kChunk<T>; u < count; u += kChunk<T>) {
      V next[R][NV] = {};
      multiply_tile<T, R, NV>(count - u < kChunk<T> ? count - u : kChunk<T>, a + u * kTileRows, 1,
                              kTileRows, b + u * W, W, next);
      for (int i = 0; i < R; ++i)
        for (int j = 0; j < NV; ++j) total[i][j] = total[i][j] + next[i][j];
    }
    memcpy(sum, total, sizeof sum);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < NV; ++j) {
      const int64_t left = N - column - j * V::lanes;
      if (left > 0)
        epilogue(row + i, column + j * V::lanes, sum[i][j],
                 left < V::lanes ? static_cast<int>(left) : V::lanes);
    }
}

template <class T, class Epilogue>
static Status gemm(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, int threads,
                   const Epilogue& epilogue) {
  using C = Compute<T>;
  constexpr int R = kTileRows, W = kTileColumns<T>;
  if (M == 0 || N == 0) return Status::ok;
  const int64_t count = units<T>(K);
  const int64_t strips = (M + R - 1) / R, panels = (N + W - 1) / W;
  const int64_t strip_size = count * R + Vec<C>::lanes, panel_size = count * W;

  // Enough tasks to share, as few as possible to pack B: more row blocks only when columns are few.
  int64_t block = kBlockBytes / (panel_size * static_cast<int64_t>(sizeof(C)) + 1);
  const int64_t share = (panels + 4 * threads - 1) / (4 * threads);
  block = block < 1 ? 1 : block > share ? share : block;
  const int64_t column_blocks = (panels + block - 1) / block;
  int64_t row_blocks = threads == 1 ? 1 : (4 * threads + column_blocks - 1) / column_blocks;
  const int64_t most = (strips + 15) / 16;  // a packed panel should serve 16 strips
  row_blocks = row_blocks > most ? most : row_blocks;
  const int64_t strips_per_task = (strips + row_blocks - 1) / row_blocks;

  const Scratch packed_a(strips * strip_size * sizeof(C));
  const Scratch packed_b(block * panel_size * sizeof(C), threads);
  const Scratch last_block(64, threads);  // which column block a thread has packed
  if (!packed_a.ok() || !packed_b.ok() || !last_block.ok()) return Status::out_of_memory;
  for (int t = 0; t < threads; ++t) *last_block.template at<int64_t>(t) = -1;

  parallel_rows(strips, 4, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t left = M - s * R;
      pack<T>(packed_a.template at<C>() + s * strip_size, R,
              {A.data + s * R * A.row, A.row, A.column}, left < R ? static_cast<int>(left) : R,
              left, K);
    }
  });
  parallel_for(column_blocks * row_blocks, threads, [&](int64_t task, int thread) {
    const int64_t column_block = task / row_blocks, row_block = task % row_blocks;
    const int64_t first_panel = column_block * block;
    const int64_t last_panel = first_panel + block < panels ? first_panel + block : panels;
    C* b = packed_b.template at<C>(thread);
    int64_t* packed = last_block.template at<int64_t>(thread);
    if (*packed != column_block)
      for (int64_t p = first_panel; p < last_panel; ++p) {
        const int64_t left = N - p * W;
        pack<T>(b + (p - first_panel) * panel_size, W, {B.data + p * W * B.column, B.column, B.row},
                left < W ? static_cast<int>(left) : W, left, K);
      }
    *packed = column_block;
    const int64_t first_strip = row_block * strips_per_task;
    for (int64_t s = first_strip; s < first_strip + strips_per_task && s < strips; ++s) {
      const C* a = packed_a.template at<C>() + s * strip_size;
      const int64_t left = M - s * R;
      with_rows(left < R ? static_cast<int>(left) : R, [&](auto rows) {
        for (int64_t p = first_panel; p < last_panel; ++p)
          gemm_tile<T, rows.value>(count, a, b + (p - first_panel) * panel_size, s * R, p * W, N,
                                   epilogue);
      });
    }
  });
  return Status::ok;
}

// The sum of all rows: a task owns one vector of columns and adds runs of kSumRows rows, in order,
// to sums in double. Short runs: the error of a sum grows with its length.
constexpr int kSumRows = 16;
template <class T>
static void column_sums(int64_t M, int64_t N, Matrix<T> dz, T* sums, int threads) {
  using C = Compute<T>;
  using V = Vec<C>;
  parallel_for((N + V::lanes - 1) / V::lanes, threads, [&](int64_t block, int) {
    const int64_t column = block * V::lanes;
    const int n = N - column < V::lanes ? static_cast<int>(N - column) : V::lanes;
    double total[V::lanes] = {};
    C lanes[V::lanes];
    for (int64_t first = 0; first < M; first += kSumRows) {
      V sum = V::zero();
      for (int64_t row = first; row < M && row < first + kSumRows; ++row)
        sum = sum + load_n(dz.data + row * dz.row + column, n);
      store(lanes, sum);
      for (int i = 0; i < V::lanes; ++i) total[i] += lanes[i];
    }
    for (int i = 0; i < V::lanes; ++i) lanes[i] = static_cast<C>(total[i]);
    store_n(sums + column, load(lanes), n);
  });
}

}  // namespace
PYKERN_END_ISA

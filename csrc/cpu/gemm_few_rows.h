// C = A B for few rows of A and a B^T whose rows are contiguous, such as torch's weights: every
// number of B is read once, in order, and goes through the registers transposed. The sums are those
// of gemm.h, bit for bit.
#pragma once
#include "cpu/fetcher.h"
#include "cpu/gemm.h"
#include "cpu/pack.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kFewRows = kTileRows;

// Packs strips of width rows of A each, strip_size numbers apart; of A, rows are left, k numbers
// each.
template <class T, class S>
static void pack_strips_of(Compute<T>* out, int width, int64_t strips, int64_t strip_size,
                           Lanes<S> from, int64_t rows, int64_t k) {
  if (from.lane == 1 && from.step != 1) {
    pack_copies<T, S>(out, width, strips, strip_size, from,
                      rows < strips * width ? rows : strips * width, rows, k);
    return;
  }
  for (int64_t s = 0; s < strips; ++s) {
    const int64_t left = rows - s * width;
    pack<T, S>(out + s * strip_size, width,
               {from.data + s * width * from.lane, from.lane, from.step},
               left < width ? static_cast<int>(left) : width, left, k);
  }
}
template <class T>
static void pack_strips(Compute<T>* out, int width, int64_t strips, int64_t strip_size, Matrix<T> A,
                        int64_t rows, int64_t k) {
  if constexpr (sizeof(T) < sizeof(float)) {
    if (A.wide) {
      pack_strips_of<T, float>(out, width, strips, strip_size,
                               {static_cast<const float*>(A.data), A.row, A.column}, rows, k);
      return;
    }
  }
  pack_strips_of<T, T>(out, width, strips, strip_size,
                       {static_cast<const T*>(A.data), A.row, A.column}, rows, k);
}

// Bytes of a row that are fetched before the next row's: with those of all rows of a vector they
// fill a small part of the second-level cache.
constexpr int64_t kRunBytes = 2048;

// total[m] = the products of row m of a, packed as a strip, with each of `lanes` rows, K numbers
// each. Rows are read side by side, but fetched in runs along the rows, as memory likes it: the
// next run while one is read, and behind the last the first run of the rows `then` (null: none).
template <class T, class S, int M>
[[gnu::noinline]] static void multiply_streamed(const Compute<T>* a, const S* rows, int64_t row,
                                                int lanes, int64_t K, const S* then,
                                                Vec<Compute<T>> (&total)[M]) {
  using V = Vec<Compute<T>>;
  constexpr int L = V::lanes;
  constexpr int64_t width = L * kUnit<T>;  // numbers of a row in a square
  const int64_t count = units<T>(K), squares = (count + L - 1) / L;
  const int64_t bytes = squares * width * static_cast<int64_t>(sizeof(S));
  const int64_t runs = bytes == 0 ? 1 : (bytes + kRunBytes - 1) / kRunBytes;
  const int64_t run = (squares + runs - 1) / runs * L;  // units, as many in each run
  int64_t next_run = 0;
  Fetcher ahead(rows, 0, 64);
  V sum[M] = {}, chunk[M] = {};
  for (int64_t u = 0; u < count; u += L) {
    V square[L];
    const int64_t left = K - u * kUnit<T>;
    const S* p = rows + u * kUnit<T>;
    if (u == next_run) {
      next_run += run;
      const int64_t behind = left - run * kUnit<T>;  // numbers behind this run
      const S* next = behind > 0 ? p + run * kUnit<T> : then;
      const int64_t there = behind > 0 && behind < run * kUnit<T> ? behind : run * kUnit<T>;
      if (next) ahead = Fetcher(next, row * sizeof(S), there * sizeof(S));
    }
    ahead.fetch(L * width * sizeof(S) / 64);
    if (lanes == L && left >= width) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) square[i] = load_units<T, S>(p + i * row, width);
    } else {
      for (int i = 0; i < L; ++i)
        square[i] = i < lanes ? load_units<T, S>(p + i * row, left) : V::zero();
    }
    transpose(square);
    const int n = count - u < L ? static_cast<int>(count - u) : L;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
      if (i == n) break;
#pragma GCC unroll 12
      for (int m = 0; m < M; ++m)
        sum[m] = multiply_add<T>(sum[m], V::splat(a[(u + i) * kTileRows + m]), square[i]);
    }
    // as in multiply_tile and gemm_tile: chunks, and without FMA runs, are summed by themselves
    const bool end = u + L >= count, chunk_end = end || (u + L) % kChunk<T> == 0;
    if (kFused ? chunk_end : end || (u + L) % kShortRun == 0)
      for (int m = 0; m < M; ++m) {
        chunk[m] = kFused ? sum[m] : chunk[m] + sum[m];
        sum[m] = V::zero();
      }
    if (chunk_end)
      for (int m = 0; m < M; ++m) {
        total[m] = u < kChunk<T> ? chunk[m] : total[m] + chunk[m];
        chunk[m] = V::zero();
      }
  }
}

// C = A Bt^T, Bt [N, K] with contiguous rows
template <class T>
static Status few_rows(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> Bt, int threads,
                       const TileSink& sink) {
  using C = Compute<T>;
  using V = Vec<C>;
  const Scratch packed((units<T>(K) * kTileRows + V::lanes) * sizeof(C));
  if (!packed.ok()) return Status::out_of_memory;
  const C* a = packed.template at<C>();
  pack_strips<T>(packed.template at<C>(), kTileRows, 1, 0, A, M, K);
  const int64_t blocks = (N + V::lanes - 1) / V::lanes;
  const auto multiply_block = [&]<class S>(S, int64_t block, int64_t next) {
    with_rows<kFewRows>(static_cast<int>(M), [&](auto rows) {
      const auto lanes = [&](int64_t block) {
        return static_cast<const S*>(Bt.from(block * V::lanes, 0).data);
      };
      const int64_t column = block * V::lanes;
      const int n = N - column < V::lanes ? static_cast<int>(N - column) : V::lanes;
      V total[rows.value] = {};
      multiply_streamed<T>(a, lanes(block), Bt.row, n, K, next < blocks ? lanes(next) : nullptr,
                           total);
      sink.take(sink.context, 0, rows.value, column, n, total, V::lanes);
    });
  };
  parallel_with_next(blocks, threads, [&](int64_t block, int64_t next) {
    if constexpr (sizeof(T) < sizeof(float)) {
      if (Bt.wide) return multiply_block(float{}, block, next);
    }
    multiply_block(T{}, block, next);
  });
  return Status::ok;
}

}  // namespace
PYKERN_END_ISA

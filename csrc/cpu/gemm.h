// C = A B for A [M, K] and B [K, N] at any strides, in every dtype. The products are made in
// gemm.cpp; a kernel says what becomes of each number of C.
#pragma once
#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA

// Numbers of type dtype or, where wide, floats that are rounded to it: (i, j) is i * row + j *
// column.
struct AnyMatrix {
  const void* data;
  int64_t row, column;
  bool wide;
};

// What takes finished tiles of C: rows x columns numbers of the compute type, rows `step` apart.
// Called from several threads, once for each number of C.
struct TileSink {
  void (*take)(const void* context, int64_t row, int64_t rows, int64_t column, int64_t columns,
               const void* tile, int64_t step);
  const void* context;
};

Status multiply(DType dtype, int64_t M, int64_t N, int64_t K, AnyMatrix A, AnyMatrix B, int threads,
                TileSink sink);

namespace {

// Element (i, j) is number i * row + j * column of data: of type T or, where wide, a float that is
// rounded to T.
template <class T>
struct Matrix {
  const void* data;
  int64_t row, column;
  bool wide = false;

  Matrix(const void* data, int64_t row, int64_t column, bool wide = false)
      : data(data), row(row), column(column), wide(wide) {}
  // the rows of t [..., columns], which nest
  explicit Matrix(const Tensor& t)
      : Matrix(t.data, row_step(t), 1, sizeof(T) < sizeof(float) && t.dtype == DType::f32) {}

  Matrix from(int64_t i, int64_t j) const {
    const int64_t bytes = wide ? sizeof(float) : sizeof(T);
    return {static_cast<const char*>(data) + (i * row + j * column) * bytes, row, column, wide};
  }
  Matrix transposed() const { return {data, column, row, wide}; }
  AnyMatrix operand() const { return {data, row, column, wide}; }
};

template <class T>
constexpr DType kDType = DType::f32;
template <>
constexpr DType kDType<double> = DType::f64;
template <>
constexpr DType kDType<bf16> = DType::bf16;
template <>
constexpr DType kDType<f16> = DType::f16;

// A sink that calls epilogue(row, column, y, n) with n numbers y of C at once; epilogue must
// outlive it.
template <class T, class Epilogue>
static TileSink sink_of(const Epilogue& epilogue) {
  using C = Compute<T>;
  const auto take = [](const void* context, int64_t row, int64_t rows, int64_t column,
                       int64_t columns, const void* tile, int64_t step) {
    const Epilogue& each = *static_cast<const Epilogue*>(context);
    for (int64_t i = 0; i < rows; ++i)
      each_vector<C>(columns, [&](int64_t j, int n) {
        each(row + i, column + j, load_n(static_cast<const C*>(tile) + i * step + j, n), n);
      });
  };
  return {take, &epilogue};
}

template <class T, class Epilogue>
static Status gemm(int64_t M, int64_t N, int64_t K, Matrix<T> A, Matrix<T> B, int threads,
                   const Epilogue& epilogue) {
  return multiply(kDType<T>, M, N, K, A.operand(), B.operand(), threads, sink_of<T>(epilogue));
}

// sums[j] = the sum of column j of dz [M, N], rows contiguous: a task owns some vectors of columns
// and adds runs of kSumRows rows, in order, to sums in double. Short runs: the error of a sum grows
// with its length.
constexpr int kSumRows = 16, kSumVectors = 8;
template <class C>
static void column_sums(int64_t M, int64_t N, Numbers<C> dz, int64_t row_step, Numbers<C> sums,
                        int threads) {
  using V = Vec<C>;
  constexpr int L = V::lanes;
  parallel_rows(N, kSumVectors * L, threads, [&](int64_t begin, int64_t end, int) {
    double total[kSumVectors][L] = {};
    for (int64_t first = 0; first < M; first += kSumRows) {
      V sum[kSumVectors] = {};
      const int64_t last = first + kSumRows < M ? first + kSumRows : M;
      for (int64_t row = first; row < last; ++row)
        for (int64_t j = begin; j < end; j += L)
          sum[(j - begin) / L] =
              sum[(j - begin) / L] +
              dz.load(row * row_step + j, end - j < L ? static_cast<int>(end - j) : L);
      for (int v = 0; v < kSumVectors; ++v)
        for (int i = 0; i < L; ++i) total[v][i] += sum[v].r[i];
    }
    for (int64_t j = begin; j < end; j += L) {
      V sum;
      for (int i = 0; i < L; ++i) sum.r[i] = static_cast<C>(total[(j - begin) / L][i]);
      sums.store(j, sum, end - j < L ? static_cast<int>(end - j) : L);
    }
  });
}

}  // namespace
PYKERN_END_ISA

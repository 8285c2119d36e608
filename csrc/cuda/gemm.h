// Products of matrices with all that follows them, and what linear layers need beside: copies of
// another dtype, sums of rows. The kernels are in gemm.cu, once for all ops.
#pragma once
#include "core/tensor.h"
#include "cuda/launch.h"
#include "ops/activation.h"

namespace pykern::cuda {

// rows x columns, rows at one constant stride
struct Matrix {
  const void* data;
  int64_t rows, columns, stride;
  DType dtype;
};

Matrix matrix_of(const Tensor& t);  // [..., columns], rows that walk at one stride
Matrix matrix_at(const void* data, int64_t rows, int64_t columns, DType dtype);  // packed
Tensor tensor_of(const Matrix& m, const Tensor& like);  // [rows, columns] on the device of like

// What becomes of a product: out = activation(product + bias) + residual, pre = product + bias.
// residual may be out itself.
struct After {
  Tensor out = {}, bias = {}, residual = {}, pre = {};
  Activation activation = Activation::none;
  bool tf32 = false;  // of float32 factors only 10 bits behind the point are multiplied
};

// BLAS's letters: n for a factor as it is, t for its transpose.
//   nt  a [M, K] b [N, K]    nn  a [M, K] b [K, N]    tn  a [K, M] b [K, N]
enum class Layout : uint8_t { nt, nn, tn };

void gemm(const char* what, Layout layout, const Matrix& a, const Matrix& b, const After& after,
          Stream stream);

// t, times activation'(pre) if there is an activation, as a matrix of dtype: t itself where it is
// that already, else a copy in scratch memory.
class Rounded {
 public:
  Rounded(const Tensor& t, DType dtype, Stream stream)
      : Rounded(t, dtype, Tensor{}, Activation::none, stream) {}
  Rounded(const Tensor& t, DType dtype, const Tensor& pre, Activation activation, Stream stream);
  operator const Matrix&() const { return matrix_; }
  const Matrix& matrix() const { return matrix_; }

 private:
  bool copied_;
  Workspace memory_;
  Matrix matrix_;
};

// out[i] = the sum of column i, nothing if out is not given
void sum_rows(const Matrix& m, const Tensor& out, Stream stream);

}  // namespace pykern::cuda

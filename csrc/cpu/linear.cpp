// linear: out = activation(x weight^T + bias) + residual, the epilogue fused into the product.
#include "ops/linear.h"

#include "cpu/activate.h"
#include "cpu/gemm.h"

PYKERN_BEGIN_ISA

template <class T>
static Status forward(const LinearForward& op, int threads) {
  using C = Compute<T>;
  const int64_t M = row_count(op.x), K = row_length(op.x), N = op.weight.size[0];
  const Numbers<C> bias(op.bias), residual(op.residual), out(op.out);
  return gemm<T>(M, N, K, Matrix<T>(op.x), Matrix<T>(op.weight).transposed(), threads,
                 [&](int64_t row, int64_t column, Vec<C> y, int n) {
                   if (op.bias.given) y = y + bias.load(column, n);
                   if (op.pre.given) store_n(row_of<T>(op.pre, row) + column, y, n);
                   if (op.activation != Activation::none) y = activate_any(op.activation, y);
                   if (op.residual.given)
                     y = y + residual.load(row_offset(op.residual, row) + column, n);
                   out.store(row_offset(op.out, row) + column, y, n);
                 });
}

Status linear_forward(const LinearForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

// dz [M, N] = dout activation'(pre)
template <class T>
static void activation_gradient(const LinearBackward& op, T* dz, int threads) {
  using C = Compute<T>;
  const int64_t N = row_length(op.dout);
  const Numbers<C> dout(op.dout);
  parallel_rows(row_count(op.dout), 8, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t dout_row = row_offset(op.dout, row);
      const T* pre = row_of<T>(op.pre, row);
      each_vector<C>(N, [&](int64_t i, int n) {
        Vec<C> value;
        const Vec<C> slope = derivative_any(op.activation, load_n(pre + i, n), &value);
        store_n(dz + row * N + i, dout.load(dout_row + i, n) * slope, n);
      });
    }
  });
}

template <class T>
static Status backward(const LinearBackward& op, int threads) {
  using C = Compute<T>;
  const int64_t M = row_count(op.x), K = row_length(op.x), N = op.weight.size[0];
  const bool own = op.activation != Activation::none;
  const Scratch scratch(own ? M * N * static_cast<int64_t>(sizeof(T)) : 0);
  if (!scratch.ok()) return Status::out_of_memory;
  Matrix<T> dz(op.dout);
  Numbers<C> gradient(op.dout);
  if (own) {
    activation_gradient<T>(op, scratch.template at<T>(), threads);
    dz = Matrix<T>(scratch.template at<T>(), N, 1);
    gradient = {scratch.template at<T>(), op.x.dtype};
  }
  Status status = Status::ok;
  if (op.dx.given)
    status = gemm<T>(M, K, N, dz, Matrix<T>(op.weight), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       store_n(row_of<T>(op.dx, row) + column, y, n);
                     });
  const Numbers<C> dweight(op.dweight);
  if (op.dweight.given && status == Status::ok)
    status = gemm<T>(N, K, M, dz.transposed(), Matrix<T>(op.x), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       dweight.store(row_offset(op.dweight, row) + column, y, n);
                     });
  if (op.dbias.given) column_sums<C>(M, N, gradient, dz.row, Numbers<C>(op.dbias), threads);
  return status;
}

Status linear_backward(const LinearBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

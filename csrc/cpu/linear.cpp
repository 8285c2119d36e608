// linear: out = activation(x weight^T + bias) + residual, the epilogue fused into the product.
#include "ops/linear.h"

#include "cpu/gemm.h"
#include "cpu/math.h"
#include "cpu/rows.h"

PYKERN_BEGIN_ISA

template <class C>
[[gnu::noinline]] static Vec<C> activate_any(Activation kind, Vec<C> x) {
  switch (kind) {
    case Activation::none: return x;
    case Activation::relu: return activate<Activation::relu>(x);
    case Activation::gelu: return activate<Activation::gelu>(x);
    case Activation::gelu_tanh: return activate<Activation::gelu_tanh>(x);
    case Activation::silu: return activate<Activation::silu>(x);
    case Activation::sigmoid: return activate<Activation::sigmoid>(x);
  }
  return x;
}

template <class C>
[[gnu::noinline]] static Vec<C> derivative_any(Activation kind, Vec<C> x) {
  switch (kind) {
    case Activation::none: return Vec<C>::splat(C(1));
    case Activation::relu: return derivative<Activation::relu>(x);
    case Activation::gelu: return derivative<Activation::gelu>(x);
    case Activation::gelu_tanh: return derivative<Activation::gelu_tanh>(x);
    case Activation::silu: return derivative<Activation::silu>(x);
    case Activation::sigmoid: return derivative<Activation::sigmoid>(x);
  }
  return x;
}

// The distance between rows of a tensor whose rows nest (checked at the boundary).
static int64_t row_step(const Tensor& t) {
  for (int i = t.rank - 2; i >= 0; --i)
    if (t.size[i] != 1) return t.stride[i];
  return row_length(t);
}

// t [..., columns] as a matrix of its rows, or transposed
template <class T>
static Matrix<T> matrix(const Tensor& t) {
  return {static_cast<const T*>(t.data), row_step(t), 1};
}
template <class T>
static Matrix<T> transposed(const Tensor& t) {
  return {static_cast<const T*>(t.data), 1, row_step(t)};
}

template <class T>
static Status forward(const LinearForward& op, int threads) {
  using C = Compute<T>;
  const int64_t M = row_count(op.x), K = row_length(op.x), N = op.weight.size[0];
  const T* bias = op.bias.given ? static_cast<const T*>(op.bias.data) : nullptr;
  return gemm<T>(M, N, K, matrix<T>(op.x), transposed<T>(op.weight), threads,
                 [&](int64_t row, int64_t column, Vec<C> y, int n) {
                   if (bias) y = y + load_n(bias + column, n);
                   if (op.pre.given) store_n(row_of<T>(op.pre, row) + column, y, n);
                   if (op.activation != Activation::none) y = activate_any(op.activation, y);
                   if (op.residual.given) y = y + load_n(row_of<T>(op.residual, row) + column, n);
                   store_n(row_of<T>(op.out, row) + column, y, n);
                 });
}

Status linear_forward(const LinearForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

// dz = dout activation'(pre), in memory of its own
template <class T>
static void activation_gradient(const LinearBackward& op, T* dz, int threads) {
  const int64_t N = row_length(op.dout);
  parallel_rows(row_count(op.dout), 8, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row) {
      const T* dout = row_of<T>(op.dout, row);
      const T* pre = row_of<T>(op.pre, row);
      each_vector<Compute<T>>(N, [&](int64_t i, int n) {
        store_n(dz + row * N + i,
                load_n(dout + i, n) * derivative_any(op.activation, load_n(pre + i, n)), n);
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
  Matrix<T> dz = matrix<T>(op.dout);
  if (own) {
    activation_gradient<T>(op, scratch.template at<T>(), threads);
    dz = {scratch.template at<T>(), N, 1};
  }
  Status status = Status::ok;
  if (op.dx.given)
    status = gemm<T>(M, K, N, dz, matrix<T>(op.weight), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       store_n(row_of<T>(op.dx, row) + column, y, n);
                     });
  if (op.dweight.given && status == Status::ok)
    status = gemm<T>(N, K, M, {dz.data, 1, dz.row}, matrix<T>(op.x), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       store_n(row_of<T>(op.dweight, row) + column, y, n);
                     });
  if (op.dbias.given) column_sums<T>(M, N, dz, static_cast<T*>(op.dbias.data), threads);
  return status;
}

Status linear_backward(const LinearBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

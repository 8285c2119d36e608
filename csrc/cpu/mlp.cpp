// mlp: two or three products. The activation belongs to the epilogue of the product before it, its
// derivative to that of the product that makes dh; h exists only while the op runs.
#include "ops/mlp.h"

#include "cpu/activate.h"
#include "cpu/gemm.h"

PYKERN_BEGIN_ISA

template <class T>
static Status forward(const MlpForward& op, int threads) {
  using C = Compute<T>;
  const int64_t M = row_count(op.x), K = row_length(op.x), H = op.up_weight.size[0];
  const int64_t N = op.down_weight.size[0];
  const bool gated = op.gate_weight.given;
  const Scratch memory(M * H * static_cast<int64_t>(sizeof(T)));
  if (!memory.ok()) return Status::out_of_memory;
  T* h = memory.template at<T>();
  const Numbers<C> up_bias(op.up_bias), gate_bias(op.gate_bias), down_bias(op.down_bias),
      residual(op.residual), out(op.out);

  Status status = Status::ok;
  // gate is where it is kept, else where h will be
  T* const own_gate = op.gate.given ? nullptr : h;
  const auto gate_at = [&](int64_t row, int64_t column) {
    return own_gate ? own_gate + row * H + column : row_of<T>(op.gate, row) + column;
  };
  if (gated)
    status = gemm<T>(M, H, K, Matrix<T>(op.x), Matrix<T>(op.gate_weight).transposed(), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       if (op.gate_bias.given) y = y + gate_bias.load(column, n);
                       store_n(gate_at(row, column), y, n);
                     });
  if (status == Status::ok)  // h = f(up), or f(gate) up
    status = gemm<T>(M, H, K, Matrix<T>(op.x), Matrix<T>(op.up_weight).transposed(), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       if (op.up_bias.given) y = y + up_bias.load(column, n);
                       if (op.up.given) store_n(row_of<T>(op.up, row) + column, y, n);
                       y = gated ? activate_any(op.activation, load_n(gate_at(row, column), n)) * y
                                 : activate_any(op.activation, y);
                       store_n(h + row * H + column, y, n);
                     });
  if (status == Status::ok)
    status = gemm<T>(M, N, H, {h, H, 1}, Matrix<T>(op.down_weight).transposed(), threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       if (op.down_bias.given) y = y + down_bias.load(column, n);
                       if (op.residual.given)
                         y = y + residual.load(row_offset(op.residual, row) + column, n);
                       out.store(row_offset(op.out, row) + column, y, n);
                     });
  return status;
}

// dweight [n, k] = dy^T x and dbias = the sum of the rows of dy [M, n]
template <class T>
static Status parameter_gradients(int64_t M, Matrix<T> dy, DType dtype, Matrix<T> x,
                                  const Tensor& dweight, const Tensor& dbias, int threads) {
  using C = Compute<T>;
  const Numbers<C> to(dweight);
  Status status = Status::ok;
  if (dweight.given)
    status = gemm<T>(dweight.size[0], dweight.size[1], M, dy.transposed(), x, threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int n) {
                       to.store(row_offset(dweight, row) + column, y, n);
                     });
  if (dbias.given)
    column_sums<C>(M, dbias.size[0], {const_cast<void*>(dy.data), dtype}, dy.row, Numbers<C>(dbias),
                   threads);
  return status;
}

template <class T>
static Status backward(const MlpBackward& op, int threads) {
  using C = Compute<T>;
  using V = Vec<C>;
  const int64_t M = row_count(op.x), K = row_length(op.x), H = op.up_weight.size[0];
  const int64_t N = op.down_weight.size[0], size = M * H * static_cast<int64_t>(sizeof(T));
  const bool gated = op.gate_weight.given;
  const Scratch h_memory(size), dup_memory(size), dgate_memory(gated ? size : 0);
  const Scratch dx_memory(gated ? M * K * static_cast<int64_t>(sizeof(C)) : 0);
  if (!h_memory.ok() || !dup_memory.ok() || !dgate_memory.ok() || !dx_memory.ok())
    return Status::out_of_memory;
  T *h = h_memory.template at<T>(), *dup = dup_memory.template at<T>();
  T* dgate = dgate_memory.template at<T>();
  C* dx_sum = dx_memory.template at<C>();
  const DType dtype = op.x.dtype;
  const Matrix<T> x(op.x), dout(op.dout);

  Status status = gemm<T>(M, H, N, dout, Matrix<T>(op.down_weight), threads,
                          [&](int64_t row, int64_t column, V dh, int n) {
                            const int64_t i = row * H + column;
                            const V up = load_n(row_of<T>(op.up, row) + column, n);
                            if (!gated) {
                              V value;
                              store_n(dup + i, dh * derivative_any(op.activation, up, &value), n);
                              store_n(h + i, value, n);
                              return;
                            }
                            const V gate = load_n(row_of<T>(op.gate, row) + column, n);
                            V f;
                            const V df = derivative_any(op.activation, gate, &f);
                            store_n(h + i, f * up, n);
                            store_n(dup + i, dh * f, n);
                            store_n(dgate + i, dh * up * df, n);
                          });
  if (status == Status::ok)
    status = parameter_gradients<T>(M, dout, op.dout.dtype, {h, H, 1}, op.ddown_weight,
                                    op.ddown_bias, threads);
  if (status == Status::ok)
    status = parameter_gradients<T>(M, {dup, H, 1}, dtype, x, op.dup_weight, op.dup_bias, threads);
  if (status == Status::ok && gated)
    status =
        parameter_gradients<T>(M, {dgate, H, 1}, dtype, x, op.dgate_weight, op.dgate_bias, threads);
  if (status == Status::ok && op.dx.given && gated)
    status = gemm<T>(
        M, K, H, {dgate, H, 1}, Matrix<T>(op.gate_weight), threads,
        [&](int64_t row, int64_t column, V y, int n) { store_n(dx_sum + row * K + column, y, n); });
  if (status == Status::ok && op.dx.given)
    status = gemm<T>(M, K, H, {dup, H, 1}, Matrix<T>(op.up_weight), threads,
                     [&](int64_t row, int64_t column, V y, int n) {
                       if (gated) y = y + load_n(dx_sum + row * K + column, n);
                       store_n(row_of<T>(op.dx, row) + column, y, n);
                     });
  return status;
}

Status mlp_forward(const MlpForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

Status mlp_backward(const MlpBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

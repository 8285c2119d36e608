// mlp: two or three products. Without a gate the activation is in the epilogue of the first; with
// one a pass over what is between makes h, and backward a pass makes h again beside the gradients
// of up and gate.
#include "cuda/activate.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/gemm.h"
#include "ops/mlp.h"

namespace pykern::cuda {
namespace {

struct Gated {  // gate, up -> h
  Activation kind;
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[2][W], C (&y)[1][W]) const {
    with_kind(kind, [&](Activation known) {
#pragma unroll
      for (int j = 0; j < W; ++j) y[0][j] = activate<C, T>(known, x[0][j]) * x[1][j];
    });
  }
};

struct Between {  // up, dh -> h, dup
  Activation kind;
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[2][W], C (&y)[2][W]) const {
    with_kind(kind, [&](Activation known) {
#pragma unroll
      for (int j = 0; j < W; ++j) y[1][j] = x[1][j] * derivative<C, T>(known, x[0][j], &y[0][j]);
    });
  }
};

struct GatedBetween {  // gate, up, dh -> h, dup, dgate
  Activation kind;
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[3][W], C (&y)[3][W]) const {
    with_kind(kind, [&](Activation known) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        C value;
        y[2][j] = x[2][j] * x[1][j] * derivative<C, T>(known, x[0][j], &value);
        y[0][j] = value * x[1][j];
        y[1][j] = x[2][j] * value;
      }
    });
  }
};

// A matrix [M, H] of scratch memory in x's dtype.
struct Hidden {
  Workspace memory;
  Tensor tensor;
  Hidden(const Tensor& x, int64_t M, int64_t H, bool wanted, Stream stream)
      : memory(wanted ? M * H * item_size(x.dtype) : 0, stream),
        tensor(tensor_of(matrix_at(memory.at<void>(), M, H, x.dtype), x)) {}
};

// t [..., H] as [M, H]
Tensor flat(const Tensor& t) { return tensor_of(matrix_of(t), t); }

}  // namespace

void mlp_forward(const MlpForward& op, Stream stream) {
  const OnDevice device(op.x);
  const Matrix x = matrix_of(op.x);
  const int64_t M = x.rows, H = op.up_weight.size[0];
  const bool gated = op.gate_weight.given;
  const Rounded up_weight(op.up_weight, op.x.dtype, stream);
  const Rounded down_weight(op.down_weight, op.x.dtype, stream);
  const Hidden h(op.x, M, H, true, stream);
  if (gated) {
    const Rounded gate_weight(op.gate_weight, op.x.dtype, stream);
    const Hidden own_up(op.x, M, H, !op.up.given, stream),
        own_gate(op.x, M, H, !op.gate.given, stream);
    const Tensor up = op.up.given ? flat(op.up) : own_up.tensor;
    const Tensor gate = op.gate.given ? flat(op.gate) : own_gate.tensor;
    gemm("mlp_forward", Layout::nt, x, gate_weight,
         {.out = gate, .bias = op.gate_bias, .tf32 = op.tf32}, stream);
    gemm("mlp_forward", Layout::nt, x, up_weight, {.out = up, .bias = op.up_bias, .tf32 = op.tf32},
         stream);
    elementwise("mlp_forward", {gate, up}, {h.tensor}, Gated{op.activation}, stream);
  } else {
    gemm("mlp_forward", Layout::nt, x, up_weight,
         {.out = h.tensor,
          .bias = op.up_bias,
          .pre = op.up,
          .activation = op.activation,
          .tf32 = op.tf32},
         stream);
  }
  gemm("mlp_forward", Layout::nt, matrix_of(h.tensor), down_weight,
       {.out = op.out, .bias = op.down_bias, .residual = op.residual, .tf32 = op.tf32}, stream);
}

void mlp_backward(const MlpBackward& op, Stream stream) {
  const OnDevice device(op.x);
  const DType dtype = op.x.dtype;
  const Matrix x = matrix_of(op.x);
  const int64_t M = x.rows, H = op.up_weight.size[0];
  const bool gated = op.gate_weight.given;
  const Rounded dout(op.dout, dtype, stream), down_weight(op.down_weight, dtype, stream);

  const Hidden h(op.x, M, H, true, stream), dh(op.x, M, H, true, stream),
      dup(op.x, M, H, true, stream), dgate(op.x, M, H, gated, stream);
  gemm("mlp_backward", Layout::nn, dout, down_weight, {.out = dh.tensor, .tf32 = op.tf32}, stream);
  if (gated)
    elementwise("mlp_backward", {flat(op.gate), flat(op.up), dh.tensor},
                {h.tensor, dup.tensor, dgate.tensor}, GatedBetween{op.activation}, stream);
  else
    elementwise("mlp_backward", {flat(op.up), dh.tensor}, {h.tensor, dup.tensor},
                Between{op.activation}, stream);

  const Matrix up_gradient = matrix_of(dup.tensor), gate_gradient = matrix_of(dgate.tensor);
  if (op.dx.given) {
    const Rounded up_weight(op.up_weight, dtype, stream);
    if (gated) {  // the first term with the accuracy of a sum
      const DType wide = stat_dtype(dtype);
      const Workspace memory(M * x.columns * item_size(wide), stream);
      const Tensor first = tensor_of(matrix_at(memory.at<void>(), M, x.columns, wide), op.x);
      const Rounded gate_weight(op.gate_weight, dtype, stream);
      gemm("mlp_backward", Layout::nn, gate_gradient, gate_weight, {.out = first, .tf32 = op.tf32},
           stream);
      gemm("mlp_backward", Layout::nn, up_gradient, up_weight,
           {.out = op.dx, .residual = first, .tf32 = op.tf32}, stream);
    } else {
      gemm("mlp_backward", Layout::nn, up_gradient, up_weight, {.out = op.dx, .tf32 = op.tf32},
           stream);
    }
  }
  const auto parameters = [&](const Matrix& dy, const Matrix& from, const Tensor& dweight,
                              const Tensor& dbias) {
    if (dweight.given)
      gemm("mlp_backward", Layout::tn, dy, from, {.out = dweight, .tf32 = op.tf32}, stream);
    sum_rows(dy, dbias, stream);
  };
  parameters(up_gradient, x, op.dup_weight, op.dup_bias);
  if (gated) parameters(gate_gradient, x, op.dgate_weight, op.dgate_bias);
  parameters(dout, matrix_of(h.tensor), op.ddown_weight, op.ddown_bias);
}

}  // namespace pykern::cuda

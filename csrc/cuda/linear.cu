// linear: one product forward with everything else in its epilogue; backward two, of dz = dout
// activation'(pre), which is written once where it is not dout itself.
//   dx = dz weight    dweight = dz^T x    dbias = sum of the rows of dz
// A float32 weight beside a half x is rounded to a copy first.
#include "cuda/gemm.h"
#include "ops/linear.h"

namespace pykern::cuda {

void linear_forward(const LinearForward& op, Stream stream) {
  const OnDevice device(op.x);
  const Rounded weight(op.weight, op.x.dtype, stream);
  gemm("linear_forward", Layout::nt, matrix_of(op.x), weight,
       {op.out, op.bias, op.residual, op.pre, op.activation, op.tf32}, stream);
}

void linear_backward(const LinearBackward& op, Stream stream) {
  const OnDevice device(op.x);
  const Rounded dz(op.dout, op.x.dtype, op.pre, op.activation, stream);
  if (op.dx.given) {
    const Rounded weight(op.weight, op.x.dtype, stream);
    gemm("linear_backward", Layout::nn, dz, weight, {.out = op.dx, .tf32 = op.tf32}, stream);
  }
  if (op.dweight.given)
    gemm("linear_backward", Layout::tn, dz, matrix_of(op.x), {.out = op.dweight, .tf32 = op.tf32},
         stream);
  sum_rows(dz, op.dbias, stream);
}

}  // namespace pykern::cuda

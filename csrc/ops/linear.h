// linear: out = activation(x weight^T + bias) + residual
//   x [..., K]   weight [N, K]   bias [N]   residual, out, pre [..., N]
// pre keeps x weight^T + bias, which the backward pass of an activation needs.
// A bfloat16 or float16 x may have float32 weight, bias and residual, as under autocast: weight is
// rounded to x's dtype, out has the dtype of the residual, dout that of out, dweight that of
// weight.
#pragma once
#include "core/tensor.h"
#include "ops/activation.h"

namespace pykern {

struct LinearForward {
  Tensor x, weight, bias, residual;
  Tensor out, pre;
  Activation activation;
  bool tf32 = false;  // float32 on CUDA: factors of products rounded to 10 bits behind the point
};

// dz = dout activation'(pre);  dx = dz weight;  dweight = dz^T x;  dbias = sum of the rows of dz
struct LinearBackward {
  Tensor x, weight, pre, dout;
  Tensor dx, dweight, dbias;  // those not wanted are not given
  Activation activation;
  bool tf32 = false;
};

void check(const LinearForward& op);
void check(const LinearBackward& op);

}  // namespace pykern

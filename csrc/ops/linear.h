// linear: out = activation(x weight^T + bias) + residual
//   x [..., K]   weight [N, K]   bias [N]   residual, out, pre [..., N]
// pre keeps x weight^T + bias, which the backward pass of an activation needs.
#pragma once
#include "core/tensor.h"
#include "ops/activation.h"

namespace pykern {

struct LinearForward {
  Tensor x, weight, bias, residual;
  Tensor out, pre;
  Activation activation;
};

// dz = dout activation'(pre);  dx = dz weight;  dweight = dz^T x;  dbias = sum of the rows of dz
struct LinearBackward {
  Tensor x, weight, pre, dout;
  Tensor dx, dweight, dbias;  // those not wanted are not given
  Activation activation;
};

void check(const LinearForward& op);
void check(const LinearBackward& op);

}  // namespace pykern

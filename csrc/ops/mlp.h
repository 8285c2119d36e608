// mlp: out = h down_weight^T + down_bias + residual,  h = f(up),  up = x up_weight^T + up_bias
// gated, when gate_weight is given:  h = f(gate) up,  gate = x gate_weight^T + gate_bias
//   x [..., K]   up_weight, gate_weight [H, K]   up_bias, gate_bias [H]   down_weight [N, H]
//   down_bias [N]   residual, out [..., N]   up, gate [..., H], kept for the backward pass
// Dtypes as in linear; h, up and gate have x's.
#pragma once
#include "core/tensor.h"
#include "ops/activation.h"

namespace pykern {

struct MlpForward {
  Tensor x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, residual;
  Tensor out, up, gate;
  Activation activation;
  bool tf32 = false;  // float32 on CUDA: factors of products rounded to 10 bits behind the point
};

// dh = dout down_weight, at once times what makes it the gradient of up, or of up and gate:
//   dup = dh f'(up)         gated: dup = dh f(gate),  dgate = dh up f'(gate)
//   dx = dup up_weight + dgate gate_weight;  ddown_weight = dout^T h, with h made again
struct MlpBackward {
  Tensor x, up_weight, gate_weight, down_weight, up, gate, dout;
  // those not wanted are not given
  Tensor dx, dup_weight, dup_bias, dgate_weight, dgate_bias, ddown_weight, ddown_bias;
  Activation activation;
  bool tf32 = false;
};

void check(const MlpForward& op);
void check(const MlpBackward& op);

}  // namespace pykern

// adamw: one step of Adam with decoupled weight decay, in place; t counts steps from 1.
//   g = grad_scale scale grad    m += (1 - beta1) (g - m)    v = beta2 v + (1 - beta2) g^2
//   param = (1 - lr weight_decay) param - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
// A bfloat16 or float16 param may be the rounded copy of a float32 master, which is then what
// moves. Where grad_scale scale is not finite, nothing changes.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct AdamWState {
  Tensor param, grad, exp_avg, exp_avg_sq;  // param, grad [...]; m, v [...] stat
  Tensor master;                            // [...] float32, or not given
};

// States of any shapes and dtypes on one device, which share no memory.
struct AdamW {
  const AdamWState* states;
  int64_t count;  // of states, at least 1
  Tensor scale;   // [1] float64, or not given: 1
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;
  double grad_scale;
};

// square_sum: out[i] = sum of x^2 over all of the tensor x[i], in pieces that its shape and strides
// fix, added in order in double. Gradient clipping takes the root of such sums.
struct SquareSum {
  const Tensor* x;  // each [...], of any shapes and floating dtypes
  int64_t count;    // of tensors, at least 1
  Tensor out;       // [count] float64
};

void check(const AdamW& op);
void check(const SquareSum& op);

}  // namespace pykern

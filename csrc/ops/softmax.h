// softmax over the last dimension: out = exp(x - max) / sum exp(x - max), over the places where
// mask is true; 0 elsewhere, and in a row without any.   x, mask (bool), out [..., D]
#pragma once
#include "core/tensor.h"

namespace pykern {

struct SoftmaxForward {
  Tensor x, mask, out;
};

struct SoftmaxBackward {
  Tensor out, dout, dx;
};

void check(const SoftmaxForward& op);
void check(const SoftmaxBackward& op);

}  // namespace pykern

// layer_norm: out = (h - mean) rstd weight + bias    rms_norm: out = h rstd weight    h = x +
// residual
//   mean = sum h / D    rstd = 1 / sqrt(var h + eps), var with 1 / D    (rms: sum h^2 / D for var
//   h)
// weight and bias may be float32 beside a half x, out half beside a float32 x, as under autocast.
// x, residual, out, sum [..., D]   weight, bias [D]   mean, rstd [...] stats   sum receives h
#pragma once
#include "core/tensor.h"

namespace pykern {

// rms_norm leaves bias and mean out.
struct NormForward {
  Tensor x, weight, bias, residual, out, sum, mean, rstd;
  double eps;
};
struct LayerNormForward : NormForward {};
struct RmsNormForward : NormForward {};

// dh is the gradient of x and of residual, dsum the one that reached sum.
struct NormBackward {
  Tensor h, weight, mean, rstd, dout, dsum, dh, dweight, dbias;
};
struct LayerNormBackward : NormBackward {};
struct RmsNormBackward : NormBackward {};

void check(const LayerNormForward& op);
void check(const RmsNormForward& op);
void check(const LayerNormBackward& op);
void check(const RmsNormBackward& op);

}  // namespace pykern

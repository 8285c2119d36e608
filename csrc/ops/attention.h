// attention: out = softmax(mask(scale q k^T + bias)) v, without the T x S matrix in memory.
//
//   q [B, H, T, D]   k [B, G, S, D]   v [B, G, S, E]   out [B, H, T, E]   lse [B, H, T]
//
// Head h reads key head h / (H / G). Causal masking aligns the last query with the last key: query
// t sees keys 0 .. S - T + t. mask (bool, true = attend) and bias are expanded to [B, H, T, S]; a
// masked pair has no effect whatever its numbers are. A row that sees no key is 0, its lse -inf.
// lse and dlse may be float64 for every dtype: rounded to float, an lse of 1000 is off by 3e-5, and
// so are the weights that the backward pass recomputes.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct AttentionForward {
  Tensor q, k, v;
  Tensor mask, bias;
  Tensor out, lse;
  bool causal;
  double scale;
};

// With P = exp(score - lse), dP = dout v^T and dS = P (dP - sum(dout out) + dlse):
//   dv = P^T dout   dk = scale dS^T q   dq = scale dS k   dbias = dS, summed where it was expanded
struct AttentionBackward {
  Tensor q, k, v;
  Tensor mask, bias;
  Tensor out, lse, dout, dlse;
  Tensor dq, dk, dv;
  Tensor dbias;  // each size that of [B, H, T, S], or 1
  bool causal;
  double scale;
};

void check(const AttentionForward& op);
void check(const AttentionBackward& op);

}  // namespace pykern

// attention: out = softmax(score) v, without the T x S matrix in memory.
//
//   q [B, H, T, D]   k [B, G, S, D]   v [B, G, S, E]   out [B, H, T, E]   lse [B, H, T]
//
//   score(t, s) = cap(scale q_t k_s) - slope |d - s| + bias(t, s),   d = S - T + t
//   cap(x) = softcap tanh(x / softcap), or x
//
// Head h reads key head h / (H / G). Query t sits on key d, its diagonal ("bottom-right"), and sees
// the keys d - left .. d + right that mask (bool, true = attend) allows; causal is right = 0. mask
// and bias are expanded to [B, H, T, S]; a masked pair has no effect whatever its numbers are. A
// sink is one more logit of each row, with no value. A row without sink that sees no key is 0, its
// lse -inf. Dropout multiplies the weights of out, not those of lse, by 0 or 1 / (1 - p), as the
// position (b, h, t, s) and the seed decide.
//
// Ragged batches: with cu_seqlens the sequences follow one another, q [1, H, total, D]; sequence b
// is rows cu_seqlens_q[b] .. cu_seqlens_q[b + 1] - 1 of q and likewise of k and v.
//
// lse and dlse may be float64 for every dtype: rounded to float, an lse of 1000 is off by 3e-5, and
// so are the weights that the backward pass recomputes.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct AttentionInputs {
  Tensor q, k, v;
  Tensor mask, bias;
  Tensor alibi_slopes;                // float32, expanded to [B, H]
  Tensor sinks;                       // [H]
  Tensor cu_seqlens_q, cu_seqlens_k;  // int32 [sequences + 1]
  Tensor seed;                        // int64, one element
  int64_t left = -1, right = -1;      // -1: unlimited
  double scale = 1, softcap = 0;      // softcap 0: none
  double dropout_p = 0;
};

struct AttentionForward : AttentionInputs {
  Tensor out, lse;  // lse may be absent
};

// With P = exp(score - lse), Z the dropout factors, dP = Z (dout v^T) and
// dS = P (dP - sum(dout out) + dlse):
//   dv = (Z P)^T dout   dbias = dS, summed where it was expanded
//   dk = scale (dS cap')^T q   dq = scale (dS cap') k
//   dsinks = sum over b, t of exp(sink - lse) (dlse - sum(dout out))
struct AttentionBackward : AttentionInputs {
  Tensor out, lse, dout, dlse;
  Tensor dq, dk, dv;
  Tensor dbias;   // each size that of [B, H, T, S], or 1
  Tensor dsinks;  // [H]
};

// weights [B, H, n, S] = P of the n query rows in `rows` (int64; absent: all T), without dropout.
struct AttentionWeights : AttentionInputs {
  Tensor lse, rows, weights;
};

// keep [B, H, T, S], bool: false where dropout with this seed takes the weight away.
struct AttentionDropout {
  Tensor seed, keep;
  double dropout_p;
};

void check(const AttentionForward& op);
void check(const AttentionBackward& op);
void check(const AttentionWeights& op);
void check(const AttentionDropout& op);

}  // namespace pykern

// Every op: its contract, and the list from which the dispatch table and the CUDA twins are made.
#pragma once
#include "ops/activation.h"
#include "ops/adamw.h"
#include "ops/attention.h"
#include "ops/cross_entropy.h"
#include "ops/decode.h"
#include "ops/embedding.h"
#include "ops/linear.h"
#include "ops/lm_step.h"
#include "ops/mlp.h"
#include "ops/norm.h"
#include "ops/roofline.h"
#include "ops/rope.h"
#include "ops/sampling.h"
#include "ops/softmax.h"

// X(kernel, argument struct), a line per kernel. Those with a CUDA kernel:
// clang-format off
#define PYKERN_CUDA_OPS(X) \
  X(layer_norm_forward, LayerNormForward) \
  X(layer_norm_backward, LayerNormBackward) \
  X(rms_norm_forward, RmsNormForward) \
  X(rms_norm_backward, RmsNormBackward) \
  X(softmax_forward, SoftmaxForward) \
  X(softmax_backward, SoftmaxBackward) \
  X(activation_forward, ActivationForward) \
  X(activation_backward, ActivationBackward) \
  X(swiglu_forward, SwigluForward) \
  X(swiglu_backward, SwigluBackward) \
  X(adamw, AdamW) \
  X(square_sum, SquareSum) \
  X(cross_entropy_forward, CrossEntropyForward) \
  X(cross_entropy_backward, CrossEntropyBackward) \
  X(rope, Rope) \
  X(embedding_forward, EmbeddingForward) \
  X(embedding_backward, EmbeddingBackward) \
  X(linear_forward, LinearForward) \
  X(linear_backward, LinearBackward) \
  X(mlp_forward, MlpForward) \
  X(mlp_backward, MlpBackward) \
  X(linear_cross_entropy, LinearCrossEntropy) \
  X(attention_forward, AttentionForward) \
  X(attention_backward, AttentionBackward) \
  X(attention_weights, AttentionWeights) \
  X(attention_dropout, AttentionDropout) \
  X(attention_with_kvcache, DecodeForward) \
  X(sample, Sample) \
  X(lm_step, LmStep) \
  X(lm_generate, LmGenerate) \
  /* end of the list */

// Those that run on the CPU only:
#define PYKERN_CPU_OPS(X) \
  X(roofline_fma, RooflineFma) \
  X(roofline_read, RooflineRead) \
  X(roofline_copy, RooflineCopy) \
  /* end of the list */

#define PYKERN_OPS(X) \
  PYKERN_CUDA_OPS(X) \
  PYKERN_CPU_OPS(X)
// clang-format on

namespace pykern {
#define PYKERN_DECLARE(kernel, Op)          \
  namespace cpu {                           \
  void kernel(const Op& op);                \
  }                                         \
  namespace cuda {                          \
  void kernel(const Op& op, Stream stream); \
  }
PYKERN_OPS(PYKERN_DECLARE)
#undef PYKERN_DECLARE
}  // namespace pykern

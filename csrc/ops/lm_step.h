// lm_step: a Transformer language model (pykern.lm) over new tokens of several texts, all layers in
// one call; lm_generate: that and the choice of the next tokens, several times.
//
//   tokens [R]: the new tokens of text s are rows first_rows[s] .. first_rows[s + 1] - 1, at
//   positions lengths[s], lengths[s] + 1, ... Keys and values go into the pages of block_table[s].
//   x = embedding[token] * embedding_scale + positions[p]
//   every layer   x += attn(norm(x)), x += mlp(norm(x))
//   logits = norm(x) head^T, of every row or of the last row of every text
// Numbers are rounded where the modules of pykern.nn round them, and sums run in the same order:
// on the CPU the logits are those of the model's forward pass, bit for bit. Quantised weights go
// with float32. On CUDA the model and its logits are on the device and all else is on the host;
// weights are numbers, caches are in the dtype of the step, and there is no distance_bias.
#pragma once
#include "core/tensor.h"
#include "ops/activation.h"
#include "ops/packed_weight.h"
#include "ops/sampling.h"

namespace pykern {

struct LmLayer {
  Tensor ln_1_weight, ln_1_bias, ln_2_weight, ln_2_bias;
  PackedWeight attn, proj, up, gate, down;  // gate without panels: not gated
  Tensor attn_bias, proj_bias, up_bias, gate_bias, down_bias;
  Tensor k_cache, v_cache;  // [pages, G, page, D], in the dtype of the step or, with scales, int8
  Tensor k_scale, v_scale;  // float32 [pages, G, page]: a key is its int8 numbers times its scale
};

struct LmModel {
  int64_t n_head = 0, n_kv_head = 0, head_size = 0, hidden = 0, vocabulary = 0;
  bool layer_norm = true;  // else rms_norm
  bool qk_norm = false;
  double norm_eps = 0, qk_norm_eps = 0, scale = 0, embedding_scale = 1;
  Activation activation = Activation::none;
  Tensor embedding;               // [V, E], in the dtype of the step: float32 or bfloat16
  Tensor positions;               // [max_len, E]
  Tensor rotary_cos, rotary_sin;  // float32 [max_len, D / 2]
  Tensor alibi_slopes;            // float32 [H]
  Tensor distance_bias;           // [H, 2 max_len - 1]: of key s and query p at max_len - 1 - p + s
  Tensor ln_f_weight, ln_f_bias;
  PackedWeight head;
  const LmLayer* layers = nullptr;
  int64_t n_layer = 0, max_len = 0;
};

struct LmStep {
  const LmModel* model;
  Tensor tokens;       // int64 [R]
  Tensor first_rows;   // int32 [S + 1], from 0 to R; no text is empty
  Tensor lengths;      // int32 [S], before these tokens
  Tensor block_table;  // int32 [S, n]
  Tensor logits;       // [R, V] or, of the last rows, [S, V]; may be absent
};

// Every text has one token, the one that is not in the cache yet. ids [S, K] int64 receives what
// follows; draws and counts are as in sampling.h and go up. It ends early, with the number of
// columns written in *steps, when a text draws a stop token, or -1 because its logits are broken.
struct LmGenerate {
  LmStep step;
  Tensor ids;
  Tensor seeds, draws;
  Tensor history, counts;  // history has room for K more
  Tensor stop_tokens;      // int64 [n]
  Sampling options;
  int64_t* steps;
};

void check(const LmModel& model);
void check(const LmStep& op);
void check(const LmGenerate& op);

}  // namespace pykern

// sample: the next token of each row of logits [B, V].
//   l = logits, those of tokens in the row's history divided (if positive) or multiplied (if not)
//   by repetition_penalty (Keskar et al., arXiv 1909.05858). temperature 0: the token of the
//   largest l, the lowest id among equals. Otherwise the candidates are the top_k tokens of the
//   largest l, of those the shortest list, most likely first, whose share of exp(l / temperature)
//   reaches top_p, and of those the ones at least min_p times as likely as the first. One is drawn
//   in proportion to exp(l / temperature).
// The list is walked most likely first, or by id where nothing is cut, up to the first token at
// which the sum passes the draw. The draw is a number in [0, 1) of Philox4x32-10(counter =
// draws[b], key = seeds[b]): a function of the row's seed and of how many tokens it has drawn,
// whatever the other rows are.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct Sampling {
  double temperature = 1, top_p = 1, min_p = 0, repetition_penalty = 1;
  int64_t top_k = 0;  // 0: all
};

struct Sample {
  Tensor logits;        // [B, V] float32, float64, bfloat16 or float16
  Tensor seeds, draws;  // int64 [B]
  Tensor history,
      counts;  // int64 [B, n] tokens, of which the first counts[b] of row b; may be absent
  Tensor ids;  // int64 [B], out; -1 where a logit is NaN or the largest is infinite
  Sampling options;
};

void check(const Sampling& options, const char* op);
// IndexError unless counts [B] and the tokens that they count are in range, with room for `more`
void check_history(const char* op, const Tensor& history, const Tensor& counts, int64_t more,
                   int64_t V);
void check(const Sample& op);

}  // namespace pykern

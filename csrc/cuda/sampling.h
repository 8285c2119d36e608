// The choice of the next token of each text, by itself (sample) or at the end of a step
// (lm_step.cu).
#pragma once
#include "core/tensor.h"
#include "cuda/launch.h"
#include "ops/sampling.h"

namespace pykern::cuda {

// What the texts of lm_generate carry from one step to the next, all on the device. A step begins
// with now += 1; last becomes the number of the first step in which some text has drawn a stop
// token, or -1: later steps choose nothing and leave everything as it is.
struct Running {
  int64_t* tokens = nullptr;   // [S]; null: a choice by itself
  int32_t* lengths = nullptr;  // [S]; -1 once all steps that follow are for nobody
  int *now = nullptr, *last = nullptr;
  int steps = 0;  // K, which last is until then
  const int64_t* stop_tokens = nullptr;
  int64_t stops = 0;
};

// ids [B] or, of running texts, [B, K]: column now - 1. seeds and draws [B], history [B, n] and
// counts [B] as in ops/sampling.h; those of running texts go up.
struct Choice {
  Tensor logits, seeds, draws, history, counts, ids;
  Sampling options;
  Running running;
};

size_t choice_bytes(const Choice& c);  // of scratch memory
void choose(const Choice& c, void* scratch, Stream stream);

}  // namespace pykern::cuda

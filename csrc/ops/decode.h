// decode: attention against a key/value cache, after appending the new keys and values to it.
//
//   q [B, H, T, D]   k_cache [B, G, C, D]   v_cache [B, G, C, E]   out [B, H, T, E]   lse [B, H, T]
//   k [B, G, N, D]   v [B, G, N, E]         cache_seqlens [B]: keys in the cache before the append
//   rotary_cos, rotary_sin [P, R/2]: rotate q (its last T positions) and k at their positions
//
// Sequence b then holds S = cache_seqlens[b] + N keys. Scores, window, caps, slopes and sinks are
// those of attention. Slots behind S are never read.
//
// With cache_leftpad the first key of sequence b is in slot cache_leftpad[b], not 0: positions
// count from there, and S = cache_seqlens[b] + N - cache_leftpad[b].
//
// Paged: with block_table [B, n] the caches are [pages, G, page, D | E], and key s of sequence b is
// slot s % page of page block_table[b][s / page].
#pragma once
#include "core/tensor.h"

namespace pykern {

struct DecodeForward {
  Tensor q, k_cache, v_cache;
  Tensor k, v;
  Tensor cache_seqlens, cache_leftpad;  // int32 [B], in slots
  Tensor rotary_cos, rotary_sin;
  Tensor block_table;       // int32 [B, n]
  Tensor alibi_slopes;      // float32, expanded to [B, H]
  Tensor sinks;             // [H]
  Tensor k_scale, v_scale;  // of lm_step's int8 caches, see there
  Tensor out, lse;
  int64_t left = -1, right = -1;  // -1: unlimited
  double scale = 1, softcap = 0;
  bool rotary_interleaved = false;
};

void check(const DecodeForward& op);

}  // namespace pykern

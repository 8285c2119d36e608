// decode: attention against a key/value cache, after appending the new keys and values to it.
//
//   q [B, H, T, D]   k_cache [B, G, C, D]   v_cache [B, G, C, E]   out [B, H, T, E]   lse [B, H, T]
//   k [B, G, N, D]   v [B, G, N, E]         cache_seqlens [B]: keys in the cache before the append
//   rotary_cos, rotary_sin [P, R/2]: rotate q (its last T positions) and k at their positions
//
// Sequence b then holds S = cache_seqlens[b] + N keys; causal: query t sees keys 0 .. S - T + t.
// Slots behind S are never read.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct DecodeForward {
  Tensor q, k_cache, v_cache;
  Tensor k, v;
  Tensor cache_seqlens;
  Tensor rotary_cos, rotary_sin;
  Tensor out, lse;
  bool causal;
  double scale;
  bool rotary_interleaved;
};

void check(const DecodeForward& op);

}  // namespace pykern

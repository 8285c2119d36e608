// rope: each pair (a, b) of x becomes (a cos - b sin, a sin + b cos), with the angle of its
// position.
//   x, out [B, H, T, D]   cos, sin [P, R/2], R <= D   positions [T] or [B, T], absent: 0..T-1
// Pairs are (i, i + R/2), or (2i, 2i + 1) when interleaved; numbers from R on are copied.
#pragma once
#include "core/tensor.h"

namespace pykern {

struct Rope {
  Tensor x, cos, sin, positions, out;
  bool interleaved;
  bool inverse;  // by minus the angle: the gradient
};

void check(const Rope& op);

}  // namespace pykern

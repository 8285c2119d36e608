// embedding: out[...] = weight[ids[...]];  dweight[v] = sum of dout over the places where ids = v.
//   weight, dweight [V, D]   ids [...] int64 or int32   out, dout [..., D]
#pragma once
#include "core/tensor.h"

namespace pykern {

struct EmbeddingForward {
  Tensor weight, ids, out;
};

struct EmbeddingBackward {
  Tensor ids, dout, dweight;
};

void check(const EmbeddingForward& op);
void check(const EmbeddingBackward& op);

}  // namespace pykern

// roofline: how fast this processor multiplies, reads and copies when nothing is in the way. The
// caller holds the watch; a task per element of sink, whose result lands there.
#pragma once
#include "core/tensor.h"

namespace pykern {

// Chains of multiply-adds in the arithmetic that kernels use for sink's dtype.
struct RooflineFma {
  Tensor sink;      // [tasks]
  int64_t repeats;  // rounds of every chain
  double* flops;    // receives the number of operations, an addition and a multiplication each
};

// Each task sums its part of source, repeats times over.
struct RooflineRead {
  Tensor source, sink;  // float32 [n], [tasks]
  int64_t repeats;
};

// Each task copies its part, repeats times over.
struct RooflineCopy {
  Tensor source, target;  // float32 [n]
  int64_t tasks, repeats;
};

void check(const RooflineFma& op);
void check(const RooflineRead& op);
void check(const RooflineCopy& op);

}  // namespace pykern

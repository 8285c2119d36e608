// A weight [N, K] laid out for reading in order, once per step, as pykern/lm/packing.py makes it.
// W rows of it, a panel, are side by side, unit of k after unit:
//   numbers  panels [P, K, W] in the dtype of the step; where the ISA multiplies pairs of bfloat16,
//            [P, ceil(K / 2), W, 2]
//   int8     panels [P, K, W], q;        weight = q scale,        scales [P, ceil(K / group), 1, W]
//   int4     panels [P, K, W / 2], q - 8 in two's complement: the low four bits of byte i are row i
//            of the panel, the high ones row W / 2 + i;
//                                        weight = q scale + low,  scales [P, ceil(K / group), 2, W]
// On CUDA numbers are not packed: panels are [N, K].
// scales are bfloat16: scale, then low. Rows from N on and what is behind K are zeros.
#pragma once
#include "core/tensor.h"

namespace pykern {

enum class WeightKind : uint8_t { numbers, int8, int4 };

struct PackedWeight {
  Tensor panels, scales;
  int64_t N = 0, K = 0, group = 0;
  WeightKind kind = WeightKind::numbers;
};

}  // namespace pykern

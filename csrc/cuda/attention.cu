// attention, forward: which kernel takes a call.
#include "cuda/attention_halves.h"
#include "cuda/attention_plain.h"

namespace pykern::cuda {

void attention_forward(const AttentionForward& op, Stream stream) {
  if (count(op.q) == 0) return;
  const OnDevice device(op.q);
  const PackedMask mask(op.mask, stream);
  with_type(op.q.dtype, [&]<class T>(T) {
    const Scores<T> x = scores_of<T>(op, mask.bits());
    if constexpr (kHalf<T>)
      halves_forward<T>(op, x, stream);
    else
      plain_forward<T>(op, x, stream);
  });
}

}  // namespace pykern::cuda

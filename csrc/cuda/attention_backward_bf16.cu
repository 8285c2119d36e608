#include "cuda/attention_halves_backward.cuh"

namespace pykern::cuda {

template bool halves_backward<bf16>(const AttentionBackward&, const Scores<bf16>&,
                                    const RowFacts<float>*, Stream);

}  // namespace pykern::cuda

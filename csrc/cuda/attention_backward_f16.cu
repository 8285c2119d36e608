#include "cuda/attention_halves_backward.cuh"

namespace pykern::cuda {

template bool halves_backward<f16>(const AttentionBackward&, const Scores<f16>&,
                                   const RowFacts<float>*, Stream);

}  // namespace pykern::cuda

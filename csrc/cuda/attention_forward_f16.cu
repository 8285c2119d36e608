#include "cuda/attention_forward.cuh"

namespace pykern::cuda {

template void halves_forward<f16>(const AttentionForward&, const Scores<f16>&, Stream);

}  // namespace pykern::cuda

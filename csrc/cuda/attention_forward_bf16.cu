#include "cuda/attention_forward.cuh"

namespace pykern::cuda {

template void halves_forward<bf16>(const AttentionForward&, const Scores<bf16>&, Stream);

}  // namespace pykern::cuda

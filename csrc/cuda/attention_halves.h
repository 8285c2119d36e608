// Attention of bfloat16 and float16 on tensor cores.
#pragma once
#include "cuda/attention.cuh"

namespace pykern::cuda {

template <class T>
void halves_forward(const AttentionForward& op, const Scores<T>& x, Stream stream);

// dq, dk and dv from facts [B, H, T]; false where the GPU has too little shared memory for these
// heads, and then nothing was done.
template <class T>
bool halves_backward(const AttentionBackward& op, const Scores<T>& x, const RowFacts<float>* facts,
                     Stream stream);

}  // namespace pykern::cuda

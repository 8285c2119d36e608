// Attention by FMA, in the arithmetic of Compute<T>: what attention.cu and attention_backward.cu
// call. facts are [B, H, T]; a packed batch is [1, H, total].
#pragma once
#include "cuda/attention.cuh"

namespace pykern::cuda {

template <class T>
void plain_forward(const AttentionForward& op, const Scores<T>& x, Stream stream);

// dq, dk and dv
template <class T>
void plain_backward(const AttentionBackward& op, const Scores<T>& x,
                    const RowFacts<Compute<T>>* facts, Stream stream);

// dbias (attention_bias.cu)
template <class T>
void bias_gradient(const AttentionBackward& op, const Scores<T>& x,
                   const RowFacts<Compute<T>>* facts, Stream stream);

}  // namespace pykern::cuda

// The rotation of rope, wherever it happens: a pack of pairs at a time, the bits are the same.
#pragma once
#include "cuda/rows.cuh"

namespace pykern::cuda {

// The packs of 2 W neighbours as left and right numbers of W pairs, and back.
template <class C, int W>
__device__ __forceinline__ void unzip(const C (&low)[W], const C (&high)[W], C (&left)[W],
                                      C (&right)[W]) {
#pragma unroll
  for (int j = 0; j < W / 2; ++j) {
    left[j] = low[2 * j], right[j] = low[2 * j + 1];
    left[W / 2 + j] = high[2 * j], right[W / 2 + j] = high[2 * j + 1];
  }
}
template <class C, int W>
__device__ __forceinline__ void zip(const C (&left)[W], const C (&right)[W], C (&low)[W],
                                    C (&high)[W]) {
#pragma unroll
  for (int j = 0; j < W / 2; ++j) {
    low[2 * j] = left[j], low[2 * j + 1] = right[j];
    high[2 * j] = left[W / 2 + j], high[2 * j + 1] = right[W / 2 + j];
  }
}

// Pairs first .. first + W - 1 of the `half` pairs of a row x, turned by the angles of c and s.
template <bool interleaved, class T, int W>
__device__ __forceinline__ void turn_pack(const T* x, T* out, int64_t half, int64_t first,
                                          bool vectors, const Compute<T> (&c)[W],
                                          const Compute<T> (&s)[W]) {
  using C = Compute<T>;
  const int64_t valid = half - first;
  C left[W], right[W], low[W], high[W];
  if constexpr (interleaved) {
    load(x + 2 * first, 2 * valid, vectors, low);
    load(x + 2 * first + W, 2 * valid - W, vectors, high);
    unzip(low, high, left, right);
  } else {
    load(x + first, valid, vectors, left);
    load(x + half + first, valid, vectors, right);
  }
#pragma unroll
  for (int j = 0; j < W; ++j) {
    const C l = left[j], r = right[j];
    left[j] = fma(l, c[j], -(r * s[j]));
    right[j] = fma(r, c[j], l * s[j]);
  }
  if constexpr (interleaved) {
    zip(left, right, low, high);
    store(out + 2 * first, 2 * valid, vectors, low);
    store(out + 2 * first + W, 2 * valid - W, vectors, high);
  } else {
    store(out + first, valid, vectors, left);
    store(out + half + first, valid, vectors, right);
  }
}

}  // namespace pykern::cuda

// Tensors as rows: where a row begins, and how a thread reads and writes its numbers of one, 16
// bytes at a time where the addresses allow it.
#pragma once
#include <string.h>

#include <initializer_list>
#include <type_traits>

#include "cuda/launch.h"
#include "cuda/types.cuh"
#include "ops/check.h"

namespace pykern::cuda {

// a / b of numbers that are not negative, mostly small ones: division of 64 bits is a hundred
// instructions.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// All dimensions but the last, neighbours that can be walked with one stride merged.
struct Rows {
  void* data = nullptr;
  int rank = 0;  // after merging; 1 for most tensors
  int64_t size[kMaxRank] = {}, stride[kMaxRank] = {};

  __device__ __forceinline__ int64_t offset(int64_t row) const {  // in elements
    int64_t at = 0;
#pragma unroll 1
    for (int i = rank - 1; i > 0; --i) {  // rare
      const int64_t above = quotient(row, size[i]);
      at += (row - above * size[i]) * stride[i];
      row = above;
    }
    return at + row * stride[0];  // of rank 0 it is 0
  }
};

inline Rows rows_of(const Tensor& t) {
  Rows rows;
  rows.data = t.data;
  for (int i = 0; i < t.rank - 1; ++i) {
    if (t.size[i] == 1) continue;
    const int last = rows.rank - 1;
    if (last >= 0 && rows.stride[last] == t.stride[i] * t.size[i]) {
      rows.size[last] *= t.size[i];
      rows.stride[last] = t.stride[i];
    } else {
      rows.size[rows.rank] = t.size[i];
      rows.stride[rows.rank++] = t.stride[i];
    }
  }
  return rows;
}

// [...] as [..., 1], so that its numbers are rows
inline Tensor column(Tensor t) {
  t.size[t.rank] = t.stride[t.rank] = 1;
  ++t.rank;
  return t;
}

template <class T>
constexpr int kPack = 16 / sizeof(T);

// Whether `count` neighbours of every row can be moved 16 bytes at a time, or as wide as they are.
inline bool takes_words(const Tensor& t, int count) {
  if (!t.given) return true;
  const int64_t item = item_size(t.dtype), width = count * item, step = width < 16 ? width : 16;
  bool fits = reinterpret_cast<uintptr_t>(t.data) % step == 0;
  for (int i = 0; i < t.rank - 1; ++i)
    fits = fits && (t.size[i] == 1 || t.stride[i] * item % step == 0);
  return fits;
}
template <class T>
bool takes_packs(const Tensor& t) {
  return takes_words(t, kPack<T>);
}
template <class T>
bool take_packs(std::initializer_list<const Tensor*> tensors) {
  bool all = true;
  for (const Tensor* t : tensors) all = all && takes_packs<T>(*t);
  return all;
}

// n neighbours of T, and the words they are moved as
template <class T, int n>
struct Pack {
  static constexpr int kBytes = n * sizeof(T);
  using Word = std::conditional_t<kBytes % 16 == 0, uint4,
                                  std::conditional_t<kBytes % 8 == 0, uint2, uint32_t>>;
  static constexpr int kWords = kBytes / sizeof(Word);
  alignas(Word) T of[n];
};

// n numbers from p on, the first `valid` of which exist, the others 0; vectors: all of a row's
// packs are aligned
template <class T, int n>
__device__ __forceinline__ void read(const T* p, int64_t valid, bool vectors, Pack<T, n>& pack) {
  if (vectors && valid >= n) {
    using P = Pack<T, n>;
#pragma unroll
    for (int w = 0; w < P::kWords; ++w) {
      const typename P::Word word = reinterpret_cast<const typename P::Word*>(p)[w];
      memcpy(reinterpret_cast<char*>(&pack) + w * sizeof word, &word, sizeof word);
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) pack.of[j] = j < valid ? p[j] : T{};
  }
}

template <class T, int n>
__device__ __forceinline__ void widen(const Pack<T, n>& pack, Compute<T> (&v)[n]) {
  if constexpr (std::is_same_v<T, bf16> && n % 2 == 0) {  // two of a word
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      uint32_t word;
      memcpy(&word, &pack.of[j], sizeof word);
      v[j] = __uint_as_float(word << 16);
      v[j + 1] = __uint_as_float(word & 0xffff0000);
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) v[j] = widen(pack.of[j]);
  }
}
template <class T, int n, class C>
__device__ __forceinline__ void narrow(const C (&v)[n], Pack<T, n>& pack) {
  if constexpr (sizeof(T) == 2 && sizeof(C) == sizeof(float) && n % 2 == 0) {
#pragma unroll
    for (int j = 0; j < n; j += 2) {
      const uint32_t word =
          std::is_same_v<T, bf16> ? bf16_pair(v[j], v[j + 1]) : f16_pair(v[j], v[j + 1]);
      memcpy(&pack.of[j], &word, sizeof word);
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j) pack.of[j] = narrow<T>(v[j]);
  }
}

template <class T, int n>
__device__ __forceinline__ void load(const T* p, int64_t valid, bool vectors, Compute<T> (&v)[n]) {
  Pack<T, n> pack;
  read(p, valid, vectors, pack);
  widen(pack, v);
}

template <class T, int n, class C>
__device__ __forceinline__ void store(T* p, int64_t valid, bool vectors, const C (&v)[n]) {
  if (vectors && valid >= n) {
    using P = Pack<T, n>;
    P pack;
    narrow(v, pack);
#pragma unroll
    for (int w = 0; w < P::kWords; ++w) {
      typename P::Word word;
      memcpy(&word, reinterpret_cast<const char*>(&pack) + w * sizeof word, sizeof word);
      store_word(reinterpret_cast<typename P::Word*>(p) + w, word);
    }
  } else {
#pragma unroll
    for (int j = 0; j < n; ++j)
      if (j < valid) p[j] = narrow<T>(v[j]);
  }
}

// Numbers beside rows of T that may be of another type: float32 beside a half T, a half one beside
// float32.
template <class T>
struct Numbers {
  void* data = nullptr;  // null: absent
  DType dtype = DType::f32;

  template <int n>
  __device__ __forceinline__ void load(int64_t first, int64_t valid, bool vectors,
                                       Compute<T> (&v)[n]) const {
    as_stored([&](auto* numbers) { cuda::load(numbers + first, valid, vectors, v); });
  }
  template <int n>
  __device__ __forceinline__ void store(int64_t first, int64_t valid, bool vectors,
                                        const Compute<T> (&v)[n]) const {
    as_stored([&](auto* numbers) { cuda::store(numbers + first, valid, vectors, v); });
  }

 private:
  template <class Body>
  __device__ __forceinline__ void as_stored(const Body& body) const {
    if constexpr (sizeof(T) == sizeof(double))
      body(static_cast<double*>(data));
    else if (dtype == kDType<T>)
      body(static_cast<T*>(data));
    else if (dtype == DType::f32)
      body(static_cast<float*>(data));
    else if (dtype == DType::bf16)
      body(static_cast<bf16*>(data));
    else
      body(static_cast<f16*>(data));
  }
};

template <class T>
Numbers<T> numbers_of(const Tensor& t) {
  return {t.data, t.dtype};
}

}  // namespace pykern::cuda

// Packing: lanes of a matrix side by side, unit after unit: out[u * width + i] = lane i at unit u.
// A lane is a row of A or a column of B. Missing lanes and an odd last half pair are zero.
#pragma once
#include "cpu/tile.h"

PYKERN_BEGIN_ISA
namespace {

// A source of lanes: number (lane i, k) is data[i * lane + k * step].
template <class T>
struct Lanes {
  const T* data;
  int64_t lane, step;
};

// The next units of a lane whose numbers are contiguous; n numbers are left, zeros follow.
template <class T>
static inline Vec<Compute<T>> load_units(const T* p, int64_t n) {
  using V = Vec<Compute<T>>;
  constexpr int numbers = V::lanes * kUnit<T>;
  if constexpr (kPaired<T>) {
    T buffer[numbers] = {};
    if (n < numbers) {
      memcpy(buffer, p, n * sizeof(T));
      p = buffer;
    }
    V v;
    memcpy(&v.r, p, sizeof v.r);
    return v;
  } else {
    return n >= numbers ? load(p) : load(p, static_cast<int>(n));
  }
}

// One unit of contiguous lanes: the numbers at p, paired with those at next (null: zeros).
template <class T>
static inline Vec<Compute<T>> load_lanes(const T* p, const T* next, int64_t n) {
  using V = Vec<Compute<T>>;
  if constexpr (kPaired<T>) {
    using Bits = Registers<float>::Bits;
    const V even = n >= V::lanes ? load(p) : load(p, static_cast<int>(n));
    V odd = V::zero();
    if (next) odd = n >= V::lanes ? load(next) : load(next, static_cast<int>(n));
    return {(typename V::Reg)(((Bits)even.r >> 16) | (Bits)odd.r)};  // widening put bf16 on top
  } else {
    return n >= V::lanes ? load(p) : load(p, static_cast<int>(n));
  }
}

// Packs lanes 0..valid-1 of width, k numbers each. available >= valid lanes may be read. Whole
// vectors are stored, so up to one vector behind out[units * width] is overwritten.
template <class T>
static void pack(Compute<T>* out, int width, Lanes<T> from, int valid, int64_t available,
                 int64_t k) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes;
  const int64_t count = units<T>(k);
  if (from.step == 1) {  // transpose squares of L lanes and L units
    for (int first = 0; first < width; first += L) {
      for (int64_t u = 0; u < count; u += L) {
        V square[L];
        const int64_t left = k - u * kUnit<T>;
        for (int i = 0; i < L; ++i)
          square[i] = first + i < valid
                          ? load_units<T>(from.data + (first + i) * from.lane + u * kUnit<T>, left)
                          : V::zero();
        transpose(square);
        const int rows = count - u < L ? static_cast<int>(count - u) : L;
        if (first + L <= width || first == 0) {  // surplus lanes: the next unit overwrites them
          for (int i = 0; i < rows; ++i) store(out + (u + i) * width + first, square[i]);
        } else {  // here they would overwrite lanes that an earlier pass has written
          for (int i = 0; i < rows; ++i)
            store(out + (u + i) * width + first, square[i], width - first);
        }
      }
    }
  } else if (from.lane == 1) {  // copy
    for (int64_t u = 0; u < count; ++u) {
      const T* p = from.data + u * kUnit<T> * from.step;
      const T* next = u * kUnit<T> + 1 < k ? p + from.step : nullptr;
      for (int first = 0; first < width; first += L) {
        V v = first < valid
                  ? load_lanes<T>(p + first, next ? next + first : nullptr, available - first)
                  : V::zero();
        if (valid - first < L && first < valid) {
          C lanes[L];
          store(lanes, v);
          for (int i = valid - first; i < L; ++i) lanes[i] = C(0);
          v = load(lanes);
        }
        store(out + u * width + first, v);
      }
    }
  } else {  // strided both ways
    for (int64_t u = 0; u < count; ++u)
      for (int i = 0; i < width; ++i) {
        T numbers[kUnit<T>] = {};
        for (int64_t p = 0; p < kUnit<T>; ++p)
          if (i < valid && u * kUnit<T> + p < k)
            numbers[p] = from.data[i * from.lane + (u * kUnit<T> + p) * from.step];
        if constexpr (kPaired<T>)
          memcpy(out + u * width + i, numbers, sizeof numbers);
        else
          out[u * width + i] = widen(numbers[0]);
      }
  }
}

}  // namespace
PYKERN_END_ISA

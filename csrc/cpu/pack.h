// Packing: lanes of a matrix side by side, unit after unit: out[u * width + i] = lane i at unit u.
// A lane is a row of A or a column of B. Missing lanes and an odd last half pair are zero. Numbers
// of a source type S other than T (float32 beside a half T) are rounded to T on the way.
#pragma once
#include "cpu/tile.h"

PYKERN_BEGIN_ISA
namespace {

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// A source of lanes: number (lane i, k) is data[i * lane + k * step].
template <class S>
struct Lanes {
  const S* data;
  int64_t lane, step;
};

// v with the precision of T
template <class T>
static inline Vec<Compute<T>> rounded(Vec<Compute<T>> v) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return v;
  } else {
    T numbers[Vec<Compute<T>>::lanes];
    store(numbers, v);
    return load(numbers);
  }
}

template <class T, class S>
static inline T convert(S x) {
  if constexpr (kSame<T, S>)
    return x;
  else
    return narrow<T>(x);
}

// n numbers of S with the precision of T; whole vectors are the common case
template <class T, class S>
static inline Vec<Compute<T>> load_rounded(const S* p, int64_t n) {
  constexpr int lanes = Vec<Compute<T>>::lanes;
  const auto v = n >= lanes ? load(p) : load(p, static_cast<int>(n));
  if constexpr (kSame<T, S>)
    return v;
  else
    return rounded<T>(v);
}

// The next units of a lane whose numbers are contiguous; n numbers are left, zeros follow.
template <class T, class S>
static inline Vec<Compute<T>> load_units(const S* p, int64_t n) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T> && kSame<S, float>) {
    constexpr int lanes = VecF::lanes;
    const VecF first = n >= lanes ? load(p) : load(p, static_cast<int>(n));
    if (n <= lanes) return pack_neighbours(first, VecF::zero());
    const int64_t rest = n - lanes;
    return pack_neighbours(
        first, rest >= lanes ? load(p + lanes) : load(p + lanes, static_cast<int>(rest)));
  }
#endif
  if constexpr (kPaired<T>) {
    using V = Vec<Compute<T>>;
    constexpr int numbers = V::lanes * kUnit<T>;
    S buffer[numbers] = {};
    if (n < numbers) {
      memcpy(static_cast<void*>(buffer), p, n * sizeof(S));
      p = buffer;
    }
    V v;
    memcpy(&v.r, p, sizeof v.r);
    return v;
  } else {
    return load_rounded<T>(p, n);
  }
}

// One unit of contiguous lanes: the numbers at p, paired with those at next (null: zeros).
template <class T, class S>
static inline Vec<Compute<T>> load_lanes(const S* p, const S* next, int64_t n) {
  using V = Vec<Compute<T>>;
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T> && kSame<S, float>)
    return pack_pairs(load_rounded<float>(p, n), next ? load_rounded<float>(next, n) : V::zero());
#endif
  if constexpr (kPaired<T>) {
    using Bits = Registers<float>::Bits;
    const V even = load_rounded<T>(p, n), odd = next ? load_rounded<T>(next, n) : V::zero();
    return {(typename V::Reg)(((Bits)even.r >> 16) | (Bits)odd.r)};  // widening put bf16 on top
  } else {
    return load_rounded<T>(p, n);
  }
}

// Packs strips of width lanes, strip_size numbers apart, from lanes that lie side by side: unit by
// unit for all strips, so that memory is read in long runs. Of each vector of lanes as pack() says.
template <class T, class S>
static void pack_copies(Compute<T>* out, int width, int64_t strips, int64_t strip_size,
                        Lanes<S> from, int64_t valid, int64_t available, int64_t k) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int L = V::lanes;
  const int64_t count = units<T>(k);
  const int whole_width = (width + L - 1) / L * L;  // of lanes read and, but for the last, stored
  const bool room = whole_width == width || whole_width == L;
  int64_t whole = valid < whole_width ? 0 : (valid - whole_width) / width + 1;
  whole = !room ? 0 : whole < strips ? whole : strips;
  for (int64_t u = 0; u < count; ++u) {
    const S* p = from.data + u * kUnit<T> * from.step;
    const S* next = u * kUnit<T> + 1 < k ? p + from.step : nullptr;
    C* to = out + u * width;
    int64_t s = 0;
    if (next || !kPaired<T>)
      for (; s < whole; ++s)
        for (int i = 0; i < whole_width; i += L)  // surplus lanes: the next unit overwrites them
          store(to + s * strip_size + i,
                load_lanes<T, S>(p + s * width + i, next + s * width + i, L));
    for (; s < strips; ++s)
      for (int i = 0; i < width; i += L) {
        const int64_t first = s * width + i, left = valid - first;
        V v = left > 0
                  ? load_lanes<T, S>(p + first, next ? next + first : nullptr, available - first)
                  : V::zero();
        if (left > 0 && left < L)
          v = select(lanes_of<C>((uint64_t{1} << left) - 1, 0), v, V::zero());
        if (i == 0 || i + L <= width)
          store(to + s * strip_size + i, v);
        else  // here surplus lanes would overwrite those that are written already
          store(to + s * strip_size + i, v, width - i);
      }
  }
}

// Packs lanes 0..valid-1 of width, k numbers each. available >= valid lanes may be read. Whole
// vectors are stored, so up to one vector behind out[units * width] is overwritten.
template <class T, class S = T>
static void pack(Compute<T>* out, int width, Lanes<S> from, int valid, int64_t available,
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
          square[i] =
              first + i < valid
                  ? load_units<T, S>(from.data + (first + i) * from.lane + u * kUnit<T>, left)
                  : V::zero();
        if (first < valid) transpose(square);
        const int rows = count - u < L ? static_cast<int>(count - u) : L;
        if (first + L <= width || first == 0) {  // surplus lanes: the next unit overwrites them
          for (int i = 0; i < rows; ++i) store(out + (u + i) * width + first, square[i]);
        } else {  // here they would overwrite lanes that an earlier pass has written
          for (int i = 0; i < rows; ++i)
            store(out + (u + i) * width + first, square[i], width - first);
        }
      }
    }
  } else if (from.lane == 1) {
    pack_copies<T, S>(out, width, 1, 0, from, valid, available, k);
  } else {  // strided both ways
    for (int64_t u = 0; u < count; ++u)
      for (int i = 0; i < width; ++i) {
        T numbers[kUnit<T>] = {};
        for (int64_t p = 0; p < kUnit<T>; ++p)
          if (i < valid && u * kUnit<T> + p < k)
            numbers[p] = convert<T>(from.data[i * from.lane + (u * kUnit<T> + p) * from.step]);
        if constexpr (kPaired<T>)
          memcpy(out + u * width + i, numbers, sizeof numbers);
        else
          out[u * width + i] = widen(numbers[0]);
      }
  }
}

}  // namespace
PYKERN_END_ISA

// Vec<float>, Vec<double>: as many numbers as one register of this ISA holds. The same names and
// the same meaning on every ISA; intrinsics are in this file and in vec.h only. Storage types are
// float, double, bf16 and f16: the last two are computed in float.
#pragma once
#include <stdint.h>
#include <string.h>

#include <utility>  // integer_sequence
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/isa.h"

PYKERN_BEGIN_ISA
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;

template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

template <class C>
struct Registers;
template <>
struct Registers<float> {
  typedef float Reg __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Bit;
  typedef Bit Bits __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Registers<double> {
  typedef double Reg __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t Bit;
  typedef Bit Bits __attribute__((vector_size(kVectorBytes)));
};

// One of two per lane: the result of a comparison, all ones or all zeros.
template <class C>
struct Mask {
  typename Registers<C>::Int r;
  Mask operator&(Mask b) const { return {r & b.r}; }
  Mask operator|(Mask b) const { return {r | b.r}; }
};

template <class C>
struct Vec {
  using Reg = typename Registers<C>::Reg;
  static constexpr int lanes = kVectorBytes / sizeof(C);
  Reg r;

  static Vec zero() { return {Reg{}}; }
  static Vec splat(C x);
  Vec operator+(Vec b) const { return {r + b.r}; }
  Vec operator-(Vec b) const { return {r - b.r}; }
  Vec operator*(Vec b) const { return {r * b.r}; }
  Vec operator/(Vec b) const { return {r / b.r}; }
  Vec operator-() const { return {-r}; }
  Mask<C> operator<(Vec b) const { return {r < b.r}; }
  Mask<C> operator>(Vec b) const { return {r > b.r}; }
  Mask<C> operator==(Vec b) const { return {r == b.r}; }
  Mask<C> operator!=(Vec b) const { return {r != b.r}; }

  // Halves are combined until one lane is left: a fixed tree, the same on every call.
  C sum() const;
  C max() const;  // of lanes without NaN
};

using VecF = Vec<float>;
using VecD = Vec<double>;

// Moves bits, whatever they mean: a lane may hold a pair of bf16.
template <class C>
[[gnu::always_inline]] inline Vec<C> Vec<C>::splat(C x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    return {(Reg)_mm512_set1_ps(x)};
  else
    return {(Reg)_mm512_set1_pd(x)};
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4)
    return {(Reg)_mm256_set1_ps(x)};
  else
    return {(Reg)_mm256_set1_pd(x)};
#else
  return {x - Reg{}};
#endif
}

// ---- arithmetic

#if defined(__FMA__)
constexpr bool kFused = true;  // fma() rounds once
#else
constexpr bool kFused = false;
#endif

static inline VecF fma(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return {(VecF::Reg)_mm512_fmadd_ps((__m512)a.r, (__m512)b.r, (__m512)c.r)};
#elif defined(__AVX2__)
  return {(VecF::Reg)_mm256_fmadd_ps((__m256)a.r, (__m256)b.r, (__m256)c.r)};
#else
  return {a.r * b.r + c.r};
#endif
}
static inline VecD fma(VecD a, VecD b, VecD c) {
#if defined(__AVX512F__)
  return {(VecD::Reg)_mm512_fmadd_pd((__m512d)a.r, (__m512d)b.r, (__m512d)c.r)};
#elif defined(__AVX2__)
  return {(VecD::Reg)_mm256_fmadd_pd((__m256d)a.r, (__m256d)b.r, (__m256d)c.r)};
#else
  return {a.r * b.r + c.r};
#endif
}

#if defined(__AVX512F__)
// x 2^n for integral n, right also below the normal range
static inline VecF scale_exponent(VecF x, VecF n) {
  return {(VecF::Reg)_mm512_scalef_ps((__m512)x.r, (__m512)n.r)};
}
#endif

// To the nearest integer. Adding and subtracting 1.5 * 2^23 rounds where no instruction does.
static inline VecF round(VecF x) {
#if defined(__AVX512F__)
  return {(VecF::Reg)_mm512_roundscale_ps((__m512)x.r, _MM_FROUND_TO_NEAREST_INT)};
#elif defined(__AVX2__)
  return {(VecF::Reg)_mm256_round_ps((__m256)x.r, _MM_FROUND_TO_NEAREST_INT)};
#else
  const VecF magic = VecF::splat(12582912.0f);
  return {(x.r + magic.r) - magic.r};
#endif
}

template <class C>
static inline Vec<C> select(Mask<C> m, Vec<C> yes, Vec<C> no) {
  return {m.r ? yes.r : no.r};
}
// A NaN in a is kept, a NaN in b is not.
template <class C>
static inline Vec<C> max(Vec<C> a, Vec<C> b) {
  return select(b > a, b, a);
}
template <class C>
static inline Vec<C> min(Vec<C> a, Vec<C> b) {
  return select(b < a, b, a);
}
#if defined(__AVX512F__)  // one instruction, of which the second operand is kept
static inline VecF max(VecF a, VecF b) {
  return {(VecF::Reg)_mm512_max_ps((__m512)b.r, (__m512)a.r)};
}
static inline VecF min(VecF a, VecF b) {
  return {(VecF::Reg)_mm512_min_ps((__m512)b.r, (__m512)a.r)};
}
#elif defined(__AVX2__)
static inline VecF max(VecF a, VecF b) {
  return {(VecF::Reg)_mm256_max_ps((__m256)b.r, (__m256)a.r)};
}
static inline VecF min(VecF a, VecF b) {
  return {(VecF::Reg)_mm256_min_ps((__m256)b.r, (__m256)a.r)};
}
#endif
template <class C>
static inline Vec<C> abs(Vec<C> a) {
  using Bits = typename Registers<C>::Bits;
  return {(typename Vec<C>::Reg)((Bits)a.r & ~((Bits{} + 1) << (sizeof(C) * 8 - 1)))};
}
static inline VecF sqrt(VecF a) {
#if defined(__AVX512F__)
  return {(VecF::Reg)_mm512_sqrt_ps((__m512)a.r)};
#elif defined(__AVX2__)
  return {(VecF::Reg)_mm256_sqrt_ps((__m256)a.r)};
#else
  for (int i = 0; i < VecF::lanes; ++i) a.r[i] = __builtin_sqrtf(a.r[i]);
  return a;
#endif
}
static inline VecD sqrt(VecD a) {
#if defined(__AVX512F__)
  return {(VecD::Reg)_mm512_sqrt_pd((__m512d)a.r)};
#elif defined(__AVX2__)
  return {(VecD::Reg)_mm256_sqrt_pd((__m256d)a.r)};
#else
  for (int i = 0; i < VecD::lanes; ++i) a.r[i] = __builtin_sqrt(a.r[i]);
  return a;
#endif
}

// lane i of the result is lane (i + by) % lanes
template <int by, class R, int... I>
static inline R rotate(R r, std::integer_sequence<int, I...>) {
  constexpr int n = sizeof...(I);
  return __builtin_shufflevector(r, r, ((I + by) % n)...);
}
template <int width, class C, class Combine>
static inline C fold(Vec<C> v, const Combine& combine) {
  if constexpr (width == 0) {
    return v.r[0];
  } else {
    constexpr auto lanes = std::make_integer_sequence<int, Vec<C>::lanes>();
    return fold<width / 2>(combine(v, Vec<C>{rotate<width>(v.r, lanes)}), combine);
  }
}
template <class C>
inline C Vec<C>::sum() const {
  return fold<lanes / 2>(*this, [](Vec a, Vec b) { return a + b; });
}
template <class C>
inline C Vec<C>::max() const {
  return fold<lanes / 2>(*this, [](Vec a, Vec b) { return select(b > a, b, a); });
}

// ---- lane i of the result is on when bit first + i of word is

template <class C>
static inline Mask<C> lanes_of(uint64_t word, int first) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    return {(typename Registers<C>::Int)_mm512_movm_epi32(static_cast<__mmask16>(word >> first))};
  else
    return {(typename Registers<C>::Int)_mm512_movm_epi64(static_cast<__mmask8>(word >> first))};
#else
  using Bits = typename Registers<C>::Bits;
  Bits bit;
  for (int i = 0; i < Vec<C>::lanes; ++i) bit[i] = 1u << i;
  const Bits on = (Bits{} + static_cast<uint32_t>(word >> first)) & bit;
  return {(typename Registers<C>::Int)(on == bit)};
#endif
}

// yes in the lanes whose words have a bit in common with bit, no in the others
template <class C>
static inline Vec<C> select_where(typename Registers<C>::Bits words,
                                  typename Registers<C>::Bits bit, Vec<C> yes, Vec<C> no) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    return {(typename Vec<C>::Reg)_mm512_mask_blend_ps(
        _mm512_test_epi32_mask((__m512i)words, (__m512i)bit), (__m512)no.r, (__m512)yes.r)};
  else
    return {(typename Vec<C>::Reg)_mm512_mask_blend_pd(
        _mm512_test_epi64_mask((__m512i)words, (__m512i)bit), (__m512d)no.r, (__m512d)yes.r)};
#else
  using Bits = typename Registers<C>::Bits;
  return select(Mask<C>{(typename Registers<C>::Int)((words & bit) != Bits{})}, yes, no);
#endif
}

// bit i is set when lane i is on
template <class C>
static inline uint64_t bits_of(Mask<C> m) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    return _mm512_movepi32_mask((__m512i)m.r);
  else
    return _mm512_movepi64_mask((__m512i)m.r);
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == 4)
    return static_cast<unsigned>(_mm256_movemask_ps((__m256)m.r));
  else
    return static_cast<unsigned>(_mm256_movemask_pd((__m256d)m.r));
#else
  uint64_t bits = 0;
  for (int i = 0; i < Vec<C>::lanes; ++i) bits |= static_cast<uint64_t>(m.r[i] & 1) << i;
  return bits;
#endif
}

// bit i is set when byte i of n <= 64 is not 0
static inline uint64_t nonzero_bytes(const uint8_t* p, int n) {
#if defined(__AVX512BW__)
  const __mmask64 in = n == 64 ? ~0ull : (1ull << n) - 1;
  const __m512i bytes = _mm512_maskz_loadu_epi8(in, p);
  return _mm512_test_epi8_mask(bytes, bytes);
#else
  uint64_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= static_cast<uint64_t>(p[i] != 0) << i;
  return bits;
#endif
}

// ---- the lower and the upper lanes of floats as doubles

static inline VecD low_half(VecF v) {
#if defined(__AVX512F__)
  return {(VecD::Reg)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v.r))};
#elif defined(__AVX2__)
  return {(VecD::Reg)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)v.r))};
#else
  VecD half;
  for (int i = 0; i < VecD::lanes; ++i) half.r[i] = v.r[i];
  return half;
#endif
}
static inline VecD high_half(VecF v) {
#if defined(__AVX512F__)
  return {(VecD::Reg)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v.r, 1))};
#elif defined(__AVX2__)
  return {(VecD::Reg)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)v.r, 1))};
#else
  VecD half;
  for (int i = 0; i < VecD::lanes; ++i) half.r[i] = v.r[VecD::lanes + i];
  return half;
#endif
}

}  // namespace
PYKERN_END_ISA

// Vec<float>, Vec<double>: as many numbers as one register of this ISA holds. The same names and
// the same meaning on every ISA; the only file with intrinsics. Storage types are float, double,
// bf16 and f16: the last two are computed in float.
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

// ---- single numbers of the storage types

static inline float widen(float x) { return x; }
static inline double widen(double x) { return x; }
static inline float widen(f16 x) { return static_cast<float>(x); }
static inline float widen(bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}
template <class T>
static inline T narrow(Compute<T> x) {
  return static_cast<T>(x);
}
template <>
inline bf16 narrow<bf16>(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// ---- loads and stores, converting between storage and compute type

template <class C>
static inline Vec<C> load(const C* p) {
  Vec<C> v;
  memcpy(&v.r, p, sizeof v.r);
  return v;
}
static inline VecF load(const bf16* p) {
  Registers<float>::Half half;
  memcpy(&half, p, sizeof half);
  return {(VecF::Reg)(__builtin_convertvector(half, Registers<float>::Bits) << 16)};
}
static inline VecF load(const f16* p) {
#if defined(__AVX512F__)
  return {(VecF::Reg)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
#elif defined(__AVX2__)
  return {(VecF::Reg)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
#else
  VecF v;
  for (int i = 0; i < VecF::lanes; ++i) v.r[i] = widen(p[i]);
  return v;
#endif
}

static inline VecF load(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {(VecF::Reg)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {(VecF::Reg)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes))};
#else
  VecF v;
  for (int i = 0; i < VecF::lanes; ++i) v.r[i] = p[i];
  return v;
#endif
}
// the low and the high four bits of as many bytes as there are lanes, 0..15
static inline void load_nibbles(const uint8_t* p, VecF& low, VecF& high) {
#if defined(__AVX512F__)
  const __m512i all = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  low.r = (VecF::Reg)_mm512_cvtepi32_ps(_mm512_and_si512(all, _mm512_set1_epi32(15)));
  high.r = (VecF::Reg)_mm512_cvtepi32_ps(_mm512_srli_epi32(all, 4));
#elif defined(__AVX2__)
  const __m256i all = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  low.r = (VecF::Reg)_mm256_cvtepi32_ps(_mm256_and_si256(all, _mm256_set1_epi32(15)));
  high.r = (VecF::Reg)_mm256_cvtepi32_ps(_mm256_srli_epi32(all, 4));
#else
  for (int i = 0; i < VecF::lanes; ++i) low.r[i] = p[i] & 15, high.r[i] = p[i] >> 4;
#endif
}

template <class C>
static inline void store(C* p, Vec<C> v) {
  memcpy(p, &v.r, sizeof v.r);
}
static inline void store(bf16* p, VecF v) {
#if defined(__AVX512BF16__)  // one instruction; numbers below the normal range become 0
  const __m256i half = (__m256i)_mm512_cvtneps_pbh((__m512)v.r);
  memcpy(p, &half, sizeof half);
#else
  using Bits = Registers<float>::Bits;
  const Bits bits = (Bits)v.r;
  const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Bits quiet = bits >> 16 | 0x40;
  const auto half = __builtin_convertvector(v.r == v.r ? rounded : quiet, Registers<float>::Half);
  memcpy(p, &half, sizeof half);
#endif
}
static inline void store(f16* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v.r, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v.r, 0));
#else
  for (int i = 0; i < VecF::lanes; ++i) p[i] = static_cast<f16>(v.r[i]);
#endif
}

// The first n lanes, n < lanes: memory behind them is neither read nor written; lanes are 0.
template <class T>
static inline Vec<Compute<T>> load(const T* p, int n) {
#if defined(__AVX512F__)
  const unsigned on = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    return {(VecD::Reg)_mm512_maskz_loadu_pd(on, p)};
  } else if constexpr (sizeof(T) == 4) {
    return {(VecF::Reg)_mm512_maskz_loadu_ps(on, p)};
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(on, p);
    return load(reinterpret_cast<const T*>(&half));
  }
#else
  T buffer[Vec<Compute<T>>::lanes] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
#endif
}
template <class T>
static inline void store(T* p, Vec<Compute<T>> v, int n) {
#if defined(__AVX512F__)
  const unsigned on = (1u << n) - 1;
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, on, (__m512d)v.r);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, on, (__m512)v.r);
  } else {
    __m256i half;
    store(reinterpret_cast<T*>(&half), v);
    _mm256_mask_storeu_epi16(p, on, half);
  }
#else
  T buffer[Vec<Compute<T>>::lanes];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
#endif
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

// ---- pairs of bf16 in a 32-bit lane: the low half is the even one

#if defined(__AVX512BF16__)
constexpr bool kHasBf16Dot = true;
// acc + a_even b_even + a_odd b_odd
static inline VecF dot_pairs(VecF acc, VecF a, VecF b) {
  return {(VecF::Reg)_mm512_dpbf16_ps((__m512)acc.r, (__m512bh)a.r, (__m512bh)b.r)};
}
// the numbers of first and second in order, two to a lane
static inline VecF pack_neighbours(VecF first, VecF second) {
  return {(VecF::Reg)_mm512_cvtne2ps_pbh((__m512)second.r, (__m512)first.r)};
}
// even in the low halves, odd in the high halves
static inline VecF pack_pairs(VecF even, VecF odd) {
  using Halves [[gnu::vector_size(64)]] = int16_t;
  constexpr Halves zip = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i halves = (__m512i)pack_neighbours(even, odd).r;
  return {(VecF::Reg)_mm512_permutexvar_epi16((__m512i)zip, halves)};
}
// the bf16 of v, in order
static inline void store_bf16(uint16_t* p, VecF v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v.r));
}
#else
constexpr bool kHasBf16Dot = false;
#endif

}  // namespace
PYKERN_END_ISA

// Loads and stores of Vec<float> and Vec<double>, converting between storage and compute type.
#pragma once
#include "cpu/vec_arithmetic.h"

PYKERN_BEGIN_ISA
namespace {

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
#if defined(__AVX512F__)  // GCC 12 widens the halves of such a register one by one
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {(VecF::Reg)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)};
#else
  Registers<float>::Half half;
  memcpy(&half, p, sizeof half);
  return {(VecF::Reg)(__builtin_convertvector(half, Registers<float>::Bits) << 16)};
#endif
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
// The low and the high four bits of as many bytes as there are lanes, as signed numbers -8..7.
static inline void load_nibbles(const uint8_t* p, VecF& low, VecF& high) {
#if defined(__AVX512F__)
  const __m512i all = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  // Added to the last bits of 2^23, low + 8 is a float, without a conversion: (all & 15) ^ magic.
  const __m512i magic = _mm512_set1_epi32(0x4b000008);
  const __m512i moved = _mm512_ternarylogic_epi32(all, _mm512_set1_epi32(15), magic, 0x6a);
  low.r = (VecF::Reg)moved - 8388616.0f;
  high.r = (VecF::Reg)_mm512_cvtepi32_ps(_mm512_srai_epi32(all, 4));
#elif defined(__AVX2__)
  const __m256i all = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  low.r = (VecF::Reg)_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(all, 28), 28));
  high.r = (VecF::Reg)_mm256_cvtepi32_ps(_mm256_srai_epi32(all, 4));
#else
  for (int i = 0; i < VecF::lanes; ++i) {
    low.r[i] = ((p[i] & 15) ^ 8) - 8;
    high.r[i] = ((p[i] >> 4) ^ 8) - 8;
  }
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

// A store past the caches, to an address that is a multiple of a vector: for what is written once,
// and so much of it that it would not stay in them.
template <class C>
static inline void stream(C* p, Vec<C> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v.r);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v.r);
#else
  store(p, v);
#endif
}
static inline void stream(bf16* p, VecF v) {
#if defined(__AVX512F__)
  __m256i half;
  store(reinterpret_cast<bf16*>(&half), v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half);
#else
  store(p, v);
#endif
}
static inline void stream(f16* p, VecF v) { store(p, v); }
// Behind the last of them: other threads see what was streamed.
static inline void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
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

// ---- pieces of n bytes, `step` bytes apart, side by side: as many as a register has parts of 16
// bytes, between which lanes do not move cheaply

template <class R, int... I>
static inline auto concatenate(R a, R b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, I...);
}
template <int n, int pieces = kVectorBytes / 16>
[[gnu::always_inline]] static inline auto load_pieces(const char* p, int64_t step) {
  if constexpr (pieces == 1) {
    using Piece [[gnu::vector_size(n)]] = int8_t;
    Piece piece;
    memcpy(&piece, p, n);
    return piece;
  } else {
    const auto low = load_pieces<n, pieces / 2>(p, step);
    const auto high = load_pieces<n, pieces / 2>(p + pieces / 2 * step, step);
#if defined(__AVX2__)
    if constexpr (sizeof low == 16) {  // from memory it costs a third of the general shuffle
      using Both [[gnu::vector_size(32)]] = int8_t;
      return (Both)_mm256_insertf128_si256(_mm256_castsi128_si256((__m128i)low), (__m128i)high, 1);
    }
#endif
    return concatenate(low, high, std::make_integer_sequence<int, pieces * n>());
  }
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

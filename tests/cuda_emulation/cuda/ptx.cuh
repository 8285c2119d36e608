// The functions of csrc/cuda/ptx.cuh on the emulator.
#pragma once
#include <cuda_runtime.h>

#include <vector>

namespace pykern::cuda {

// ---- numbers

inline uint16_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;  // NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float bf16_value(uint16_t bits) {
  return __uint_as_float(static_cast<uint32_t>(bits) << 16);
}
inline uint16_t f16_bits(float x) {
  if (x != x) return 0x7fff;
  return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
}
// A table: without an instruction for it a conversion is most of the time of a product.
inline float f16_value(uint16_t bits) {
  static const auto all = [] {
    std::vector<float> values(1 << 16);
    for (int i = 0; i < 1 << 16; ++i)
      values[i] = static_cast<float>(std::bit_cast<_Float16>(static_cast<uint16_t>(i)));
    return values;
  }();
  return all[bits];
}
inline uint32_t bf16_pair(float first, float second) {
  return bf16_bits(first) | uint32_t(bf16_bits(second)) << 16;
}
inline uint32_t f16_pair(float first, float second) {
  return f16_bits(first) | uint32_t(f16_bits(second)) << 16;
}
inline uint32_t tf32_bits(float x) {  // to nearest, ties away from zero
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000) == 0x7f800000) return bits & 0xffffe000;
  return (bits + 0x1000) & 0xffffe000;
}

inline float without_subnormals(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }
inline float exp2_approx(float x) { return without_subnormals(exp2f(without_subnormals(x))); }
inline float rcp_approx(float x) { return without_subnormals(1 / without_subnormals(x)); }

template <class T>
T kept(T x) {
  return x;
}

// ---- stores to global memory

template <class Word>
void store_word(Word* to, Word x) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Word))
    throw emulation::Fault("a store of " + std::to_string(sizeof(Word)) + " bytes is not aligned");
  if (emulation::is_shared(to)) throw emulation::Fault("a global store to shared memory");
  *to = x;
}

// ---- a number by which blocks pass on what they have written: a block runs to its end before the
// next begins

inline void store_release(uint32_t* to, uint32_t x) { *to = x; }
inline void await_value(const uint32_t* from, uint32_t expected) {
  if (*from != expected)
    throw emulation::Fault("a block waits for " + std::to_string(expected) + " and there is " +
                           std::to_string(*from) + ": who stores it has not begun");
}

// ---- shared memory

template <class Layout>
Layout& shared_memory() {
  return *static_cast<Layout*>(emulation::shared_memory(sizeof(Layout), alignof(Layout)));
}

// ---- asynchronous copies

inline void cp_async16(void* to, const void* from, int valid = 16) {
  if (!emulation::is_shared(to) || (valid > 0 && emulation::is_shared(from)))
    throw emulation::Fault("an asynchronous copy that is not from global to shared memory");
  emulation::copy_later(to, from, 16, valid);
}
inline void cp_async_commit() { emulation::commit_copies(); }
template <int pending>
void cp_async_wait(emulation::Where where = emulation::Where::current()) {
  emulation::await_copies(pending, where);
}

// ---- matrices of 8 x 8

inline const emulation::Deposit* exchange_rows(const void* row, emulation::Where where) {
  if (reinterpret_cast<uintptr_t>(row) % 16) throw emulation::Fault("ldmatrix of an unaligned row");
  if (!emulation::is_shared(row)) throw emulation::Fault("ldmatrix outside of shared memory");
  return emulation::exchange(emulation::deposit_of(row), where);
}
inline const char* row_address(const emulation::Deposit& deposit) {
  return reinterpret_cast<const char*>(deposit.word[0]);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row,
                        emulation::Where where = emulation::Where::current()) {
  const emulation::Deposit* all = exchange_rows(row, where);
  const unsigned lane = emulation::lane();
  for (int m = 0; m < 4; ++m)
    memcpy(&r[m], row_address(all[8 * m + lane / 4]) + lane % 4 * 4, sizeof r[m]);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              emulation::Where where = emulation::Where::current()) {
  const emulation::Deposit* all = exchange_rows(row, where);
  const unsigned lane = emulation::lane();
  for (int m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i)
      memcpy(&pair[i], row_address(all[8 * m + lane % 4 * 2 + i]) + lane / 4 * 2, sizeof pair[i]);
    memcpy(&r[m], pair, sizeof r[m]);
  }
}

// ---- matrix products: lane l holds rows l / 4 and l / 4 + 8 of a and d, column l / 4 of b

template <int K, class Value>
void emulated_mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Value value,
                  emulation::Where where) {
  constexpr int kEach = K / 8;  // numbers in a register
  const emulation::Deposit own{
      {a[0] | uint64_t(a[1]) << 32, a[2] | uint64_t(a[3]) << 32, b0 | uint64_t(b1) << 32, 0}};
  const emulation::Deposit* all = emulation::exchange(own, where);
  const auto word = [&](int lane, int i, int half) {
    return static_cast<uint32_t>(all[lane].word[i] >> (32 * half));
  };
  const int lane = emulation::lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = 0;
    for (int k = 0; k < K; ++k) {
      const int half = k / (K / 2), within = k % (K / 2);
      const uint32_t left = word(row % 8 * 4 + within / kEach, half, row / 8);
      const uint32_t right = word(column * 4 + within / kEach, 2, half);
      sum += double(value(left, within % kEach)) * value(right, within % kEach);
    }
    d[i] = static_cast<float>(d[i] + sum);
  }
}
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulation::Where where = emulation::Where::current()) {
  const auto value = [](uint32_t w, int i) {
    return bf16_value(static_cast<uint16_t>(w >> 16 * i));
  };
  emulated_mma<16>(d, a, b0, b1, value, where);
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    emulation::Where where = emulation::Where::current()) {
  const auto value = [](uint32_t w, int i) {
    return f16_value(static_cast<uint16_t>(w >> 16 * i));
  };
  emulated_mma<16>(d, a, b0, b1, value, where);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulation::Where where = emulation::Where::current()) {
  const auto value = [](uint32_t w, int) { return __uint_as_float(w & 0xffffe000); };
  emulated_mma<8>(d, a, b0, b1, value, where);
}

}  // namespace pykern::cuda

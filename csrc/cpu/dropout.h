// Dropout of attention weights: which ones are kept is a function of the seed and of the position
// (b, h, t, s), recomputed wherever it is needed and stored nowhere.
//   word (s / 16) % 4 of Philox4x32-10(counter = (s / 64 * 16 + s % 16, t, h, b), key = seed)
// is at least p 2^32: kept. Philox: Salmon et al., SC 2011, "Parallel random numbers: as easy as
// 1, 2, 3". 16 counters give the words of 64 keys.
#pragma once
#include <math.h>

#include "core/tensor.h"
#include "cpu/vec.h"

PYKERN_BEGIN_ISA
namespace {

struct Dropout {
  uint32_t key[2];
  uint64_t threshold;  // 0: nothing is dropped
  double factor;       // of the weights that are kept
};

static inline Dropout dropout_of(const Tensor& seed, double p) {
  if (p == 0) return {};
  const uint64_t key = static_cast<uint64_t>(*static_cast<const int64_t*>(seed.data));
  return {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
          static_cast<uint64_t>(p * 4294967296.0),
          p == 1 ? 0 : 1 / (1 - p)};
}

constexpr int kCounters = 16;
typedef uint32_t Words __attribute__((vector_size(4 * kCounters)));
typedef uint64_t WideWords __attribute__((vector_size(4 * kCounters)));

// The high and low halves of the products of each word with m.
static inline void multiply(Words a, uint32_t m, Words& high, Words& low) {
  const WideWords factor = WideWords{} + m, even = ((WideWords)a & 0xffffffffu) * factor,
                  odd = ((WideWords)a >> 32) * factor;
  high = (Words)((even >> 32) | (odd & ~uint64_t(0xffffffffu)));
  low = (Words)((even & 0xffffffffu) | (odd << 32));
}

// Bit i: the weight of key tile * 64 + i is kept.
static inline uint64_t keep_word(const Dropout& d, int64_t b, int64_t h, int64_t t, int64_t tile) {
  constexpr Words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Words c0 = lane + static_cast<uint32_t>(tile * kCounters),
        c1 = Words{} + static_cast<uint32_t>(t), c2 = Words{} + static_cast<uint32_t>(h),
        c3 = Words{} + static_cast<uint32_t>(b);
  uint32_t k0 = d.key[0], k1 = d.key[1];
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    Words high0, low0, high1, low1;
    multiply(c0, 0xD2511F53u, high0, low0);
    multiply(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0, c1 = low1;
    c2 = high0 ^ c3 ^ k1, c3 = low0;
  }
  if (d.threshold > 0xffffffffu) return 0;
  const uint32_t threshold = static_cast<uint32_t>(d.threshold);
  const Words words[4] = {c0, c1, c2, c3};
  uint64_t keep = 0;
  for (int w = 0; w < 4; ++w) {
    float lanes[kCounters];  // all bits on where kept
    const Words on = (Words)(words[w] >= threshold);
    memcpy(lanes, &on, sizeof lanes);
    for (int i = 0; i < kCounters; i += VecF::lanes)
      keep |= bits_of(Mask<float>{(Registers<float>::Int)load(lanes + i).r}) << (w * kCounters + i);
  }
  return keep;
}

}  // namespace
PYKERN_END_ISA

// Philox4x32-10, one counter at a time: Salmon et al., SC 2011, "Parallel random numbers: as easy
// as 1, 2, 3".
#pragma once
#include "cpu/isa.h"

PYKERN_BEGIN_ISA
namespace {

struct PhiloxWords {
  uint32_t word[4];
};

static inline PhiloxWords philox(uint64_t counter, uint64_t key) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t k[2] = {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {
        static_cast<uint32_t>(b >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(b),
        static_cast<uint32_t>(a >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(a)};
    for (int i = 0; i < 4; ++i) c[i] = next[i];
    k[0] += 0x9E3779B9u, k[1] += 0xBB67AE85u;
  }
  return {{c[0], c[1], c[2], c[3]}};
}

// uniform in [0, 1), 53 bits
static inline double uniform(uint64_t counter, uint64_t key) {
  const PhiloxWords words = philox(counter, key);
  const uint64_t bits = static_cast<uint64_t>(words.word[0]) << 32 | words.word[1];
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace
PYKERN_END_ISA

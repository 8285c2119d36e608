// Random numbers, the same as on the CPU. Dropout of attention weights: which ones are kept is a
// function of the seed and of the position (b, h, t, s):
//   word (s / 16) % 4 of Philox4x32-10(counter = (s / 64 * 16 + s % 16, t, h, b), key = seed)
// is at least p 2^32: kept. Philox: Salmon et al., SC 2011, "Parallel random numbers: as easy as
// 1, 2, 3".
#pragma once
#include "core/tensor.h"
#include "cuda/ptx.cuh"

namespace pykern::cuda {

struct Dropout {
  const int64_t* seed = nullptr;
  uint64_t threshold = 0;  // 0: nothing is dropped
  double factor = 1;       // of the weights that are kept
};

inline Dropout dropout_of(const Tensor& seed, double p) {
  if (p == 0) return {};
  return {static_cast<const int64_t*>(seed.data), static_cast<uint64_t>(p * 4294967296.0),
          p == 1 ? 0 : 1 / (1 - p)};
}

// Bit w: the weight of key tile * 64 + 16 w + lane is kept, lane < 16.
__device__ __forceinline__ uint32_t keep_bits(const Dropout& d, uint64_t seed, int b, int h, int t,
                                              int tile, int lane) {
  uint32_t c0 = static_cast<uint32_t>(tile) * 16 + lane, c1 = t, c2 = h, c3 = b;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(first);
  }
  const auto kept = [&](uint32_t word) { return uint32_t{word >= d.threshold}; };
  return kept(c0) | kept(c1) << 1 | kept(c2) << 2 | kept(c3) << 3;
}

// In [0, 1), 53 bits: number `draw` of the stream of a seed. The rounds stand here again: shared
// with keep_bits in a function they make ptxas spill in attention_plain_dkv.
__device__ __forceinline__ double uniform(uint64_t draw, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(draw), c1 = static_cast<uint32_t>(draw >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0, c1 = static_cast<uint32_t>(second);
    c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1, c3 = static_cast<uint32_t>(first);
  }
  const uint64_t bits = uint64_t{c0} << 32 | c1;
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

}  // namespace pykern::cuda

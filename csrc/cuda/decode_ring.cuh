// How a warp's tiles of 16 keys and values come to shared memory: by cp.async, several stages
// ahead, as they are or, from int8 caches, as bytes that are widened when it is their turn.
#pragma once
#include "cuda/decode.cuh"
#include "cuda/mma.cuh"

namespace pykern::cuda {

constexpr int kTile = 16;  // rows of a tile, and keys: those of one mma

template <class T, int kWidth>
struct KeyTile {
  T k[kTile * kWidth], v[kTile * kWidth];
};

// Lines of 16-byte chunks, permuted so that eight that ldmatrix reads at once are in different
// banks.
template <int kWidth>
__device__ __forceinline__ int in_tile(int key, int chunk) {
  return key * kWidth + (chunk ^ key % 8) * kChunk;
}

// A warp asks for the keys and values of a tile; behind `end`, and up to the next 16 columns, 0.
template <int kWidth, class T>
__device__ __forceinline__ void fetch_tile(const Decode<T>& a, const Task& task, int padding,
                                           int first, int end, KeyTile<T, kWidth>& stage) {
  constexpr int kChunks = kWidth / kChunk, kTogether = kWarp / kChunks;
  const int lane = threadIdx.x % kWarp, chunk = lane % kChunks, column = chunk * kChunk;
  const int D = a.scores.D, E = a.scores.E;
  const auto valid = [&](int width) {
    return width <= column ? 0 : width - column < kChunk ? width - column : kChunk;
  };
  const int k_valid = valid(D), v_valid = valid(E);
  const bool k_wanted = column < (D + kTile - 1) / kTile * kTile,
             v_wanted = column < (E + kTile - 1) / kTile * kTile;
  const auto move = [&](const T* from, T* to, int there, bool vectors) {
    if (vectors) {
      cp_async16(to, from, there * static_cast<int>(sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) to[j] = j < there ? from[j] : T{};
    }
  };
  const Slots::At start = a.slots.at(task.b, padding + first);
  const bool together = a.slots.together(start, kTile);
#pragma unroll
  for (int i = 0; i < kTile; i += kTogether) {
    const int key = i + lane / kChunks;
    const bool there = first + key < end;
    Slots::At at{start.batch, start.row + key};
    if (!together && there) at = a.slots.at(task.b, padding + first + key);
    const T* k = there ? a.k.at(at.batch, task.g, at.row) + column : a.k.data;
    const T* v = there ? a.v.at(at.batch, task.g, at.row) + column : a.v.data;
    if (k_wanted) move(k, stage.k + in_tile<kWidth>(key, chunk), there ? k_valid : 0, a.k_vectors);
    if (v_wanted) move(v, stage.v + in_tile<kWidth>(key, chunk), there ? v_valid : 0, a.v_vectors);
  }
}

// Numbers are what they are.
struct Unscaled {
  template <class Body>
  __device__ __forceinline__ void of_keys(const Body&) const {}
  template <class Body>
  __device__ __forceinline__ void of_values(const Body&) const {}
};

template <class T, int kWidth, int kStages>
class HalvesRing {
 public:
  struct Memory {
    KeyTile<T, kWidth> stage[kStages];
  };
  __device__ __forceinline__ HalvesRing(const Decode<T>& a, const Task& task, int padding,
                                        Memory& memory)
      : a_(a), task_(task), padding_(padding), memory_(memory) {}

  // Asks for the tile at key `first`; behind `end` there is none. Stages are asked for in turn.
  __device__ __forceinline__ void fetch(int first, int end, int stage) {
    if (first < end) fetch_tile<kWidth>(a_, task_, padding_, first, end, memory_.stage[stage]);
  }
  // The tile asked for kStages - 1 times before the last one, which has come
  __device__ __forceinline__ const KeyTile<T, kWidth>& tile(int stage) {
    return memory_.stage[stage];
  }
  __device__ __forceinline__ Unscaled scales() const { return {}; }

 private:
  const Decode<T>& a_;
  const Task& task_;
  const int padding_;
  Memory& memory_;
};

// ---- int8: half the bytes. A key is its numbers times its scale, so products take the numbers,
// which bfloat16 holds exactly; scores are multiplied by the scales of keys, weights by those of
// values.

// Lane i < 16 has the scale of key i of the tile, lane 16 + i that of value i.
class LaneScales {
 public:
  __device__ __forceinline__ explicit LaneScales(float own) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      of_[i / 4][i / 2 % 2][i % 2] = __shfl_sync(
          kAllLanes, own, i / 4 * kTile + i / 2 % 2 * 8 + threadIdx.x % kWarp % 4 * 2 + i % 2);
  }
  // body(n, c, scale) for the keys 8 n + 2 (lane % 4) + c
  template <class Body>
  __device__ __forceinline__ void of_keys(const Body& body) const {
    each(of_[0], body);
  }
  template <class Body>
  __device__ __forceinline__ void of_values(const Body& body) const {
    each(of_[1], body);
  }

 private:
  template <class Body>
  __device__ __forceinline__ static void each(const float (&of)[2][2], const Body& body) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c) body(n, c, of[n][c]);
  }
  float of_[2][2][2];
};

// 16 bytes as 16 bfloat16: 2^23 + (q + 128) is a float whose last byte is q + 128.
__device__ __forceinline__ void widen_bytes(const uint4& bytes, uint4 (&to)[2]) {
  const uint32_t words[] = {bytes.x, bytes.y, bytes.z, bytes.w};
  uint32_t pairs[8];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const uint32_t raised = words[w] ^ 0x80808080;
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      x[j] = __uint_as_float(0x4b000000 | (raised >> 8 * j & 0xff)) - 8388736.0f;
#pragma unroll
    for (int j = 0; j < 2; ++j)
      pairs[2 * w + j] =
          __float_as_uint(x[2 * j]) >> 16 | (__float_as_uint(x[2 * j + 1]) & 0xffff0000);
  }
#pragma unroll
  for (int j = 0; j < 2; ++j)
    to[j] = {pairs[4 * j], pairs[4 * j + 1], pairs[4 * j + 2], pairs[4 * j + 3]};
}

template <class T, int kWidth, int kStages>
class Int8Ring {
  static constexpr int kBytes = 16, kPerRow = kWidth / kBytes;  // 16 bytes a lane and copy

 public:
  struct Bytes {
    int8_t k[kTile * kWidth], v[kTile * kWidth];
  };
  struct Memory {
    KeyTile<T, kWidth> tile;
    Bytes stage[kStages];
  };
  __device__ __forceinline__ Int8Ring(const Decode<T>& a, const Task& task, int padding,
                                      Memory& memory)
      : a_(a), task_(task), padding_(padding), memory_(memory) {}

  __device__ __forceinline__ void fetch(int first, int end, int stage) {
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) scale_[i] = scale_[i + 1];
    if (first >= end) return;
    const int lane = threadIdx.x % kWarp, column = lane % kPerRow * kBytes;
    const auto at = [&](int key) { return a_.slots.at(task_.b, padding_ + first + key); };
#pragma unroll
    for (int i = 0; i < kTile; i += kWarp / kPerRow) {
      const int key = i + lane / kPerRow;
      const bool there = first + key < end;
      const Slots::At row = there ? at(key) : Slots::At{0, 0};
      move(a_.k, row, column, a_.scores.D, there, memory_.stage[stage].k + key * kWidth,
           a_.k_vectors);
      move(a_.v, row, column, a_.scores.E, there, memory_.stage[stage].v + key * kWidth,
           a_.v_vectors);
    }
    const int key = lane % kTile;
    float scale = 0;
    if (first + key < end) {
      const Slots::At row = at(key);
      scale = (lane < kTile ? a_.k_scale : a_.v_scale).at(row.batch, task_.g, row.row);
    }
    scale_[kStages - 1] = scale;
  }
  __device__ __forceinline__ const KeyTile<T, kWidth>& tile(int stage) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kTile * kPerRow; i += kWarp) {
      const int key = (i + lane) / kPerRow, chunk = (i + lane) % kPerRow;
      const auto widen = [&](const int8_t* from, T* to) {
        uint4 halves[2];
        widen_bytes(*reinterpret_cast<const uint4*>(from + key * kWidth + chunk * kBytes), halves);
#pragma unroll
        for (int j = 0; j < 2; ++j)
          *reinterpret_cast<uint4*>(to + in_tile<kWidth>(key, 2 * chunk + j)) = halves[j];
      };
      if (chunk * kBytes < a_.scores.D) widen(memory_.stage[stage].k, memory_.tile.k);
      if (chunk * kBytes < a_.scores.E) widen(memory_.stage[stage].v, memory_.tile.v);
    }
    __syncwarp();  // all lanes have widened theirs
    return memory_.tile;
  }
  __device__ __forceinline__ LaneScales scales() const { return LaneScales(scale_[0]); }

 private:
  __device__ __forceinline__ void move(const HeadRows<const T>& rows, const Slots::At& row,
                                       int column, int width, bool there, int8_t* to,
                                       bool vectors) {
    if (column >= width) return;
    const int left = width - column, valid = there ? left < kBytes ? left : kBytes : 0;
    const int8_t* from = int8_row(rows, row.batch, task_.g, row.row) + column;
    if (vectors) {
      cp_async16(to + column, from, valid);
    } else {
#pragma unroll
      for (int j = 0; j < kBytes; ++j) to[column + j] = j < valid ? from[j] : int8_t{0};
    }
  }

  const Decode<T>& a_;
  const Task& task_;
  const int padding_;
  Memory& memory_;
  float scale_[kStages] = {};  // this lane's, see LaneScales, of the tiles on their way
};

}  // namespace pykern::cuda

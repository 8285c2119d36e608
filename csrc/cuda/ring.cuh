// Packs of rows on their way from memory. Each thread asks for its own some steps ahead (cp.async)
// and reads them when their turn comes: what is under way costs no registers, and nobody waits for
// another's.
#pragma once
#include "cuda/pieces.cuh"

namespace pykern::cuda {

constexpr int kRingSteps = 4;            // 2 where 4 would not fit
constexpr size_t kRingBytes = 96 << 10;  // what a block may have on every GPU from sm_80 on

// `streams` rows at a time, kHeld packs of each for every thread of a block.
template <class T>
class Ring {
 public:
  struct Plan {
    int steps, streams;
    size_t bytes;
  };
  static Plan plan(int threads, int streams) {
    const size_t step = size_t(streams) * kHeld * threads * 16;
    const int steps = kRingSteps * step <= kRingBytes ? kRingSteps : 2;
    return {steps, streams, steps * step};
  }

  __device__ __forceinline__ Ring(T* memory, const Plan& plan)
      : memory_(memory), steps_(plan.steps), streams_(plan.streams) {}

  __device__ __forceinline__ int steps() const { return steps_; }

  // Asks for pack p of a stream, of which `valid` numbers exist; the others become 0.
  __device__ __forceinline__ void fetch(unsigned step, int stream, int p, const T* from,
                                        int64_t valid, bool vectors) const {
    constexpr int W = kPack<T>;
    T* to = slot(step, stream, p);
    if (vectors) {
      cp_async16(to, from, static_cast<int>((valid < W ? valid : W) * sizeof(T)));
    } else {
#pragma unroll
      for (int j = 0; j < W; ++j) to[j] = j < valid ? from[j] : T{};
    }
  }
  // Ends a step's requests, also where there are none: steps are counted.
  __device__ __forceinline__ void commit() const { cp_async_commit(); }
  // Until the oldest step is there, that of steps() - 1 commits ago.
  __device__ __forceinline__ void wait() const {
    if (steps_ == kRingSteps)
      cp_async_wait<kRingSteps - 1>();
    else
      cp_async_wait<1>();
  }
  __device__ __forceinline__ void get(unsigned step, int stream, int p,
                                      Compute<T> (&v)[kPack<T>]) const {
    load(slot(step, stream, p), kPack<T>, true, v);
  }

 private:
  __device__ __forceinline__ T* slot(unsigned step, int stream, int p) const {
    const unsigned pack = ((step & (steps_ - 1)) * streams_ + stream) * kHeld + p;
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
    return memory_ + (pack * (blockDim.x * blockDim.y) + thread) * kPack<T>;
  }

  T* memory_;
  int steps_, streams_;
};

// Blocks that walk over rows: as many as run together, two on each processor.
inline int64_t walking_blocks(int64_t most) {
  int device = 0, processors = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
  return most < 2 * processors ? most : 2 * processors;
}

}  // namespace pykern::cuda

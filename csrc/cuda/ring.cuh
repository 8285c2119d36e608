// Packs of rows on their way from memory. Each thread asks for its own some steps ahead (cp.async)
// and reads them when their turn comes: what is under way costs no registers, and nobody waits for
// another's.
#pragma once
#include "cuda/pieces.cuh"

namespace pykern::cuda {

constexpr int kRingSteps = 4;                  // 2 where 4 would not fit
constexpr size_t kRingBytes = 96 << 10;        // what a block may have on every GPU from sm_80 on
constexpr size_t kProcessorBytes = 216 << 10;  // what the blocks of a processor have together

// `streams` rows at a time, kHeld packs of each for every thread of a block.
template <class T>
class Ring {
 public:
  struct Plan {
    int steps, streams;
    int packs;  // of a step and stream
    size_t bytes;
  };
  // blocks: as many as shall run on a processor together
  static Plan plan(int threads, int streams, int blocks = 1) {
    const size_t step = size_t(streams) * kHeld * threads * 16, all = kRingSteps * step;
    const int steps = all <= kRingBytes && all * blocks <= kProcessorBytes ? kRingSteps : 2;
    return {steps, streams, kHeld * threads, steps * step};
  }

  // One stream always has all steps: constants in the kernel.
  __device__ __forceinline__ static Plan plan_of_one() {
    static_assert(kRingSteps * kHeld * kRowThreads * 16 <= kRingBytes);
    const int threads = blockDim.x * blockDim.y;
    return {kRingSteps, 1, kHeld * threads, 0};
  }

  __device__ __forceinline__ Ring(T* memory, const Plan& plan)
      : memory_(memory), steps_(plan.steps), streams_(plan.streams), packs_(plan.packs) {
    const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
    own_ = kept(thread / kWarp * (kHeld * kWarp) + thread % kWarp);
  }

  __device__ __forceinline__ int steps() const { return steps_; }

  // Asks for pack p of a stream, of which `valid` numbers exist; the others become 0.
  __device__ __forceinline__ void fetch(unsigned step, int stream, int p, const T* from,
                                        int64_t valid, bool vectors) const {
    fetch_to(packs(step, stream), p, from, valid, vectors);
  }
  __device__ __forceinline__ static void fetch_to(T* packs, int p, const T* from, int64_t valid,
                                                  bool vectors) {
    constexpr int W = kPack<T>;
    T* to = packs + p * (kWarp * W);
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
    get_from(packs(step, stream), p, v);
  }
  __device__ __forceinline__ static void get_from(const T* packs, int p,
                                                  Compute<T> (&v)[kPack<T>]) {
    load(packs + p * (kWarp * kPack<T>), kPack<T>, true, v);
  }
  // Where this thread's packs of a step and stream are, for fetch_to and get_from of several
  __device__ __forceinline__ T* packs(unsigned step, int stream) const {
    const unsigned part = (step & (steps_ - 1)) * streams_ + stream;
    return memory_ + (part * packs_ + own_) * kPack<T>;
  }

 private:
  T* memory_;
  unsigned own_;  // this thread's packs of a stream are a constant apart, as in a row
  int steps_, streams_, packs_;
};

// The rows of a thread on their way through a ring of one stream: chunk after chunk, each row
// `passes` times, of the rows for which wanted(row) holds.
template <class T, class Wanted>
class Chunks {
 public:
  __device__ __forceinline__ Chunks(const Ring<T>& ring, const Rows& rows, int64_t count,
                                    const Pieces<T>& pieces, int passes, const Wanted& wanted)
      : ring_(ring),
        rows_(rows),
        pieces_(pieces),
        wanted_(wanted),
        count_(count),
        row_(blockIdx.x * int64_t(blockDim.y) + threadIdx.y),
        chunks_(static_cast<int>(pieces.chunks())),
        passes_(passes) {
    begin_row();
    for (int step = 0; step < ring.steps() - 1; ++step) start(step);
  }

  // Until the next chunk is there
  __device__ __forceinline__ void next() {
    ++step_;
    start(step_ + ring_.steps() - 1);
    ring_.wait();
  }
  // Pack p of it; behind the end of the row 0
  __device__ __forceinline__ void get(int p, Compute<T> (&v)[kPack<T>]) const {
    ring_.get(step_, 0, p, v);
  }

 private:
  __device__ __forceinline__ void begin_row() {
    const int64_t stride = int64_t(gridDim.x) * blockDim.y;
    while (row_ < count_ && !wanted_(row_)) row_ += stride;
    if (row_ < count_) from_ = static_cast<const T*>(rows_.data) + rows_.offset(row_);
    first_ = pieces_.begin();
    chunk_ = pass_ = 0;
  }
  __device__ __forceinline__ void start(unsigned step) {
    if (row_ < count_) {
      pieces_.each_pack_from(first_, [&](int p, int64_t first, int64_t valid, bool vectors) {
        ring_.fetch(step, 0, p, from_ + first, valid, vectors);
      });
      first_ += pieces_.width();
      if (++chunk_ == chunks_) {
        first_ = pieces_.begin();
        chunk_ = 0;
        if (++pass_ == passes_) {
          row_ += int64_t(gridDim.x) * blockDim.y;
          begin_row();
        }
      }
    }
    ring_.commit();
  }

  const Ring<T>& ring_;
  const Rows& rows_;
  const Pieces<T>& pieces_;
  const Wanted& wanted_;
  const int64_t count_;
  const T* from_ = nullptr;
  int64_t row_, first_ = 0;  // of the next request
  int chunk_ = 0, pass_ = 0;
  const int chunks_, passes_;
  unsigned step_ = ~0u;
};

// Blocks that walk over rows: as many as run together, two on each processor, or more small ones.
inline int64_t walking_blocks(int64_t most, int threads = kRowThreads) {
  int device = 0, processors = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
  const int64_t together = int64_t(processors) * (2 * kRowThreads / threads);
  return most < together ? most : together;
}

}  // namespace pykern::cuda

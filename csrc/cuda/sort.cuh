// A stable radix sort of (key, place) by key, eight bits at a time, the lowest first. A pass counts
// the digits of each tile, turns the counts into first positions, and moves every item to the next
// position of its digit; ranks within a tile follow the order of the items.
#pragma once
#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace pykern::cuda {

struct Keyed {
  uint32_t key, place;
};

constexpr int kDigits = 256, kDigitBits = 8;
constexpr int kSortWarps = 8, kSortThreads = kSortWarps * kWarp;
constexpr int kRounds = 4;  // items of a thread
constexpr int kSortTile = kSortThreads * kRounds;

__device__ __forceinline__ int digit_of(Keyed item, int shift) {
  return (item.key >> shift) % kDigits;
}

struct DigitCounts {
  int of[kSortWarps][kDigits];
};

// The items of a warp are neighbours: those of round r are first + r * 32 + lane.
__device__ __forceinline__ int64_t first_item() {
  return blockIdx.x * int64_t(kSortTile) + threadIdx.x / kWarp * (kWarp * kRounds);
}

// counts.of[w][d]: items of warp w with digit d. rank[r]: how many of them come before this
// thread's item of round r.
__device__ __forceinline__ void count_digits(const Keyed* items, int64_t count, int shift,
                                             DigitCounts& counts, int (&rank)[kRounds]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int d = lane; d < kDigits; d += kWarp) counts.of[warp][d] = 0;
  __syncwarp();
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = first_item() + r * kWarp + lane;
    const int digit = i < count ? digit_of(items[i], shift) : -1;
    const unsigned peers = __match_any_sync(kAllLanes, digit);
    const int before = __popc(peers & ((1u << lane) - 1));
    rank[r] = digit >= 0 ? counts.of[warp][digit] + before : 0;
    __syncwarp();  // all have read
    if (digit >= 0 && before == 0) counts.of[warp][digit] += __popc(peers);
    __syncwarp();
  }
}

// totals[d, tile]: items of the tile with digit d
static __global__ void __launch_bounds__(kSortThreads)
    sort_count(const Keyed* items, int64_t count, int shift, int* totals) {
  auto& counts = shared_memory<DigitCounts>();
  int rank[kRounds];
  count_digits(items, count, shift, counts, rank);
  __syncthreads();
  const int d = threadIdx.x;
  int total = 0;
  for (int w = 0; w < kSortWarps; ++w) total += counts.of[w][d];
  totals[d * int64_t(gridDim.x) + blockIdx.x] = total;
}

struct ScanScratch {
  int of_warp[kMaxWarps];
};

// Each number becomes the sum of those before it. One block.
static __global__ void __launch_bounds__(1024) sort_scan(int* numbers, int64_t count) {
  auto& scratch = shared_memory<ScanScratch>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  int before = 0;
  for (int64_t first = 0; first < count; first += blockDim.x) {
    const int64_t i = first + threadIdx.x;
    const int own = i < count ? numbers[i] : 0;
    int sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_sync(kAllLanes, sum, lane - step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) scratch.of_warp[warp] = sum;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < warps; ++w) {
      if (w < warp) sum += scratch.of_warp[w];
      total += scratch.of_warp[w];
    }
    if (i < count) numbers[i] = before + sum - own;
    before += total;
    __syncthreads();  // of_warp has been read
  }
}

static __global__ void __launch_bounds__(kSortThreads)
    sort_move(const Keyed* items, int64_t count, int shift, const int* positions, Keyed* sorted) {
  auto& counts = shared_memory<DigitCounts>();
  int rank[kRounds];
  count_digits(items, count, shift, counts, rank);
  __syncthreads();
  const int d = threadIdx.x;
  int position = positions[d * int64_t(gridDim.x) + blockIdx.x];
  for (int w = 0; w < kSortWarps; ++w) {  // the first position of digit d of warp w
    const int own = counts.of[w][d];
    counts.of[w][d] = position;
    position += own;
  }
  __syncthreads();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = first_item() + r * kWarp + lane;
    if (i < count) sorted[counts.of[warp][digit_of(items[i], shift)] + rank[r]] = items[i];
  }
}

class Sorted {
 public:
  Sorted(int64_t count, Stream stream)
      : count_(count),
        tiles_(ceil_div(count, kSortTile)),
        items_(2 * count * sizeof(Keyed), stream),
        totals_(kDigits * tiles_ * sizeof(int), stream) {}

  Keyed* input() const { return items_.at<Keyed>(); }

  // What was written to input(), all keys below `limit`, in the order of the keys.
  const Keyed* by_key(int64_t limit, Stream stream) const {
    Keyed *from = input(), *to = from + count_;
    int* totals = totals_.at<int>();
    const Grid tiles{
        .blocks = dim3(tiles_), .threads = dim3(kSortThreads), .shared = sizeof(DigitCounts)};
    const Grid scan{.blocks = dim3(1), .threads = dim3(1024), .shared = sizeof(ScanScratch)};
    for (int shift = 0; shift < 32 && (limit - 1) >> shift > 0; shift += kDigitBits) {
      launch("sort_count", sort_count, tiles, stream, from, count_, shift, totals);
      launch("sort_scan", sort_scan, scan, stream, totals, kDigits * tiles_);
      launch("sort_move", sort_move, tiles, stream, from, count_, shift, totals, to);
      Keyed* const sorted = to;
      to = from;
      from = sorted;
    }
    return from;
  }

 private:
  int64_t count_, tiles_;
  Workspace items_, totals_;
};

}  // namespace pykern::cuda

// Products of halves by mma.sync: 128 rows of C per block and 128 or 256 columns, 64 x 64 per warp,
// four stages of 32 k under way by cp.async, the fragments of 16 k read while those before are
// multiplied. Of floats, which tensor cores read as tf32, half as many k in the same bytes: a word
// is a float where it is two halves, so both factors lie with k contiguous.
#pragma once
#include "cuda/gemm.cuh"
#include "cuda/mma.cuh"

namespace pykern::cuda {

constexpr int kTileRows = 128, kStages = 4;
template <class T>
constexpr int kDepth = 64 / sizeof(T);  // k of a stage
template <class T>
constexpr int kChunkOf = 16 / sizeof(T);  // numbers
constexpr int kWarpTile = 64;             // rows and columns of a warp

// Threads of a block are as many as columns: two warps up, kColumns / 64 across.
template <class T, int kColumns>
struct Stages {
  alignas(128) T a[kStages][kTileRows * kDepth<T>], b[kStages][kColumns * kDepth<T>];
};

// A stage of a factor is [row][k] where k is contiguous, else [k][row], in chunks of 16 bytes that
// are permuted within a line so that eight that ldmatrix reads at once are in different banks.
template <class T, bool k_contiguous, int kRows>
struct StageLayout {
  static_assert(k_contiguous || sizeof(T) == 2, "ldmatrix transposes halves");
  static constexpr int kPerLine = (k_contiguous ? kDepth<T> : kRows) / kChunkOf<T>;
  static constexpr int kLines = k_contiguous ? kRows : kDepth<T>;

  __device__ __forceinline__ static int swizzle(int line) {
    return k_contiguous ? line / 2 % 4 : line % 8;
  }
};

// Copies one factor's part of each stage, 16 bytes at a time: every thread the same chunk of some
// lines.
template <class T, bool k_contiguous, int kRows, int kThreads>
class Fetcher {
  using Layout = StageLayout<T, k_contiguous, kRows>;
  static constexpr int kChunk = kChunkOf<T>;
  static constexpr int kStep = kThreads / Layout::kPerLine;
  static_assert(kStep % 8 == 0);  // so a thread's lines have one swizzle

 public:
  static constexpr int kTimes = Layout::kLines / kStep;

  __device__ __forceinline__ Fetcher(const Factor& f, int64_t first_row, int64_t first_k)
      : step_(kStep * f.stride), depth_(k_contiguous ? kDepth<T> : kDepth<T> * f.stride) {
    const int line = threadIdx.x / Layout::kPerLine, chunk = threadIdx.x % Layout::kPerLine;
    const int64_t outer = (k_contiguous ? first_row : first_k) + line;
    const int64_t inner = (k_contiguous ? first_k : first_row) + chunk * kChunk;
    from_ = static_cast<const T*>(f.data) + outer * f.stride + inner;
    to_ = kept((line * Layout::kPerLine + (chunk ^ Layout::swizzle(line))) * kChunk);
    before_k_ = kept(k_contiguous ? chunk * kChunk : line);
    const int64_t left = f.rows - (k_contiguous ? outer : inner);
    rows_left_ = kept(static_cast<int>(left < kRows ? left : kRows));
  }

  // The lines of time i of a stage's k of which `left` exist; what is not there becomes 0.
  __device__ __forceinline__ void operator()(int i, int left, T* stage) const {
    const int k_left = left - before_k_;
    const int outer_left = k_contiguous ? rows_left_ : k_left;
    const int inner_left = k_contiguous ? k_left : rows_left_;
    const int there = inner_left < 0 ? 0 : inner_left > kChunk ? kChunk : inner_left;
    cp_async16(stage + to_ + i * (kStep * Layout::kPerLine * kChunk), from_ + i * step_,
               i * kStep < outer_left ? there * static_cast<int>(sizeof(T)) : 0);
  }
  __device__ __forceinline__ void advance() { from_ += depth_; }

 private:
  const T* from_;
  int64_t step_, depth_;
  int to_, before_k_, rows_left_;
};

// Reads a warp's fragments: number i is 16 rows by two chunks of k, as a left factor of mma or as
// two right ones. Floats are rounded to tf32 here: mma would cut them.
template <class T, bool k_contiguous, int kRows, bool left>
class Reader {
  using Layout = StageLayout<T, k_contiguous, kRows>;
  static constexpr int kChunk = kChunkOf<T>;

 public:
  __device__ __forceinline__ explicit Reader(int first_row) {
    const int lane = threadIdx.x % kWarp;
    const bool tall = left == k_contiguous;  // which index the upper half of the lanes moves
    const int line = tall ? lane % 16 : lane % 8 + lane / 16 * 8;
    half_ = kept((tall ? lane / 16 : lane / 8 % 2) ^ Layout::swizzle(line));
    line_ = kept(k_contiguous ? (first_row + line) * Layout::kPerLine
                              : line * Layout::kPerLine + first_row / kChunk);
  }
  __device__ __forceinline__ void operator()(uint32_t (&r)[4], const T* stage, int i, int k) const {
    if constexpr (k_contiguous)
      ldmatrix_x4(r, stage + (line_ + 16 * i * Layout::kPerLine + (half_ ^ k / kChunk)) * kChunk);
    else
      ldmatrix_x4_trans(r, stage + (line_ + k * Layout::kPerLine + (half_ ^ 2 * i)) * kChunk);
    if constexpr (sizeof(T) == sizeof(float))
#pragma unroll
      for (int j = 0; j < 4; ++j) r[j] = tf32_bits(__uint_as_float(r[j]));
  }

 private:
  int line_, half_;  // in chunks
};

// Half a tile of sums, rows apart by more than the banks.
template <int kColumns>
struct Sums {
  float of[kWarpTile][kColumns + 4];
};

template <class T, bool a_by_k, bool b_by_k, int kColumns>
__global__ void __launch_bounds__(kColumns, kColumns == 128 ? 2 : 1)
    gemm_halves(const Product<T> p) {
  constexpr int kUp = kWarpTile / 16, kAcross = kWarpTile / 8, kThreads = kColumns;
  auto& stages = shared_memory<Stages<T, kColumns>>();
  int64_t tile_row, tile_column;
  p.order.at(blockIdx.x, &tile_row, &tile_column);
  const int64_t m0 = tile_row * kTileRows, n0 = tile_column * kColumns;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int up = warp % 2 * kWarpTile, across = warp / 2 * kWarpTile;

  const int64_t K = p.end_k() - p.first_k();
  constexpr int kHalfDepth = kDepth<T> / 2;
  const int depths = static_cast<int>((K + kDepth<T> - 1) / kDepth<T>);
  Fetcher<T, a_by_k, kTileRows, kThreads> fetch_a(p.a, m0, p.first_k());
  Fetcher<T, b_by_k, kColumns, kThreads> fetch_b(p.b, n0, p.first_k());
  constexpr int kTimesA = decltype(fetch_a)::kTimes, kTimesB = decltype(fetch_b)::kTimes;
  const auto left_at = [&](int depth) {  // of k; none behind the last depth
    return depth + 1 < depths ? kDepth<T> : static_cast<int>(K - int64_t(depth) * kDepth<T>);
  };
  const auto commit = [&] {
    fetch_a.advance();
    fetch_b.advance();
    cp_async_commit();
  };

  const Reader<T, a_by_k, kTileRows, true> read_a(up);
  const Reader<T, b_by_k, kColumns, false> read_b(across);
  uint32_t a[2][kUp][4], b[2][kAcross / 2][4];  // fragments in use, and the next ones
  float sum[kUp][kAcross][4] = {};
  const auto multiply_row = [&](int which, int i) {
#pragma unroll
    for (int j = 0; j < kAcross; ++j)
      multiply(sum[i][j], a[which][i], b[which][j / 2][j % 2 * 2], b[which][j / 2][j % 2 * 2 + 1],
               T{});
  };
  const auto read = [&](int which, const T* left, const T* right, int i, int k) {
    read_a(a[which][i], left, i, k);
    read_b(b[which][i], right, i, k);
  };

  static_assert(kUp == kAcross / 2 && kTimesA <= kUp && kTimesB <= kUp);
  for (int depth = 0; depth < kStages - 1; ++depth) {
    for (int i = 0; i < kTimesA; ++i) fetch_a(i, left_at(depth), stages.a[depth]);
    for (int i = 0; i < kTimesB; ++i) fetch_b(i, left_at(depth), stages.b[depth]);
    commit();
  }
  cp_async_wait<kStages - 2>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kUp; ++i) read(0, stages.a[0], stages.b[0], i, 0);

  // A depth is two times two chunks of k: while the first is multiplied the second is read and a
  // later depth is asked for, to where the one before was, which all have read; while the second is
  // multiplied the next depth's first is read.
#pragma unroll 1
  for (int depth = 0; depth < depths; ++depth) {
    const T *left = stages.a[depth % kStages], *right = stages.b[depth % kStages];
    T* const later_a = stages.a[(depth + kStages - 1) % kStages];
    T* const later_b = stages.b[(depth + kStages - 1) % kStages];
    const int later_left = left_at(depth + kStages - 1);
#pragma unroll
    for (int i = 0; i < kUp; ++i) {
      read(1, left, right, i, kHalfDepth);
      if (i < kTimesA) fetch_a(i, later_left, later_a);
      if (i < kTimesB) fetch_b(i, later_left, later_b);
      multiply_row(0, i);
    }
    commit();
    cp_async_wait<kStages - 2>();
    __syncthreads();  // the next depth is there for all
    left = stages.a[(depth + 1) % kStages], right = stages.b[(depth + 1) % kStages];
#pragma unroll
    for (int i = 0; i < kUp; ++i) {
      read(0, left, right, i, 0);
      multiply_row(1, i);
    }
  }

  // Through shared memory, so that neighbours of a row are written together: the upper half of the
  // tile, then the lower.
  cp_async_wait<0>();
  auto& sums = reinterpret_cast<Sums<kColumns>&>(stages);
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    __syncthreads();  // the stages, or the first half, have been read
    if (warp % 2 == half) {
#pragma unroll
      for (int i = 0; i < kUp; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j)
#pragma unroll
          for (int r = 0; r < 4; ++r)
            sums.of[16 * i + lane / 4 + r / 2 * 8][across + 8 * j + lane % 4 * 2 + r % 2] =
                sum[i][j][r];
    }
    __syncthreads();
    finish_rows<kPack<T>>(p, sums.of, kColumns, m0 + half * kWarpTile, n0);
  }
}

}  // namespace pykern::cuda

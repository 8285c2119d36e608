// Tiles of halves in shared memory and products of them by mma.sync, for attention.
//
// A warp's product is a list of 16 x 8 pieces in registers: lane l holds of each the rows l / 4 and
// l / 4 + 8, columns 2 (l % 4) and the next. Two neighbours, rounded, are a left factor again, so
// weights go from one product to the next without leaving registers.
#pragma once
#include "cuda/attention.cuh"
#include "cuda/mma.cuh"

namespace pykern::cuda {

// Rows of kWidth numbers; the chunks of a row are permuted by its number, so that the eight rows
// that ldmatrix reads at a time lie in different banks.
template <class T, int kRows_, int kWidth_>
struct alignas(128) Tile {
  static constexpr int kRows = kRows_, kWidth = kWidth_, kPerRow = kWidth / kChunk;
  static_assert(kPerRow % 8 == 0);
  T of[kRows * kWidth];

  __device__ __forceinline__ T* chunk(int row, int c) {
    return of + row * kWidth + (c ^ row % 8) * kChunk;
  }
};

// Where the lanes of a warp point ldmatrix, 16 rows by 16 columns at a time. tall: lanes go down 16
// rows and then right; else down 8 rows, right, and down again.
//   left factor, k along the rows: tall            right factor, k along the rows: not tall
//   left factor, k down the rows: not tall, .trans  right factor, k down the rows: tall, .trans
template <bool tall, int kWidth>
class LaneRows {
 public:
  __device__ __forceinline__ LaneRows() {
    const int lane = threadIdx.x % kWarp;
    line_ = kept((tall ? lane % 16 : lane % 8 + lane / 16 * 8) * kWidth);
    half_ = kept((tall ? lane / 16 : lane / 8 % 2) ^ lane % 8);
  }
  // The 16 x 16 numbers from row `row`, a multiple of 8, and column 16 k on
  template <class T>
  __device__ __forceinline__ const T* operator()(const T* tile, int row, int k) const {
    return tile + row * kWidth + line_ + (half_ ^ 2 * k) * kChunk;
  }

 private:
  int line_, half_;
};

// A product of 16 rows by 16 n columns, rounded, as the left factor of the next one: 16 of its k
// each.
template <class T, int n>
__device__ __forceinline__ void left_factors(const float (&product)[2 * n][4],
                                             uint32_t (&a)[n][4]) {
#pragma unroll
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      a[k][i] =
          rounded_pair<T>(product[2 * k + i / 2][i % 2 * 2], product[2 * k + i / 2][i % 2 * 2 + 1]);
}

// Number i of piece n of such factors
template <class T, int k>
__device__ __forceinline__ float number_of(const uint32_t (&a)[k][4], int n, int i) {
  const uint32_t pair = a[n / 2][n % 2 * 2 + i / 2];
  if constexpr (std::is_same_v<T, bf16>)
    return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000);
  else
    return f16_value(static_cast<uint16_t>(i % 2 == 0 ? pair : pair >> 16));
}

// Copies rows [first, end) of a matrix into a tile, 16 bytes a thread; what is not there becomes 0.
// Rows that are not aligned are copied number by number.
template <class T, class Tile_, int kThreads>
struct Fetch {
  static constexpr int kPerRow = Tile_::kPerRow, kStep = kThreads / kPerRow;
  static constexpr int kTimes = Tile_::kRows / kStep;
  static_assert(kTimes * kStep == Tile_::kRows);

  __device__ __forceinline__ Fetch(const T* rows, int64_t stride, int width, bool words)
      : thread_(kept(static_cast<int>(threadIdx.x))), stride_(stride), words_(words) {
    const int column = thread_ % kPerRow * kChunk, left = width - column;
    valid_ = left < 0 ? 0 : left > kChunk ? kChunk : left;
    from_ = rows + column;
  }
  __device__ __forceinline__ void operator()(Tile_& tile, int first, int end) const {
    const int line = thread_ / kPerRow, c = thread_ % kPerRow;
    const T* from = from_ + (first + line) * stride_;
    const int left = end - first - line;  // rows from this thread's first one on
    if (words_) {
#pragma unroll
      for (int i = 0; i < kTimes; ++i, from += kStep * stride_)
        cp_async16(tile.chunk(line + i * kStep, c), from,
                   i * kStep < left ? valid_ * static_cast<int>(sizeof(T)) : 0);
    } else {
#pragma unroll 1
      for (int i = 0; i < kTimes; ++i, from += kStep * stride_) {
        Pack<T, kChunk> pack;
        read(from, i * kStep < left ? valid_ : 0, false, pack);
        *reinterpret_cast<Pack<T, kChunk>*>(tile.chunk(line + i * kStep, c)) = pack;
      }
    }
  }

 private:
  int thread_;  // kept(): what follows from it is computed where it is used
  const T* from_;
  int64_t stride_;
  int valid_;
  bool words_;
};

// ---- numbers that are not finite: 0 times them is NaN, so in a tile that some row does not see
// as a whole they are replaced

// Sets bit i of `rows` where row i of the tile has a number that is not finite. All threads call;
// a barrier must follow.
template <int kThreads, class T, int kRows, int kWidth>
__device__ __forceinline__ void find_strange(const Tile<T, kRows, kWidth>& tile,
                                             uint32_t (&rows)[kRows / 32]) {
  constexpr int kPerRow = kWidth / kChunk;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kPerRow; i += kThreads) {
    Pack<T, kChunk> pack;
    read(tile.of + i * kChunk, kChunk, true, pack);
    bool finite = true;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) finite = finite && is_finite(pack.of[j]);
    if (!finite) atomicOr(&rows[i / kPerRow / 32], 1u << i / kPerRow % 32);
  }
}

// Makes the numbers of the tile 0 that are not finite. A barrier must stand before; one ends it.
template <int kThreads, class T, int kRows, int kWidth>
__device__ __forceinline__ void replace_strange(Tile<T, kRows, kWidth>& tile) {
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kWidth; i += kThreads)
    if (!is_finite(tile.of[i])) tile.of[i] = T{};
  __syncthreads();
}

// The bits of a row's word of visible keys that belong to this lane's columns, from bit 0 on:
// column 8 n + 2 (lane % 4) + r is bit 8 n + r.
__device__ __forceinline__ uint64_t of_lane(uint64_t word) { return word >> threadIdx.x % 4 * 2; }
__device__ __forceinline__ bool has(uint64_t word, int n, int r) {
  const uint32_t half = static_cast<uint32_t>(n < 4 ? word : word >> 32);
  return (half >> (n % 4 * 8 + r) & 1) != 0;
}

// Of a row's keys in this lane's columns: those that dropout keeps, as has() reads them.
template <class T>
__device__ __forceinline__ uint64_t kept_of_lane(const Scores<T>& x, int b, int h, int t,
                                                 int tile) {
  const uint64_t seed = static_cast<uint64_t>(*x.dropout.seed);
  uint64_t kept = 0;
#pragma unroll
  for (int upper = 0; upper < 2; ++upper)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int lane = 8 * upper + threadIdx.x % 4 * 2 + r;
      const uint32_t bits = keep_bits(x.dropout, seed, b, h, t, tile, lane);
#pragma unroll
      for (int w = 0; w < 4; ++w)  // column 16 w + lane is in piece 2 w + upper
        kept |= uint64_t{bits >> w & 1} << (8 * (2 * w + upper) + r);
    }
  return kept;
}

// Whether query t sees a key that window and mask let it see: a bias of -infinity hides it.
template <class T>
__device__ __forceinline__ bool unbiased(const Scores<T>& x, int b, int h, int t, int key) {
  return !x.bias.data || widen(x.bias.at(b, h, t)[key * x.bias_key]) != -INFINITY;
}

}  // namespace pykern::cuda

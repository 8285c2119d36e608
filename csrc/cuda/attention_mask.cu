// A mask as bits: a word for each query and tile of keys, and for each tile of 64 queries whether
// some pair is seen and whether some pair is hidden. Dimensions in which the mask is expanded are
// packed once.
#include "cuda/attention.cuh"

namespace pykern::cuda {
namespace {

constexpr int kPackWarps = 8;

struct Packing {
  const uint8_t* mask;
  int64_t batch, head, row, key;  // strides
  int rows, keys, row_tiles, words;
  int64_t heads;
  uint64_t* to;
  uint8_t* classes;
};

struct PackShared {
  int found[kPackWarps];
};

// A block packs a tile of 64 rows by 64 keys, a warp every eighth row of it.
__global__ void __launch_bounds__(kPackWarps* kWarp) pack_mask(const Packing a) {
  auto& shared = shared_memory<PackShared>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t tile = blockIdx.x / a.words, which = tile / a.row_tiles;  // which batch and head
  const int word = static_cast<int>(blockIdx.x % a.words);
  const int first = static_cast<int>(tile % a.row_tiles) * kKeys;
  const int end = a.rows - first < kKeys ? a.rows : first + kKeys;
  const uint8_t* mask =
      a.mask + which / a.heads * a.batch + which % a.heads * a.head + word * kKeys * a.key;
  const int keys = a.keys - word * kKeys;  // at least one
  const uint64_t all = Scores<float>::low_bits(keys);
  int found = 0;
  for (int row = first + warp; row < end; row += kPackWarps) {
    const uint8_t* at = mask + row * a.row;
    const unsigned low = __ballot_sync(kAllLanes, lane < keys && at[lane * a.key] != 0);
    const int upper = lane + kWarp;
    const unsigned high = __ballot_sync(kAllLanes, upper < keys && at[upper * a.key] != 0);
    const uint64_t bits = low | uint64_t{high} << 32;
    found |= (bits != 0 ? kSeen : 0) | (bits != all ? kHidden : 0);
    if (lane == 0) a.to[(which * a.rows + row) * a.words + word] = bits;
  }
  if (lane == 0) shared.found[warp] = found;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < kPackWarps; ++w) found |= shared.found[w];
  a.classes[tile * a.words + word] = static_cast<uint8_t>(found);
}

}  // namespace

PackedMask::Sizes::Sizes(const Tensor& mask) {
  const auto size = [&](int i) { return mask.stride[i] == 0 ? 1 : mask.size[i]; };
  const bool some = mask.given && count(mask) > 0;
  batches = some ? size(0) : 0, heads = some ? size(1) : 0, rows = some ? size(2) : 0;
  words = some ? ceil_div(mask.size[3], kKeys) : 0, row_tiles = ceil_div(rows, kKeys);
}

PackedMask::PackedMask(const Tensor& mask, Stream stream)
    : sizes_(mask), memory_(sizes_.all_words() * sizeof(uint64_t) + sizes_.all_tiles(), stream) {
  const Sizes& n = sizes_;
  if (n.all_tiles() == 0) return;
  const auto step = [](int64_t size, int64_t stride) { return size == 1 ? 0 : stride; };
  uint64_t* words = memory_.at<uint64_t>();
  uint8_t* classes = reinterpret_cast<uint8_t*>(words + n.all_words());
  bits_ = {.words = words,
           .classes = classes,
           .batch = step(n.batches, n.heads * n.rows * n.words),
           .head = step(n.heads, n.rows * n.words),
           .row = step(n.rows, n.words),
           .class_batch = step(n.batches, n.heads * n.row_tiles * n.words),
           .class_head = step(n.heads, n.row_tiles * n.words),
           .class_row = step(n.row_tiles, n.words)};
  const Packing a{.mask = static_cast<const uint8_t*>(mask.data),
                  .batch = mask.stride[0],
                  .head = mask.stride[1],
                  .row = mask.stride[2],
                  .key = mask.stride[3],
                  .rows = static_cast<int>(n.rows),
                  .keys = static_cast<int>(mask.size[3]),
                  .row_tiles = static_cast<int>(n.row_tiles),
                  .words = static_cast<int>(n.words),
                  .heads = n.heads,
                  .to = words,
                  .classes = classes};
  launch("pack_mask", pack_mask,
         Grid{.blocks = dim3(n.all_tiles()),
              .threads = dim3(kPackWarps * kWarp),
              .shared = sizeof(PackShared)},
         stream, a);
}

}  // namespace pykern::cuda

// append: what stands before the attention of decode. A block looks at one sequence, whose lengths,
// pages and positions the host has not read, then moves packs of its new rows: keys, turned to
// their positions, and values into their slots, queries, turned, to where the attention reads them.
#include "cuda/decode.cuh"
#include "cuda/rotate.cuh"

namespace pykern::cuda {
namespace {

constexpr int kAppendThreads = 128;
constexpr int64_t kMostSequences = 65535;  // blocks in y
constexpr int64_t kMostSlices = 256;       // blocks of a sequence

template <class T>
struct Append {
  HeadRows<const T> q, k, v;
  HeadRows<T> rotated, k_cache, v_cache;
  RowScales k_scale, v_scale;
  Slots slots;
  Lengths lengths, padding;
  Numbers<T> cos, sin;
  int64_t cos_row, sin_row, positions;
  int64_t capacity, pages;
  int B, G, H, queries, added, D, E, half;
  int* keys;
  int* tickets;
  int64_t tickets_per_sequence;
  bool rotates, k_vectors, v_vectors, q_vectors;
};

struct AppendShared {
  int bad[kAppendThreads / kWarp];
};

// How many keys sequence b holds behind the append, or -1.
template <class T>
__device__ __forceinline__ int keys_behind(const Append<T>& a, int b, AppendShared& shared) {
  const int64_t length = a.lengths.at(b), padding = a.padding.at(b), end = length + a.added;
  const int64_t keys = end - padding;
  bool good = length >= 0 && end <= a.capacity && padding >= 0 && padding <= length;
  if (a.rotates) good = good && keys >= a.queries && keys <= a.positions;
  bool bad = !good;
  if (good && a.slots.table) {
    const int page = a.slots.page, used = static_cast<int>((end + page - 1) / page);
    for (int i = static_cast<int>(padding) / page + threadIdx.x; i < used; i += blockDim.x) {
      const int at = a.slots.table[b * a.slots.table_batch + i * a.slots.table_step];
      bad = bad || at < 0 || at >= a.pages;
    }
  }
  const unsigned votes = __ballot_sync(kAllLanes, bad);
  if (threadIdx.x % kWarp == 0) shared.bad[threadIdx.x / kWarp] = votes != 0;
  __syncthreads();
  int any = 0;
#pragma unroll
  for (int w = 0; w < kAppendThreads / kWarp; ++w) any |= shared.bad[w];
  __syncthreads();
  return any ? -1 : static_cast<int>(keys);
}

template <class T>
__device__ __forceinline__ void copy_pack(const T* from, T* to, int64_t valid, bool vectors) {
  Pack<T, kPack<T>> pack;
  read(from, valid, vectors, pack);
  if (vectors && valid >= kPack<T>) {
    uint4 word;
    memcpy(&word, &pack, sizeof word);
    store_word(reinterpret_cast<uint4*>(to), word);
  } else {
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j)
      if (j < valid) to[j] = pack.of[j];
  }
}

// A warp stores new row n of key head g as int8, q = x / scale to the nearest integer with scale =
// max |x| / 127; where a number is not finite, the row that is read is NaN.
template <class T>
__device__ __forceinline__ void store_int8(const Append<T>& a, int b, int g, int n, bool value,
                                           int position, const Slots::At& at) {
  using C = Compute<T>;
  constexpr int kEach = static_cast<int>(kMostHeadSize) / kWarp;
  const int width = value ? a.E : a.D;
  const T* x = (value ? a.v : a.k).at(b, g, n);
  C y[kEach];
  float most = 0;
  bool finite = true;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int d = i * kWarp + threadIdx.x % kWarp;
    y[i] = d < width ? widen(x[d]) : C(0);
    if (!value && d < 2 * a.half) {
      const int pair = d < a.half ? d : d - a.half;
      C c[1], s[1];
      a.cos.load(position * a.cos_row + pair, 1, false, c);
      a.sin.load(position * a.sin_row + pair, 1, false, s);
      const C left = widen(x[pair]), right = widen(x[a.half + pair]);
      y[i] = widen(
          narrow<T>(d < a.half ? fma(left, c[0], -(right * s[0])) : fma(right, c[0], left * s[0])));
    }
    const float size = fabsf(static_cast<float>(y[i]));
    finite = finite && size < INFINITY;
    most = fmaxf(most, size);
  }
  finite = __all_sync(kAllLanes, finite);
  const float scale = finite ? across_lanes<kWarp>(most, Larger{}) / 127.0f : NAN;
  int8_t* to = const_cast<int8_t*>(int8_row(value ? a.v_cache : a.k_cache, at.batch, g, at.row));
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int d = i * kWarp + threadIdx.x % kWarp;
    if (d < width)
      to[d] = scale > 0 ? static_cast<int8_t>(rintf(static_cast<float>(y[i]) / scale)) : int8_t{0};
  }
  if (threadIdx.x % kWarp == 0) (value ? a.v_scale : a.k_scale).at(at.batch, g, at.row) = scale;
}

template <class T, bool interleaved, bool kInt8>
__global__ void __launch_bounds__(kAppendThreads) decode_append(const Append<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& shared = shared_memory<AppendShared>();
  const int pair_packs = (a.half + W - 1) / W;
  const int packs = pair_packs + (a.D - 2 * a.half + W - 1) / W, v_packs = (a.E + W - 1) / W;
  const int64_t rows = int64_t(a.G) * a.added;  // of the keys, and of the values
  const int64_t k_items = kInt8 ? 0 : rows * packs, v_end = kInt8 ? 0 : rows * (packs + v_packs);
  const int64_t items = v_end + (a.rotates ? int64_t(a.H) * a.queries * packs : 0);
  const auto turned = [&](const T* from, T* to, int position, int pack, bool vectors) {
    if (pack >= pair_packs) {
      const int first = 2 * a.half + (pack - pair_packs) * W;
      copy_pack(from + first, to + first, a.D - first, vectors);
      return;
    }
    const int64_t first = pack * W, valid = a.half - first;
    C c[W], s[W];
    a.cos.load(position * a.cos_row + first, valid, vectors, c);
    a.sin.load(position * a.sin_row + first, valid, vectors, s);
    turn_pack<interleaved>(from, to, a.half, first, vectors, c, s);
  };
  for (int b = blockIdx.y; b < a.B; b += gridDim.y) {
    const int keys = keys_behind(a, b, shared);
    if (blockIdx.x == 0) {
      if (threadIdx.x == 0) a.keys[b] = keys;
      for (int64_t i = threadIdx.x; i < a.tickets_per_sequence; i += blockDim.x)
        a.tickets[b * a.tickets_per_sequence + i] = 0;
    }
    if (keys < 0) continue;
    const int padding = a.padding.at(b), old = keys - a.added;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < items;
         i += int64_t(gridDim.x) * blockDim.x) {
      if (i >= v_end) {
        const int64_t row = quotient(i - v_end, packs), h = quotient(row, a.queries);
        const int t = static_cast<int>(row - h * a.queries);
        turned(a.q.at(b, h, t), a.rotated.at(b, h, t), keys - a.queries + t,
               static_cast<int>(i - v_end - row * packs), a.q_vectors);
        continue;
      }
      const bool value = i >= k_items;
      const int64_t item = value ? i - k_items : i, each = value ? v_packs : packs;
      const int64_t row = quotient(item, each), g = quotient(row, a.added);
      const int n = static_cast<int>(row - g * a.added), pack = static_cast<int>(item - row * each);
      const Slots::At at = a.slots.at(b, padding + old + n);
      if (value)
        copy_pack(a.v.at(b, g, n) + pack * W, a.v_cache.at(at.batch, g, at.row) + pack * W,
                  a.E - pack * W, a.v_vectors);
      else
        turned(a.k.at(b, g, n), a.k_cache.at(at.batch, g, at.row), old + n, pack, a.k_vectors);
    }
    if constexpr (kInt8) {
      constexpr int kWarps = kAppendThreads / kWarp;
      for (int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < 2 * rows;
           i += int64_t(gridDim.x) * kWarps) {
        const int g = static_cast<int>(i / 2 / a.added), n = static_cast<int>(i / 2 % a.added);
        store_int8(a, b, g, n, i % 2 != 0, old + n, a.slots.at(b, padding + old + n));
      }
    }
  }
}

}  // namespace

void append(const DecodeForward& op, const Appended& to, Stream stream) {
  const int64_t B = op.q.size[0], H = op.q.size[1], steps = op.q.size[2], D = op.q.size[3];
  const int64_t G = op.k_cache.size[1], E = op.v_cache.size[3];
  const int64_t added = op.k.given ? op.k.size[2] : 0;
  const bool rotates = op.rotary_cos.given;
  const int64_t slots = op.k_cache.size[2] * (op.block_table.given ? op.block_table.size[1] : 1);
  with_type(op.q.dtype, [&]<class T>(T) {
    constexpr int W = kPack<T>;
    const int64_t half = rotates ? op.rotary_cos.size[1] : 0;
    const bool tables = take_packs<T>({&op.rotary_cos, &op.rotary_sin}) && half % W == 0;
    Append<T> a{.q = head_rows<const T>(op.q),
                .k = head_rows<const T>(op.k),
                .v = head_rows<const T>(op.v),
                .rotated = {static_cast<T*>(to.rotated), H * steps * to.rotated_row,
                            steps * to.rotated_row, to.rotated_row},
                .k_cache = head_rows<T>(op.k_cache),
                .v_cache = head_rows<T>(op.v_cache),
                .k_scale = row_scales(op.k_scale),
                .v_scale = row_scales(op.v_scale),
                .slots = slots_of(op),
                .lengths = lengths_of(op.cache_seqlens),
                .padding = lengths_of(op.cache_leftpad),
                .cos = numbers_of<T>(op.rotary_cos),
                .sin = numbers_of<T>(op.rotary_sin),
                .cos_row = op.rotary_cos.stride[0],
                .sin_row = op.rotary_sin.stride[0],
                .positions = rotates ? op.rotary_cos.size[0] : 0,
                .capacity = slots,
                .pages = op.k_cache.size[0],
                .B = static_cast<int>(B),
                .G = static_cast<int>(G),
                .H = static_cast<int>(H),
                .queries = static_cast<int>(steps),
                .added = static_cast<int>(added),
                .D = static_cast<int>(D),
                .E = static_cast<int>(E),
                .half = static_cast<int>(half),
                .keys = to.keys,
                .tickets = to.tickets,
                .tickets_per_sequence = to.tickets_per_sequence,
                .rotates = rotates,
                .k_vectors = tables && take_packs<T>({&op.k, &op.k_cache}),
                .v_vectors = take_packs<T>({&op.v, &op.v_cache}),
                .q_vectors = tables && takes_packs<T>(op.q)};
    const int64_t items = G * added * (D + E) / W + (rotates ? H * steps * D / W : 0);
    const int64_t slices = ceil_div(items, kAppendThreads);
    const Grid grid{.blocks = dim3(slices < 1             ? 1
                                   : slices < kMostSlices ? slices
                                                          : kMostSlices,
                                   B < kMostSequences ? B : kMostSequences),
                    .threads = dim3(kAppendThreads),
                    .shared = sizeof(AppendShared)};
    const auto start = [&](auto kernel) {
      launch("attention_with_kvcache", kernel, grid, stream, a);
    };
    if constexpr (kTakesInt8<T>)
      if (op.k_scale.given) return start(decode_append<T, false, true>);
    start(op.rotary_interleaved ? decode_append<T, true, false> : decode_append<T, false, false>);
  });
}

}  // namespace pykern::cuda

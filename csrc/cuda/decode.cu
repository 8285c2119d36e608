// decode: append and rotate (decode_append.cu), then attend. Rows of a block are all query heads of
// a key head and all their queries, so keys and values are read once for up to 16 rows.
//
// Bytes: S (D + E) numbers for each sequence and key head, and for each part of the keys but the
// only one (rows + 1) E floats twice, which stay in the L2 cache: 3 % for 8 rows of 128. Halves are
// bound by memory up to 16 rows: a tile of 16 keys of 128 numbers, 8 KB, takes 32 mma of some 300
// instructions, a fifth of what a processor can issue in the time. More rows read the keys again,
// mostly from the L2 cache.
#include "cuda/decode_halves.cuh"
#include "cuda/decode_plain.cuh"

namespace pykern::cuda {
namespace {

constexpr int64_t kBlocks = 1024;  // a task's keys are dealt to more blocks until there are so many
constexpr size_t kBlockShared = 99 << 10;  // what a block may have on every GPU from sm_80 on
constexpr int64_t kMostPartialBytes = int64_t{256} << 20;
constexpr const char* kOp = "attention_with_kvcache";

// Sections of scratch memory
class Sections {
 public:
  size_t take(size_t bytes) {
    const size_t at = bytes_;
    bytes_ += (bytes + 255) / 256 * 256;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

AttentionInputs inputs_of(const DecodeForward& op) {
  AttentionInputs x;
  x.q = op.q, x.k = op.k_cache, x.v = op.v_cache;
  x.alibi_slopes = op.alibi_slopes, x.sinks = op.sinks;
  x.left = op.left, x.right = op.right, x.scale = op.scale, x.softcap = op.softcap;
  return x;
}

// How many rows a block takes: of halves so many that their sums fill the registers, or 16.
template <class T>
int rows_of_block(int64_t rows, int64_t width, bool int8) {
  if constexpr (!kHalf<T>) return kPlainRows<T>;
  return int8 || rows <= kTile || width > 128 ? kTile : width > 64 ? 2 * kTile : 4 * kTile;
}

template <int kWidth, int kTiles, bool kInt8 = false, class T>
void attend_halves(const Decode<T>& a, Stream stream) {
  using Shared = HalvesShared<T, kWidth, kTiles, kInt8>;
  static_assert(sizeof(Shared) <= kBlockShared);
  launch(kOp, decode_halves<T, kWidth, kTiles, kInt8>,
         Grid{.blocks = dim3(int64_t(a.tasks) * a.splits),
              .threads = dim3(DecodeShape<kWidth, kTiles>::kThreads),
              .shared = sizeof(Shared)},
         stream, a);
}

template <bool kInt8, class T>
void attend_plain(const Decode<T>& a, Stream stream) {
  launch(kOp, decode_plain<T, kInt8>,
         Grid{.blocks = dim3(int64_t(a.tasks) * a.splits),
              .threads = dim3(kPlainWarps * kWarp),
              .shared = sizeof(PlainDecodeShared<T>)},
         stream, a);
}

template <class T>
void attend_int8(const Decode<T>& a, int64_t width, Stream stream) {
  if constexpr (!kHalf<T>)
    attend_plain<true>(a, stream);
  else if (width > 128)
    attend_halves<256, 1, true>(a, stream);
  else
    width > 64 ? attend_halves<128, 1, true>(a, stream) : attend_halves<64, 1, true>(a, stream);
}

template <class T>
void attend(const Decode<T>& a, int64_t width, int rows, Stream stream) {
  if constexpr (kTakesInt8<T>)
    if (a.k_scale.data) return attend_int8(a, width, stream);
  if constexpr (!kHalf<T>)
    attend_plain<false>(a, stream);
  else if (width > 128)
    attend_halves<256, 1>(a, stream);
  else if (width > 64)
    rows > kTile ? attend_halves<128, 2>(a, stream) : attend_halves<128, 1>(a, stream);
  else
    rows > kTile ? attend_halves<64, 4>(a, stream) : attend_halves<64, 1>(a, stream);
}

template <class T>
void run(const DecodeForward& op, Stream stream) {
  using C = Compute<T>;
  constexpr int W = kPack<C>;
  const int64_t B = op.q.size[0], H = op.q.size[1], queries = op.q.size[2], D = op.q.size[3];
  const int64_t G = op.k_cache.size[1], E = op.v_cache.size[3];
  const int64_t slots = op.k_cache.size[2] * (op.block_table.given ? op.block_table.size[1] : 1);
  const int64_t rows = G == 0 ? 0 : H / G * queries, width = D > E ? D : E;
  const int most_rows = rows_of_block<T>(rows, width, op.k_scale.given);
  const int64_t row_blocks = ceil_div(rows, most_rows);
  const int64_t tasks = B * G * row_blocks, most = int64_t{1} << 30;
  PYKERN_CHECK(value, D <= kMostHeadSize && E <= kMostHeadSize, kOp, ": head sizes ", D, " and ", E,
               " must be at most ", kMostHeadSize, " on CUDA");
  PYKERN_CHECK(value, B < most && H < most && rows < most && slots < most && tasks < most, kOp,
               ": ", B, " sequences, ", rows, " rows of a key head, ", tasks,
               " blocks of them and ", slots, " slots must be fewer than ", most, " on CUDA");

  Decode<T> a{};
  a.scores = scores_of<T>(inputs_of(op), {});
  a.q = head_rows<const T>(op.q);
  a.k = head_rows<const T>(op.k_cache), a.v = head_rows<const T>(op.v_cache);
  a.k_scale = row_scales(op.k_scale), a.v_scale = row_scales(op.v_scale);
  a.out = head_rows<T>(op.out), a.lse = stats_of(op.lse);
  a.slots = slots_of(op), a.padding = lengths_of(op.cache_leftpad);
  a.G = static_cast<int>(G), a.rows = static_cast<int>(rows);
  a.row_blocks = static_cast<int>(row_blocks), a.tasks = static_cast<int>(tasks);
  // numbers of a cache that are moved at a time: 16 bytes, or what a pack of floats is made of
  const int words = !op.k_scale.given ? kPack<T> : kHalf<T> ? 16 : W;
  a.k_vectors = takes_words(op.k_cache, words), a.v_vectors = takes_words(op.v_cache, words);
  a.out_vectors = takes_words(op.out, W), a.q_pairs = takes_words(op.q, 2);
  a.width = static_cast<int>(E < 1 ? W : ceil_div(E, W) * W);
  a.partial_rows = static_cast<int>(rows < most_rows ? rows : most_rows);

  // Many tasks take their parts in order, few are dealt to several blocks, where memory allows.
  const int64_t parts = slots == 0 ? 1 : part_of(static_cast<int>(slots - 1)) + 1;
  const int64_t set_bytes = int64_t(a.partial_rows) * (a.width + W) * sizeof(C);
  const int64_t wanted = tasks == 0 ? 1 : kBlocks / tasks;
  int64_t splits = wanted < parts ? wanted : parts;
  if (splits < 2 || tasks * parts * set_bytes > kMostPartialBytes) splits = 1;
  a.splits = static_cast<int>(splits);
  a.partials = static_cast<int>(parts == 1 ? 0 : splits == 1 ? 2 : parts);

  const int64_t rotated_row = op.rotary_cos.given ? ceil_div(D, kPack<T>) * kPack<T> : 0;
  Sections sections;
  const size_t keys = sections.take(B * sizeof(int)), tickets = sections.take(tasks * sizeof(int));
  const size_t rotated = sections.take(B * H * queries * rotated_row * sizeof(T));
  const size_t partial = sections.take(tasks * a.partials * set_bytes);
  const Workspace memory(sections.bytes(), stream);
  char* const start = memory.at<char>();
  const Appended to{reinterpret_cast<int*>(start + keys), reinterpret_cast<int*>(start + tickets),
                    G * row_blocks, start + rotated, rotated_row};
  a.keys = to.keys, a.tickets = to.tickets;
  a.partial = reinterpret_cast<C*>(start + partial);
  if (rotated_row > 0) {
    a.q = {static_cast<const T*>(to.rotated), H * queries * rotated_row, queries * rotated_row,
           rotated_row};
    a.q_pairs = true;
  }
  append(op, to, stream);
  if (tasks == 0) return;
  attend(a, width, most_rows, stream);
}

}  // namespace

void attention_with_kvcache(const DecodeForward& op, Stream stream) {
  if (op.q.size[0] == 0) return;
  const OnDevice device(op.q);
  with_type(op.q.dtype, [&]<class T>(T) { run<T>(op, stream); });
}

}  // namespace pykern::cuda

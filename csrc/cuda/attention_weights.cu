// What attention keeps to itself, made visible: the weights of chosen rows, and the dropout mask.
#include "cuda/attention_plain.cuh"

namespace pykern::cuda {
namespace {

template <class T>
struct Weights {
  Scores<T> x;
  HeadRows<const T> q, k;
  HeadRows<T> weights;
  Stats lse;
  const int64_t* chosen;  // null: all rows
  int64_t chosen_step;
  int rows, row_tiles, key_tiles;
  bool words;
};

template <class T>
using WeightTile = PlainTile<Compute<T>, kKeys, false>;

// A block has 64 chosen rows (double 32) by 64 keys of a head. A row that is none is NaN.
template <class T>
__global__ void __launch_bounds__(kTileThreads, 1) attention_weights_kernel(const Weights<T> a) {
  using C = Compute<T>;
  constexpr int V = kPack<C>, m = WeightTile<T>::kEach;
  auto& shared = shared_memory<WeightTile<T>>();
  const Scores<T>& x = a.x;
  const int tile = blockIdx.x % a.key_tiles, above = blockIdx.x / a.key_tiles;
  const int first = above % a.row_tiles * kOwned<C>, which = above / a.row_tiles;
  const int b = which / x.H, h = which % x.H;
  const Place at = x.place(b);
  const auto row_of = [&](int i) {  // -1: none
    if (first + i >= a.rows) return -1;
    const int64_t t = a.chosen ? a.chosen[(first + i) * a.chosen_step] : first + i;
    return t < 0 || t >= at.queries ? -1 : static_cast<int>(t);
  };
  const auto query_at = [&](int i) {
    const int t = row_of(i);
    return t < 0 ? nullptr : a.q.at(b, h, t);
  };
  C s[V][m];
  tile_products<T>(shared, query_at,
                   rows_at(a.k.at(b, h / x.group, 0), a.k.row, tile * kKeys, at.keys), x.D, a.words,
                   s);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int own = side_row() * V + i, t = row_of(own);
    if (first + own >= a.rows) break;
    const bool known = t >= 0;
    const RowOptions<T> row(x, at, b, h, known ? t : 0);
    const RowFacts<C> f = facts_of(known ? a.lse.at(b, h, t) : double{NAN}, C(0));
    const uint64_t word = known ? x.visible(at, b, h, t, tile) : 0;
    T* to = a.weights.at(b, h, first + own) + tile * kKeys;
#pragma unroll
    for (int j = 0; j < m; ++j) {
      const int key = side_column() + j * kSide;
      if (tile * kKeys + key >= at.keys) break;
      C p = known ? C(0) : C(NAN);
      if (word >> key & 1) {
        const C y = row.score(x, s[i][j], tile * kKeys + key);
        p = row.bias && y == C(-INFINITY) ? C(0) : power2(y - f.shift) * f.factor;
      }
      to[key] = narrow<T>(p);
    }
  }
}

struct Keep {
  Dropout dropout;
  bool* keep;
  int64_t words, tiles, H, T_, S;  // words: all of them
};

constexpr int kKeepThreads = 256;

// 16 threads have the 64 keys of a tile of a row.
__global__ void __launch_bounds__(kKeepThreads) attention_dropout_kernel(const Keep a) {
  const int64_t i = int64_t{blockIdx.x} * (kKeepThreads / kSide) + threadIdx.x / kSide;
  if (i >= a.words) return;
  const int lane = threadIdx.x % kSide;
  const int64_t row = quotient(i, a.tiles), tile = i - row * a.tiles;
  const int64_t head = quotient(row, a.T_), b = quotient(head, a.H);
  const int t = static_cast<int>(row - head * a.T_), h = static_cast<int>(head - b * a.H);
  const uint32_t bits = a.dropout.threshold == 0
                            ? ~0u
                            : keep_bits(a.dropout, *a.dropout.seed, static_cast<int>(b), h, t,
                                        static_cast<int>(tile), lane);
#pragma unroll
  for (int j = 0; j < kKeys / kSide; ++j) {
    const int64_t s = tile * kKeys + lane + j * kSide;
    if (s < a.S) a.keep[row * a.S + s] = bits >> j & 1;
  }
}

}  // namespace

void attention_weights(const AttentionWeights& op, Stream stream) {
  if (count(op.weights) == 0) return;
  const OnDevice device(op.q);
  const PackedMask mask(op.mask, stream);
  with_type(op.q.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    constexpr int V = kPack<C>;
    const int64_t rows = op.weights.size[2];
    PYKERN_CHECK(value, rows < kMostRows, "attention: ", rows, " rows must be fewer than ",
                 kMostRows, " on CUDA");
    const Weights<T> a{
        .x = scores_of<T>(op, mask.bits()),
        .q = head_rows<const T>(op.q),
        .k = head_rows<const T>(op.k),
        .weights = head_rows<T>(op.weights),
        .lse = stats_of(op.lse),
        .chosen = static_cast<const int64_t*>(op.rows.given ? op.rows.data : nullptr),
        .chosen_step = op.rows.stride[0],
        .rows = static_cast<int>(rows),
        .row_tiles = static_cast<int>(ceil_div(rows, kOwned<C>)),
        .key_tiles = static_cast<int>(ceil_div(op.k.size[2], kKeys)),
        .words = takes_words(op.q, V) && takes_words(op.k, V)};
    const int64_t blocks = op.q.size[0] * op.q.size[1] * a.row_tiles * a.key_tiles;
    launch(
        "attention_weights", attention_weights_kernel<T>,
        Grid{
            .blocks = dim3(blocks), .threads = dim3(kTileThreads), .shared = sizeof(WeightTile<T>)},
        stream, a);
  });
}

void attention_dropout(const AttentionDropout& op, Stream stream) {
  if (count(op.keep) == 0) return;
  const OnDevice device(op.keep);
  const int64_t T_ = op.keep.size[2], S = op.keep.size[3], tiles = ceil_div(S, kKeys);
  const Keep a{.dropout = dropout_of(op.seed, op.dropout_p),
               .keep = static_cast<bool*>(op.keep.data),
               .words = rows(op.keep) * tiles,
               .tiles = tiles,
               .H = op.keep.size[1],
               .T_ = T_,
               .S = S};
  launch(
      "attention_dropout", attention_dropout_kernel,
      Grid{.blocks = dim3(ceil_div(a.words, kKeepThreads / kSide)), .threads = dim3(kKeepThreads)},
      stream, a);
}

}  // namespace pykern::cuda

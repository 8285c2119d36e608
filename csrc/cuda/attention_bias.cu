// attention: dbias = dS, summed where the bias was expanded. A block owns a tile of the result, 64
// keys by 64 queries (double 32), or one of either where they are summed, and makes dS of every
// batch, head and tile that was expanded onto it, in order.
#include "cuda/attention_plain.cuh"

namespace pykern::cuda {
namespace {

template <class T>
struct Bias {
  Scores<T> x;
  GradientRows<T> rows;
  HeadRows<T> dbias;
  int64_t key_stride;
  const RowFacts<Compute<T>>* facts;
  int B, batches, heads;     // of q; of dbias
  int row_tiles, key_tiles;  // of dbias
  bool one_row, one_key;     // queries or keys are summed
  bool words_d, words_e;     // of q and k; of v and dout
};

template <class T>
using BiasTile = PlainTile<Compute<T>, kKeys, false>;

// [begin, end): i, or all where they are summed
struct Range {
  int begin, end;
};
__device__ __forceinline__ Range range_of(bool summed, int i, int all) {
  return summed ? Range{0, all} : Range{i, i + 1};
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 1) attention_dbias(const Bias<T> a) {
  using C = Compute<T>;
  constexpr int V = kPack<C>, kQueries = kOwned<C>, m = BiasTile<T>::kEach;
  auto& shared = shared_memory<BiasTile<T>>();
  const Scores<T>& x = a.x;
  const int key_tile = blockIdx.x % a.key_tiles, above = blockIdx.x / a.key_tiles;
  const int row_tile = above % a.row_tiles, which = above / a.row_tiles;
  const int own_b = which / a.heads, own_h = which % a.heads;
  const Range tiles = range_of(a.one_key, key_tile, (x.keys + kKeys - 1) / kKeys);
  const Range batches = range_of(a.batches == 1, own_b, a.B);
  const Range heads = range_of(a.heads == 1, own_h, x.H);
  const Range rows = range_of(a.one_row, row_tile, (x.queries + kQueries - 1) / kQueries);

  C sum[V][m] = {};
  for (int tile = tiles.begin; tile < tiles.end; ++tile)
    for (int b = batches.begin; b < batches.end; ++b)
      for (int h = heads.begin; h < heads.end; ++h)
        for (int t0 = rows.begin * kQueries; t0 < rows.end * kQueries; t0 += kQueries) {
          const Place at = x.place(b);
          const int behind = t0 + kQueries < at.queries ? t0 + kQueries : at.queries;
          const int found = x.look(at, b, h, t0, behind - 1, tile);
          if (!(found & kSeen)) continue;
          const bool partly = (found & kHidden) != 0 || behind < t0 + kQueries;
          const PairsOf<T> pairs{x, at, b, h, t0 + side_row() * V, tile, side_column(), partly};
          const int g = h / x.group, first = tile * kKeys;
          C s[V][m], ds[V][m];
          unsigned seen[V];
          tile_products<T>(shared, rows_at(a.rows.q.at(b, h, 0), a.rows.q.row, t0, at.queries),
                           rows_at(a.rows.k.at(b, g, 0), a.rows.k.row, first, at.keys), x.D,
                           a.words_d, s);
          tile_products<T>(
              shared, rows_at(a.rows.dout.at(b, h, 0), a.rows.dout.row, t0, at.queries),
              rows_at(a.rows.v.at(b, g, 0), a.rows.v.row, first, at.keys), x.E, a.words_e, ds);
          const RowFacts<C>* facts = a.facts + (int64_t{b} * x.H + h) * x.queries;
          pairs.template weigh<false>(facts, s, ds, seen);
#pragma unroll
          for (int i = 0; i < V; ++i)
#pragma unroll
            for (int j = 0; j < m; ++j) sum[i][j] += ds[i][j];
        }

  // [key][query], summed by one thread a line, then over the lines
  put_by_key(shared.weights, sum);
  __syncthreads();
  T* to = a.dbias.at(own_b, own_h, 0);
  const int own = threadIdx.x;
  if (a.one_row) {
    if (own < kKeys) {
      C total = 0;
      for (int i = 0; i < kQueries; ++i) total += shared.weights[own][i];
      shared.weights[own][0] = total;
    }
    __syncthreads();
  }
  const int lines = a.one_row ? 1 : kQueries;
  for (int i = own; i < lines * (a.one_key ? 1 : kKeys); i += kTileThreads) {
    const int row = a.one_key ? i : i / kKeys, key = a.one_key ? 0 : i % kKeys;
    const int t = row_tile * kQueries + row, s = key_tile * kKeys + key;
    C total = 0;
    for (int n = key; n < (a.one_key ? kKeys : key + 1); ++n) total += shared.weights[n][row];
    if ((a.one_row || t < x.queries) && (a.one_key || s < x.keys))
      to[t * a.dbias.row + s * a.key_stride] = narrow<T>(total);
  }
}

}  // namespace

template <class T>
void bias_gradient(const AttentionBackward& op, const Scores<T>& x,
                   const RowFacts<Compute<T>>* facts, Stream stream) {
  using C = Compute<T>;
  constexpr int V = kPack<C>;
  const Tensor& db = op.dbias;
  const bool one_row = db.size[2] == 1, one_key = db.size[3] == 1;
  const Bias<T> a{.x = x,
                  .rows = gradient_rows<T>(op),
                  .dbias = head_rows<T>(db),
                  .key_stride = db.stride[3],
                  .facts = facts,
                  .B = static_cast<int>(op.q.size[0]),
                  .batches = static_cast<int>(db.size[0]),
                  .heads = static_cast<int>(db.size[1]),
                  .row_tiles = one_row ? 1 : static_cast<int>(ceil_div(db.size[2], kOwned<C>)),
                  .key_tiles = one_key ? 1 : static_cast<int>(ceil_div(db.size[3], kKeys)),
                  .one_row = one_row,
                  .one_key = one_key,
                  .words_d = takes_words(op.q, V) && takes_words(op.k, V),
                  .words_e = takes_words(op.v, V) && takes_words(op.dout, V)};
  const int64_t blocks = db.size[0] * db.size[1] * a.row_tiles * a.key_tiles;
  if (blocks == 0) return;
  launch("attention_dbias", attention_dbias<T>,
         Grid{.blocks = dim3(blocks), .threads = dim3(kTileThreads), .shared = sizeof(BiasTile<T>)},
         stream, a);
}

template void bias_gradient(const AttentionBackward&, const Scores<float>&, const RowFacts<float>*,
                            Stream);
template void bias_gradient(const AttentionBackward&, const Scores<double>&,
                            const RowFacts<double>*, Stream);
template void bias_gradient(const AttentionBackward&, const Scores<bf16>&, const RowFacts<float>*,
                            Stream);
template void bias_gradient(const AttentionBackward&, const Scores<f16>&, const RowFacts<float>*,
                            Stream);

}  // namespace pykern::cuda

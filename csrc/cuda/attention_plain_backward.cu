// attention, backward, by FMA: weights are made again tile by tile, P = factor 2^(score - shift)
// and dS = P (dP - delta). For dq a block owns 64 queries (double 32) and walks over the keys; for
// dk and dv it owns 64 keys (32) of a key head and walks over the queries of all heads that read
// it. So each result has one owner, who adds in a fixed order.
#include "cuda/attention_plain.cuh"

namespace pykern::cuda {
namespace {

template <class T>
struct Backward {
  Scores<T> x;
  GradientRows<T> rows;
  const RowFacts<Compute<T>>* facts;
  Compute<T> scale;
  int key_heads, query_blocks, key_blocks;  // blocks of a head
  bool words_d, words_e;                    // of q and k; of v and dout
  bool words_dq, words_dk, words_dv;
};

template <class C, int V>
__device__ __forceinline__ void fill(C (&x)[V], C value) {
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = value;
}

template <class T>
using QueryTile = PlainTile<Compute<T>, kKeys, false>;

template <class T, bool wide>
__global__ void __launch_bounds__(kTileThreads, 1) attention_plain_dq(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int V = kPack<C>, kQueries = kOwned<C>;
  auto& shared = shared_memory<QueryTile<T>>();
  const Scores<T>& x = a.x;
  const int block = a.query_blocks - 1 - static_cast<int>(blockIdx.x / x.H);
  const auto [b, h, t0] =
      block_rows<kQueries>(x.cu_q, x.cu_q_step, x.sequences, x.queries, x.H, block);
  if (b < 0) return;
  const Place at = x.place(b);
  const int count = at.queries - t0 < kQueries ? at.queries - t0 : kQueries;
  const T* q = a.rows.q.at(at.batch, h, at.q_row + t0);
  const T* dout = a.rows.dout.at(at.batch, h, at.q_row + t0);
  const T* k = a.rows.k.at(at.batch, h / x.group, at.k_row);
  const T* v = a.rows.v.at(at.batch, h / x.group, at.k_row);
  const RowFacts<C>* facts = a.facts + (int64_t{at.batch} * x.H + h) * x.queries + at.q_row;

  C sum[kPanels<C, wide>][V][V] = {}, one[V];
  fill(one, C(1));
  const int end = x.end_key(at, t0 + count - 1);
  for (int tile = x.first_key(at, t0) / kKeys; tile * kKeys < end; ++tile) {
    const int own = kept(t0), found = x.look(at, b, h, own, own + count - 1, tile);
    if (!(found & kSeen)) continue;
    const int first = tile * kKeys;
    const PairsOf<T> pairs{
        x, at, b, h, own + side_row() * V, tile, side_column(), (found & kHidden) != 0};
    const auto keys = rows_at(k, a.rows.k.row, first, at.keys);
    C s[V][QueryTile<T>::kEach], ds[V][QueryTile<T>::kEach];
    unsigned seen[V];
    tile_products<T>(shared, rows_at(q, a.rows.q.row, 0, count), keys, x.D, a.words_d, s);
    tile_products<T>(shared, rows_at(dout, a.rows.dout.row, 0, count),
                     rows_at(v, a.rows.v.row, first, at.keys), x.E, a.words_e, ds);
    pairs.template weigh<true>(facts, s, ds, seen);
    put_by_key(shared.weights, ds);
    if (pairs.hides()) put_sight(shared, seen);
    add_rows<T, kKeys>(shared, shared.weights, keys, x.D, a.words_d, pairs.hides(), one, sum);
  }
  store_rows(
      a.rows.dq.at(at.batch, h, at.q_row + t0), a.rows.dq.row, count, x.D, a.words_dq,
      [&](int) { return a.scale; }, sum);
}

constexpr int kRun = 32;  // queries summed in one go for dk and dv: long sums round more

template <class T, class C = Compute<T>>
struct KeyTile : PlainTile<C, kOwned<C>, true> {
  C gradients[kOwned<C>][kOwned<C> + kPack<C>];  // dS, beside Z P
};

template <class T, bool wide>
__global__ void __launch_bounds__(kTileThreads, 1) attention_plain_dkv(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int V = kPack<C>, kQueries = kOwned<C>, kOwnKeys = kOwned<C>;
  auto& shared = shared_memory<KeyTile<T>>();
  const Scores<T>& x = a.x;
  const int block = static_cast<int>(blockIdx.x / a.key_heads);  // earlier keys have more queries
  const auto [b, g, first] =
      block_rows<kOwnKeys>(x.cu_k, x.cu_k_step, x.sequences, x.keys, a.key_heads, block);
  if (b < 0) return;
  const Place at = x.place(b);
  const int count = at.keys - first < kOwnKeys ? at.keys - first : kOwnKeys;
  C dk[kPanels<C, wide>][V][V] = {}, dv[kPanels<C, wide>][V][V] = {}, one[V];
  fill(one, C(1));
  const int begin = x.first_query(at, first) / kQueries * kQueries;  // so that sums do not depend
  const int end = x.end_query(at, first + count - 1);                // on which keys these are
  for (int h = g * x.group; h < (g + 1) * x.group; ++h) {
    const T* q = a.rows.q.at(at.batch, h, at.q_row);
    const T* dout = a.rows.dout.at(at.batch, h, at.q_row);
    const RowFacts<C>* facts = a.facts + (int64_t{at.batch} * x.H + h) * x.queries + at.q_row;
    for (int t0 = begin; t0 < end; t0 += kQueries) {
      const int behind = t0 + kQueries < at.queries ? t0 + kQueries : at.queries;
      const int own = kept(first), tile = own / kKeys;
      const int found = x.look(at, b, h, t0, behind - 1, tile);
      if (!(found & kSeen)) continue;
      const bool partly = (found & kHidden) != 0 || behind < t0 + kQueries;
      const PairsOf<T> pairs{
          x, at, b, h, t0 + side_row() * V, tile, own % kKeys + side_column(), partly};
      const T* k = a.rows.k.at(at.batch, g, at.k_row + own);  // again each time: registers
      const T* v = a.rows.v.at(at.batch, g, at.k_row + own);
      const auto queries = rows_at(q, a.rows.q.row, t0, at.queries);
      const auto douts = rows_at(dout, a.rows.dout.row, t0, at.queries);
      C p[V][V], ds[V][V];
      unsigned seen[V];
      tile_products<T>(shared, queries, rows_at(k, a.rows.k.row, 0, count), x.D, a.words_d, p);
      tile_products<T>(shared, douts, rows_at(v, a.rows.v.row, 0, count), x.E, a.words_e, ds);
      pairs.template weigh<true>(facts, p, ds, seen);
      put_by_query(shared.weights, p);
      put_by_query(shared.gradients, ds);
      if (pairs.hides()) put_sight(shared, seen);
      add_rows<T, kRun>(shared, shared.weights, douts, x.E, a.words_e, pairs.hides(), one, dv);
      add_rows<T, kRun>(shared, shared.gradients, queries, x.D, a.words_d, pairs.hides(), one, dk);
    }
  }
  store_rows(
      a.rows.dk.at(at.batch, g, at.k_row + first), a.rows.dk.row, count, x.D, a.words_dk,
      [&](int) { return a.scale; }, dk);
  store_rows(
      a.rows.dv.at(at.batch, g, at.k_row + first), a.rows.dv.row, count, x.E, a.words_dv,
      [](int) { return C(1); }, dv);
}

}  // namespace

template <class T>
void plain_backward(const AttentionBackward& op, const Scores<T>& x,
                    const RowFacts<Compute<T>>* facts, Stream stream) {
  using C = Compute<T>;
  constexpr int V = kPack<C>;
  const bool ragged = op.cu_seqlens_q.given;
  const int64_t G = op.k.size[1];
  const int64_t query_blocks = blocks_of(x.sequences, x.queries, ragged, kOwned<C>);
  const int64_t key_blocks = blocks_of(x.sequences, x.keys, ragged, kOwned<C>);
  const Backward<T> a{.x = x,
                      .rows = gradient_rows<T>(op),
                      .facts = facts,
                      .scale = static_cast<C>(op.scale),
                      .key_heads = static_cast<int>(G),
                      .query_blocks = static_cast<int>(query_blocks),
                      .key_blocks = static_cast<int>(key_blocks),
                      .words_d = takes_words(op.q, V) && takes_words(op.k, V),
                      .words_e = takes_words(op.v, V) && takes_words(op.dout, V),
                      .words_dq = takes_words(op.dq, V),
                      .words_dk = takes_words(op.dk, V),
                      .words_dv = takes_words(op.dv, V)};
  if (query_blocks * x.H > 0)
    launch("attention_plain_dq",
           is_wide(x.D) ? attention_plain_dq<T, true> : attention_plain_dq<T, false>,
           Grid{.blocks = dim3(query_blocks * x.H),
                .threads = dim3(kTileThreads),
                .shared = sizeof(QueryTile<T>)},
           stream, a);
  if (key_blocks * G > 0)
    launch(
        "attention_plain_dkv",
        is_wide(x.D) || is_wide(x.E) ? attention_plain_dkv<T, true> : attention_plain_dkv<T, false>,
        Grid{.blocks = dim3(key_blocks * G),
             .threads = dim3(kTileThreads),
             .shared = sizeof(KeyTile<T>)},
        stream, a);
}

template void plain_backward(const AttentionBackward&, const Scores<float>&, const RowFacts<float>*,
                             Stream);
template void plain_backward(const AttentionBackward&, const Scores<double>&,
                             const RowFacts<double>*, Stream);
template void plain_backward(const AttentionBackward&, const Scores<bf16>&, const RowFacts<float>*,
                             Stream);
template void plain_backward(const AttentionBackward&, const Scores<f16>&, const RowFacts<float>*,
                             Stream);

}  // namespace pykern::cuda

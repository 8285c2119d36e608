// attention, forward, by FMA: a block owns 64 queries (double 32) of one head and walks over tiles
// of 64 keys with an online softmax.
#include "cuda/attention_plain.cuh"

namespace pykern::cuda {
namespace {

template <class T>
struct Forward {
  Scores<T> x;
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  Stats lse;
  int blocks;  // of a head
  bool words_qk, words_v, words_out;
};

// What a row has seen: its maximum, in base 2, and the sum of 2^(score - maximum).
template <class C, int V>
struct Seen {
  C m[V], l[V];
};

// Scores become weights, with dropout; rescale gets the factor for what came before.
template <class T, class C, int V, int m>
__device__ __forceinline__ void weigh(const PairsOf<T>& pairs, C (&s)[V][m], Seen<C, V>& rows,
                                      C (&rescale)[V]) {
  const Dropout& dropout = pairs.x.dropout;
#pragma unroll
  for (int i = 0; i < V; ++i) {
    C top = s[i][0];
#pragma unroll
    for (int j = 1; j < m; ++j) top = larger(top, s[i][j]);
    top = larger(rows.m[i], across_lanes<kSide>(top, Larger()));
    const C base = top == C(-INFINITY) ? C(0) : top;  // no key seen so far
    C sum = 0;
#pragma unroll
    for (int j = 0; j < m; ++j) {
      s[i][j] = power2(s[i][j] - base);
      sum += s[i][j];
    }
    rescale[i] = power2(rows.m[i] - base);
    rows.l[i] = fma(rows.l[i], rescale[i], across_lanes<kSide>(sum, Add()));
    rows.m[i] = top;
    if (dropout.threshold != 0) {
      const uint32_t keep = pairs.kept(i);
      const C factor = static_cast<C>(dropout.factor);
#pragma unroll
      for (int j = 0; j < m; ++j) s[i][j] = keep >> j & 1 ? s[i][j] * factor : C(0);
    }
  }
}

template <class T>
using ForwardTile = PlainTile<Compute<T>, kKeys, false>;

template <class T, bool wide>
__global__ void __launch_bounds__(kTileThreads, wide ? 1 : 2) attention_plain(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int V = kPack<C>, kQueries = kOwned<C>;
  auto& shared = shared_memory<ForwardTile<T>>();
  const Scores<T>& x = a.x;
  const int block = a.blocks - 1 - static_cast<int>(blockIdx.x / x.H);  // later rows see more keys
  const auto [b, h, t0] =
      block_rows<kQueries>(x.cu_q, x.cu_q_step, x.sequences, x.queries, x.H, block);
  if (b < 0) return;
  const Place at = x.place(b);
  const int count = at.queries - t0 < kQueries ? at.queries - t0 : kQueries, t1 = t0 + count - 1;
  const T* q = a.q.at(at.batch, h, at.q_row + t0);
  const T* k = a.k.at(at.batch, h / x.group, at.k_row);
  const T* v = a.v.at(at.batch, h / x.group, at.k_row);

  C sum[kPanels<C, wide>][V][V] = {};
  Seen<C, V> rows;
#pragma unroll
  for (int i = 0; i < V; ++i) rows.m[i] = C(-INFINITY), rows.l[i] = 0;
  const int end = x.end_key(at, t1);
  for (int tile = x.first_key(at, t0) / kKeys; tile * kKeys < end; ++tile) {
    const int own = kept(t0), found = x.look(at, b, h, own, own + count - 1, tile);
    if (!(found & kSeen)) continue;
    const int first = tile * kKeys;
    const PairsOf<T> pairs{
        x, at, b, h, own + side_row() * V, tile, side_column(), (found & kHidden) != 0};
    C s[V][ForwardTile<T>::kEach], rescale[V];
    unsigned seen[V];
    tile_products<T>(shared, rows_at(q, a.q.row, 0, count), rows_at(k, a.k.row, first, at.keys),
                     x.D, a.words_qk, s);
    pairs.score(s, seen);
    weigh(pairs, s, rows, rescale);
    put_by_key(shared.weights, s);
    if (pairs.hides()) put_sight(shared, seen);
    add_rows<T, kKeys>(shared, shared.weights, rows_at(v, a.v.row, first, at.keys), x.E, a.words_v,
                       pairs.hides(), rescale, sum);
  }

  const C sink = x.sink(h);
  C factor[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    factor[i] = 1;
    if (sink != C(-INFINITY)) {
      const C top = larger(rows.m[i], sink);
      factor[i] = power2(rows.m[i] - top);
      rows.l[i] = fma(rows.l[i], factor[i], power2(sink - top));
      rows.m[i] = top;
    }
    factor[i] = rows.l[i] == 0 ? C(0) : factor[i] / rows.l[i];  // a row that sees no key is 0
    const int row = side_row() * V + i;
    if (a.lse.data && side_column() == 0 && row < count)
      a.lse.set(
          at.batch, h, at.q_row + t0 + row,
          rows.l[i] == 0 ? -INFINITY : double(rows.m[i]) * kNatsPerBit + log(double(rows.l[i])));
  }
  store_rows(
      a.out.at(at.batch, h, at.q_row + t0), a.out.row, count, x.E, a.words_out,
      [&](int i) { return factor[i]; }, sum);
}

}  // namespace

template <class T>
void plain_forward(const AttentionForward& op, const Scores<T>& x, Stream stream) {
  constexpr int V = kPack<Compute<T>>;
  const int64_t blocks =
      blocks_of(x.sequences, x.queries, op.cu_seqlens_q.given, kOwned<Compute<T>>);
  if (blocks * x.H == 0) return;
  const Forward<T> a{.x = x,
                     .q = head_rows<const T>(op.q),
                     .k = head_rows<const T>(op.k),
                     .v = head_rows<const T>(op.v),
                     .out = head_rows<T>(op.out),
                     .lse = stats_of(op.lse),
                     .blocks = static_cast<int>(blocks),
                     .words_qk = takes_words(op.q, V) && takes_words(op.k, V),
                     .words_v = takes_words(op.v, V),
                     .words_out = takes_words(op.out, V)};
  const auto kernel = is_wide(x.E) ? attention_plain<T, true> : attention_plain<T, false>;
  launch("attention_plain", kernel,
         Grid{.blocks = dim3(blocks * x.H),
              .threads = dim3(kTileThreads),
              .shared = sizeof(ForwardTile<T>)},
         stream, a);
}

template void plain_forward(const AttentionForward&, const Scores<float>&, Stream);
template void plain_forward(const AttentionForward&, const Scores<double>&, Stream);

}  // namespace pykern::cuda

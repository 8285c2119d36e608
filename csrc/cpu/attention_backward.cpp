// attention, backward: one task owns a key head (or a segment of its keys) and recomputes the
// weights tile by tile, so that nothing of size T x S is kept and nothing is added atomically.
//   P = exp(score - lse)   dP = dout v^T   dS = P (dP - delta)   delta = sum(dout out) - dlse
//   dv = P^T dout   dk = scale dS^T q   dq = scale dS k   dbias = dS
#include "cpu/attention_tile.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "ops/attention.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kChunkRows = 96;    // rows that are summed into dk and dv in one go
constexpr int kSegmentTasks = 8;  // with fewer key heads, the keys of a head are cut into segments

template <class T>
struct BackwardGroup : Group<T> {
  RowList<const T> dout;
  const Compute<T>* lse;
  int64_t lse_head, lse_row;
  Compute<T>* delta;  // [heads, T]
};

// The scratch memory of one thread, cut into its arrays.
template <class T>
struct BackwardMemory {
  using C = Compute<T>;
  static constexpr int W = kTileColumns<T>, R = kTileRows;
  // of a tile of keys: columns of k and v, rows of k; sums of dk and dv
  C *k_columns, *v_columns, *k_rows, *dk, *dv;
  // of a chunk of query rows: q and dout as left operands and as rows; P and dS over the tile
  C *q_strips, *dout_strips, *q_rows, *dout_rows, *p, *ds;
  // the same weights as operands: dS by rows, P and dS by pairs of rows
  C *ds_rows, *p_pairs, *ds_pairs, *hidden;
  int64_t q_strip, dout_strip, D_padded, E_padded;

  template <class Take>
  void layout(int64_t D, int64_t E, const Take& take) {
    constexpr int L = Vec<C>::lanes;
    D_padded = round_up(D, W), E_padded = round_up(E, W);
    q_strip = units<T>(D) * R + L, dout_strip = units<T>(E) * R + L;
    k_columns = take(units<T>(D) * kKeys);
    v_columns = take(units<T>(E) * kKeys);
    k_rows = take(units<T>(kKeys) * D_padded + L);
    dk = take(kKeys * D_padded);
    dv = take(kKeys * E_padded);
    q_strips = take(kChunkRows / R * q_strip);
    dout_strips = take(kChunkRows / R * dout_strip);
    q_rows = take(units<T>(kChunkRows) * D_padded + L);
    dout_rows = take(units<T>(kChunkRows) * E_padded + L);
    p = take(kChunkRows * kKeys);
    ds = take(kChunkRows * kKeys);
    if constexpr (kPaired<T>) {
      ds_rows = take(kChunkRows * kKeys / 2);
      p_pairs = take(kChunkRows * kKeys / 2);
      ds_pairs = take(kChunkRows * kKeys / 2);
    } else {
      ds_rows = ds, p_pairs = p, ds_pairs = ds;
    }
    hidden = take((kChunkRows > kKeys ? kChunkRows : kKeys) * W);
  }
  static int64_t bytes(int64_t D, int64_t E) {
    int64_t total = 0;
    BackwardMemory().layout(D, E, [&](int64_t n) {
      total += round_up(n * sizeof(C), 64);
      return static_cast<C*>(nullptr);
    });
    return total;
  }
  BackwardMemory() = default;
  BackwardMemory(int64_t D, int64_t E, char* memory) {
    layout(D, E, [&](int64_t n) {
      C* array = reinterpret_cast<C*>(memory);
      memory += round_up(n * sizeof(C), 64);
      return array;
    });
  }
};

// c[i][:] += factor * sum over u of A[i][u] B[u][:], for `rows` rows of c [rows, width]. see(i, k)
// tells whether row i takes part in number k of the sum; hide is set when B has numbers that a row
// must not touch.
template <class T, class See>
static void accumulate(Compute<T>* c, int rows, int64_t width, const Compute<T>* a, int64_t a_row,
                       int64_t a_unit, const Compute<T>* b, int64_t count, bool hide,
                       Compute<T>* hidden, const See& see) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int W = kTileColumns<T>, R = kTileRows;
  const int64_t panel = units<T>(count) * W;
  const auto add = [&](C* to, V v) { store(to, load(to) + v); };
  for (int64_t column = 0; column < width; column += W, b += panel) {
    if (hide) {
      for (int i = 0; i < rows; ++i) {
        hide_rows<T>(hidden, b, count, [&](int64_t k) { return see(i, k); });
        V acc[1][kTileVectors] = {};
        multiply_tile<T, 1, kTileVectors>(units<T>(count), a + i * a_row, a_row, a_unit, hidden, W,
                                          acc);
        for (int j = 0; j < kTileVectors; ++j)
          add(c + i * width + column + j * V::lanes, acc[0][j]);
      }
      continue;
    }
    for (int i0 = 0; i0 < rows; i0 += R)
      with_rows(rows - i0 < R ? rows - i0 : R, [&](auto strip_rows) {
        constexpr int n = strip_rows.value;
        V acc[n][kTileVectors] = {};
        multiply_tile<T, n, kTileVectors>(units<T>(count), a + i0 * a_row, a_row, a_unit, b, W,
                                          acc);
        for (int i = 0; i < n; ++i)
          for (int j = 0; j < kTileVectors; ++j)
            add(c + (i0 + i) * width + column + j * V::lanes, acc[i][j]);
      });
  }
}

// s [n, 64] = strip of n left rows times the columns of a tile
template <class T, int n>
static void tile_products(int64_t count, const Compute<T>* strip, const Compute<T>* columns,
                          Compute<T>* s) {
  using V = Vec<Compute<T>>;
  constexpr int W = kTileColumns<T>;
  for (int c = 0; c < kKeys / W; ++c) {
    V acc[n][kTileVectors] = {};
    multiply_tile<T, n, kTileVectors>(count, strip, 1, kTileRows, columns + c * count * W, W, acc);
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < kTileVectors; ++j) store(s + i * kKeys + c * W + j * V::lanes, acc[i][j]);
  }
}

// P and dS of query t of head h against the tile: p holds q k^T on entry, ds holds dP.
template <class T>
static void weights_row(const BackwardGroup<T>& x, int64_t h, int64_t t, int64_t first,
                        uint64_t& word, Compute<T>* p, Compute<T>* ds) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int n = kKeys / V::lanes;
  V y[n];
  finish_scores<T>(x, h, t, first, p, word, y);
  const C lse = x.lse[h * x.lse_head + t * x.lse_row];
  // A row that sees no key: exp(y - infinity) = 0 for every y.
  const V shift = V::splat(lse == C(-INFINITY) ? C(INFINITY) : lse);
  const V delta = V::splat(x.delta[h * x.T_ + t]);
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    const Mask<C> seen = lanes_of<C>(word, i * V::lanes);
    const V weight = select(seen, exp(y[i] - shift), V::zero());
    const V gradient = weight * (load(ds + i * V::lanes) - delta);
    store(p + i * V::lanes, weight);
    store(ds + i * V::lanes, select(seen, gradient, V::zero()));
  }
}

// The weights of a chunk in the forms that the products take, where bf16 is multiplied in pairs.
template <class T>
static void pair_weights(BackwardMemory<T>& memory, int64_t rows) {
#if defined(__AVX512BF16__)
  if constexpr (kPaired<T>) {
    for (int64_t r = 0; r < rows; ++r)
      for (int i = 0; i < kKeys; i += VecF::lanes)
        store_bf16(reinterpret_cast<uint16_t*>(memory.ds_rows) + r * kKeys + i,
                   load(memory.ds + r * kKeys + i));
    for (int64_t r = 0; r < rows; r += 2)
      for (int i = 0; i < kKeys; i += VecF::lanes) {
        const float *p = memory.p + r * kKeys + i, *ds = memory.ds + r * kKeys + i;
        const VecF zero = VecF::zero();
        const bool two = r + 1 < rows;
        store(memory.p_pairs + r / 2 * kKeys + i,
              pack_pairs(load(p), two ? load(p + kKeys) : zero));
        store(memory.ds_pairs + r / 2 * kKeys + i,
              pack_pairs(load(ds), two ? load(ds + kKeys) : zero));
      }
  }
#endif
  (void)memory, (void)rows;
}

// Scores, weights and their gradients of the rows t0 .. t0 + rows - 1 of head h against the tile at
// `first`; words gets what each row sees. The columns of k and v are packed already.
template <class T>
static void weights_chunk(const BackwardGroup<T>& x, int64_t h, int64_t t0, int64_t rows,
                          int64_t first, BackwardMemory<T>& memory, uint64_t* words) {
  constexpr int R = kTileRows;
  for (int64_t i = 0; i < rows; i += R) {
    const int64_t left = rows - i;
    const int n = left < R ? static_cast<int>(left) : R;
    Compute<T>* q = memory.q_strips + i / R * memory.q_strip;
    Compute<T>* dout = memory.dout_strips + i / R * memory.dout_strip;
    pack<T>(q, R, {x.q.at(h, t0 + i), x.q.row, 1}, n, left, x.D);
    pack<T>(dout, R, {x.dout.at(h, t0 + i), x.dout.row, 1}, n, left, x.E);
    with_rows(n, [&](auto strip_rows) {
      tile_products<T, strip_rows.value>(units<T>(x.D), q, memory.k_columns, memory.p + i * kKeys);
      tile_products<T, strip_rows.value>(units<T>(x.E), dout, memory.v_columns,
                                         memory.ds + i * kKeys);
    });
    for (int64_t r = i; r < i + n; ++r) {
      words[r] = visible(x, h, t0 + r, first);
      weights_row<T>(x, h, t0 + r, first, words[r], memory.p + r * kKeys, memory.ds + r * kKeys);
    }
  }
}

// Gradients of the keys first_tile .. last_tile - 1 (in tiles), written; dq [heads, T, D_padded]
// of the whole group, added.
template <class T>
static void backward_keys(const BackwardGroup<T>& x, int64_t first_tile, int64_t last_tile,
                          BackwardMemory<T>& memory, Compute<T>* dq, T* dk, int64_t dk_row, T* dv,
                          int64_t dv_row) {
  using C = Compute<T>;
  const int64_t D_padded = memory.D_padded, E_padded = memory.E_padded;
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t first = tile * kKeys;
    const int64_t keys = x.S - first < kKeys ? x.S - first : kKeys;
    const T *k = x.k + first * x.k_row, *v = x.v + first * x.v_row;
    pack_keys<T>(memory.k_columns, k, x.k_row, keys, x.D);
    pack_keys<T>(memory.v_columns, v, x.v_row, keys, x.E);
    const bool k_finite = pack_rows<T>(memory.k_rows, k, x.k_row, keys, x.D);
    for (int64_t i = 0; i < kKeys * D_padded; ++i) memory.dk[i] = C(0);
    for (int64_t i = 0; i < kKeys * E_padded; ++i) memory.dv[i] = C(0);

    // The first query that sees the tile's first key.
    const int64_t t_first = !x.causal || first <= x.S - x.T_ ? 0 : first - (x.S - x.T_);
    for (int64_t h = 0; h < x.heads; ++h)
      for (int64_t t0 = t_first; t0 < x.T_; t0 += kChunkRows) {
        const int64_t rows = x.T_ - t0 < kChunkRows ? x.T_ - t0 : kChunkRows;
        uint64_t words[kChunkRows], any = 0, all = low_bits(keys);
        weights_chunk<T>(x, h, t0, rows, first, memory, words);
        for (int64_t r = 0; r < rows; ++r) any |= words[r], all &= words[r];
        if (any == 0) continue;
        pair_weights<T>(memory, rows);
        const bool partial = all != low_bits(keys);
        const bool q_finite = pack_rows<T>(memory.q_rows, x.q.at(h, t0), x.q.row, rows, x.D);
        const bool dout_finite =
            pack_rows<T>(memory.dout_rows, x.dout.at(h, t0), x.dout.row, rows, x.E);
        const auto key_sees = [&](int64_t key, int64_t row) { return words[row] >> key & 1; };
        const auto row_sees = [&](int64_t row, int64_t key) { return words[row] >> key & 1; };
        accumulate<T>(memory.dv, kKeys, E_padded, memory.p_pairs, 1, kKeys, memory.dout_rows, rows,
                      partial && !dout_finite, memory.hidden, key_sees);
        accumulate<T>(memory.dk, kKeys, D_padded, memory.ds_pairs, 1, kKeys, memory.q_rows, rows,
                      partial && !q_finite, memory.hidden, key_sees);
        accumulate<T>(dq + (h * x.T_ + t0) * D_padded, static_cast<int>(rows), D_padded,
                      memory.ds_rows, kKeys / kUnit<T>, 1, memory.k_rows, keys,
                      partial && !k_finite, memory.hidden, row_sees);
      }
    for (int64_t key = 0; key < keys; ++key) {
      each_vector<C>(x.D, [&](int64_t i, int n) {
        const auto sum = load(memory.dk + key * D_padded + i) * Vec<C>::splat(x.scale);
        store_n(dk + (first + key) * dk_row + i, sum, n);
      });
      each_vector<C>(x.E, [&](int64_t i, int n) {
        store_n(dv + (first + key) * dv_row + i, load(memory.dv + key * E_padded + i), n);
      });
    }
  }
}

template <class T>
static BackwardGroup<T> backward_group(const AttentionBackward& op, Compute<T>* delta, int64_t b,
                                       int64_t g) {
  BackwardGroup<T> x;
  static_cast<Group<T>&>(x) = group_of<T>(op, b, g);
  const int64_t h = g * x.heads;
  x.dout = {row_at<const T>(op.dout, b, h, 0), op.dout.stride[1], op.dout.stride[2]};
  x.lse = row_at<const Compute<T>>(op.lse, b, h, 0);
  x.lse_head = op.lse.stride[1], x.lse_row = op.lse.stride[2];
  x.delta = delta + (b * op.q.size[1] + h) * x.T_;
  return x;
}

// delta [B, H, T] = sum over e of dout out, less the gradient of lse
template <class T>
static void row_deltas(const AttentionBackward& op, Compute<T>* delta, int threads) {
  using C = Compute<T>;
  using V = Vec<C>;
  const int64_t H = op.q.size[1], T_ = op.q.size[2], E = op.v.size[3];
  parallel_rows(op.q.size[0] * H * T_, 64, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t t = i % T_, h = i / T_ % H, b = i / T_ / H;
      const T *out = row_at<T>(op.out, b, h, t), *dout = row_at<T>(op.dout, b, h, t);
      V sum = V::zero();
      each_vector<C>(
          E, [&](int64_t e, int n) { sum = fma(load_n(out + e, n), load_n(dout + e, n), sum); });
      delta[i] = sum.sum();
      if (op.dlse.given) delta[i] -= *row_at<C>(op.dlse, b, h, t);
    }
  });
}

// The element of x [.., .., .., ..] that index i of an expanded dimension falls on.
static int64_t unless_one(const Tensor& t, int dim, int64_t i) { return t.size[dim] == 1 ? 0 : i; }

// dbias: a task owns the gradients of a tile of keys (all keys where they are summed into one) and
// recomputes dS of every batch, head and query that was expanded onto them, in order.
template <class T>
static Status bias_gradient(const AttentionBackward& op, Compute<T>* delta, int threads) {
  using C = Compute<T>;
  const Tensor& db = op.dbias;
  const int64_t B = op.q.size[0], H = op.q.size[1], T_ = op.q.size[2], D = op.q.size[3];
  const int64_t S = op.k.size[2], E = op.v.size[3], tiles = (S + kKeys - 1) / kKeys;
  const int64_t heads = H / op.k.size[1], Tb = db.size[2];
  const bool one_key = db.size[3] == 1;
  const Scratch scratch(BackwardMemory<T>::bytes(D, E), threads);
  const Scratch sums(Tb * kKeys * sizeof(C), threads);
  if (!scratch.ok() || !sums.ok()) return Status::out_of_memory;

  const int64_t parts = one_key ? 1 : tiles;
  parallel_for(db.size[0] * db.size[1] * parts, threads, [&](int64_t task, int thread) {
    const int64_t part = task % parts, hb = task / parts % db.size[1],
                  bb = task / parts / db.size[1];
    BackwardMemory<T> memory(D, E, scratch.at<char>(thread));
    C* sum = sums.template at<C>(thread);
    for (int64_t i = 0; i < Tb * kKeys; ++i) sum[i] = C(0);
    for (int64_t tile = one_key ? 0 : part; tile < (one_key ? tiles : part + 1); ++tile)
      for (int64_t b = db.size[0] == 1 ? 0 : bb; b < (db.size[0] == 1 ? B : bb + 1); ++b)
        for (int64_t h = db.size[1] == 1 ? 0 : hb; h < (db.size[1] == 1 ? H : hb + 1); ++h) {
          const BackwardGroup<T> x = backward_group<T>(op, delta, b, h / heads);
          const int64_t first = tile * kKeys, keys = S - first < kKeys ? S - first : kKeys;
          pack_keys<T>(memory.k_columns, x.k + first * x.k_row, x.k_row, keys, D);
          pack_keys<T>(memory.v_columns, x.v + first * x.v_row, x.v_row, keys, E);
          for (int64_t t0 = 0; t0 < T_; t0 += kChunkRows) {
            const int64_t rows = T_ - t0 < kChunkRows ? T_ - t0 : kChunkRows;
            uint64_t words[kChunkRows];
            weights_chunk<T>(x, h % heads, t0, rows, first, memory, words);
            for (int64_t r = 0; r < rows; ++r)
              for (int64_t i = 0; i < keys; ++i)
                sum[(Tb == 1 ? 0 : t0 + r) * kKeys + (one_key ? 0 : i)] += memory.ds[r * kKeys + i];
          }
        }
    const int64_t first = one_key ? 0 : part * kKeys;
    const int64_t keys = one_key ? 1 : S - first < kKeys ? S - first : kKeys;
    for (int64_t t = 0; t < Tb; ++t)
      for (int64_t i = 0; i < keys; ++i)
        *(row_at<T>(db, bb, hb, t) + (first + i) * db.stride[3]) = narrow<T>(sum[t * kKeys + i]);
  });
  return Status::ok;
}

template <class T>
static Status backward(const AttentionBackward& op, int threads) {
  using C = Compute<T>;
  const int64_t B = op.q.size[0], H = op.q.size[1], T_ = op.q.size[2], D = op.q.size[3];
  const int64_t G = op.k.size[1], S = op.k.size[2], E = op.v.size[3];
  const int64_t tiles = (S + kKeys - 1) / kKeys, D_padded = round_up(D, kTileColumns<T>);
  const int64_t heads = G == 0 ? 0 : H / G, pairs = B * G;
  // The number of segments depends on the shapes alone: so do the bits.
  int64_t segments = pairs >= kSegmentTasks || pairs == 0 ? 1 : (kSegmentTasks + pairs - 1) / pairs;
  segments = segments > tiles ? (tiles ? tiles : 1) : segments;
  const int64_t dq_size = heads * T_ * D_padded;

  const Scratch deltas(B * H * T_ * sizeof(C));
  const Scratch scratch(BackwardMemory<T>::bytes(D, E), threads);
  const bool shared = segments > 1;  // partial sums of dq wait for each other
  const Scratch dqs(dq_size * sizeof(C), static_cast<int>(shared ? pairs * segments : threads));
  if (!deltas.ok() || !scratch.ok() || !dqs.ok()) return Status::out_of_memory;
  C* delta = deltas.template at<C>();
  row_deltas<T>(op, delta, threads);

  const auto write_dq = [&](int64_t pair, int64_t parts, int slot) {
    const int64_t b = pair / G, g = pair % G;
    for (int64_t r = 0; r < heads * T_; ++r) {
      T* dq = row_at<T>(op.dq, b, g * heads + r / T_, r % T_);
      each_vector<C>(D, [&](int64_t i, int n) {
        Vec<C> sum = load(dqs.template at<C>(slot) + r * D_padded + i);
        for (int64_t part = 1; part < parts; ++part)
          sum = sum + load(dqs.template at<C>(slot + static_cast<int>(part)) + r * D_padded + i);
        store_n(dq + i, sum * Vec<C>::splat(static_cast<C>(op.scale)), n);
      });
    }
  };

  parallel_for(pairs * segments, threads, [&](int64_t task, int thread) {
    const int64_t pair = task / segments, segment = task % segments, b = pair / G, g = pair % G;
    BackwardMemory<T> memory(D, E, scratch.at<char>(thread));
    const BackwardGroup<T> x = backward_group<T>(op, delta, b, g);
    const int slot = shared ? static_cast<int>(task) : thread;
    C* dq = dqs.template at<C>(slot);
    for (int64_t i = 0; i < dq_size; ++i) dq[i] = C(0);
    backward_keys<T>(x, tiles * segment / segments, tiles * (segment + 1) / segments, memory, dq,
                     row_at<T>(op.dk, b, g, 0), op.dk.stride[2], row_at<T>(op.dv, b, g, 0),
                     op.dv.stride[2]);
    if (!shared) write_dq(pair, 1, slot);
  });
  if (shared)
    parallel_for(pairs, threads, [&](int64_t pair, int) {
      write_dq(pair, segments, static_cast<int>(pair * segments));
    });
  return op.dbias.given ? bias_gradient<T>(op, delta, threads) : Status::ok;
}

}  // namespace

Status attention_backward(const AttentionBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

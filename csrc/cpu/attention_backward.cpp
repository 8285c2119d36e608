// attention, backward: one task owns a key head (or a chain of its tiles) and recomputes the
// weights tile by tile, so that nothing of size T x S is kept and nothing is added atomically.
//   P = exp(score - lse)   dP = dout v^T   dS = P (dP - delta)   delta = sum(dout out) - dlse
//   dv = P^T dout   dk = scale dS^T q   dq = scale dS k   dbias = dS
#include "cpu/attention_weights.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "ops/attention.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kRun = 32;    // units of rows summed in one go for dk and dv: long sums round more
constexpr int kChains = 8;  // of tiles; with fewer key heads than this every chain is a task

// c[i][:] += sum over u of A[i][u] B[u][:], added after every `run` units, for `rows` rows of c
// [rows, width]. see(i, k) tells whether row i takes part in number k of the sum; hide is set when
// B has numbers that a row must not touch.
template <class T, class See>
static void accumulate(Compute<T>* c, int rows, int64_t width, const Compute<T>* a, int64_t a_row,
                       int64_t a_unit, const Compute<T>* b, int64_t count, int64_t run, bool hide,
                       Compute<T>* hidden, const See& see) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int W = kTileColumns<T>, R = kTileRows;
  const int64_t n_units = units<T>(count), panel = n_units * W;
  const auto add_products = [&](auto tile_rows, int i0, int64_t column, const C* rows_of_b) {
    constexpr int n = tile_rows.value;
    for (int64_t u = 0; u < n_units; u += run) {
      V acc[n][kTileVectors] = {};
      multiply_tile<T, n, kTileVectors>(n_units - u < run ? n_units - u : run,
                                        a + i0 * a_row + u * a_unit, a_row, a_unit,
                                        rows_of_b + u * W, W, acc);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < kTileVectors; ++j) {
          C* to = c + (i0 + i) * width + column + j * V::lanes;
          store(to, load(to) + acc[i][j]);
        }
    }
  };
  for (int64_t column = 0; column < width; column += W, b += panel) {
    if (hide) {
      for (int i = 0; i < rows; ++i) {
        hide_rows<T>(hidden, b, count, [&](int64_t k) { return see(i, k); });
        add_products(Rows<1>{}, i, column, hidden);
      }
      continue;
    }
    for (int i = 0; i < rows; i += R)
      with_rows(rows - i < R ? rows - i : R,
                [&](auto tile_rows) { add_products(tile_rows, i, column, b); });
  }
}

// Gradients of the keys of the tiles first_tile, first_tile + step, ..., written; dq [heads, T,
// D_padded] of the whole group, added, once per tile.
template <class T>
static void backward_keys(const BackwardGroup<T>& x, int64_t first_tile, int64_t step,
                          BackwardMemory<T>& memory, Compute<T>* dq, T* dk, int64_t dk_row, T* dv,
                          int64_t dv_row) {
  using C = Compute<T>;
  const int64_t D_padded = memory.D_padded, E_padded = memory.E_padded;
  for (int64_t tile = first_tile; tile * kKeys < x.S; tile += step) {
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
                      kRun, partial && !dout_finite, memory.hidden, key_sees);
        accumulate<T>(memory.dk, kKeys, D_padded, memory.ds_pairs, 1, kKeys, memory.q_rows, rows,
                      kRun, partial && !q_finite, memory.hidden, key_sees);
        accumulate<T>(dq + (h * x.T_ + t0) * D_padded, static_cast<int>(rows), D_padded,
                      memory.ds_rows, kKeys / kUnit<T>, 1, memory.k_rows, keys, kKeys,
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
static BackwardGroup<T> backward_group(const AttentionBackward& op,
                                       const RowFacts<Compute<T>>* facts, int64_t b, int64_t g) {
  BackwardGroup<T> x;
  static_cast<Group<T>&>(x) = group_of<T>(op, b, g);
  const int64_t h = g * x.heads;
  x.dout = {row_at<const T>(op.dout, b, h, 0), op.dout.stride[1], op.dout.stride[2]};
  x.facts = facts + (b * op.q.size[1] + h) * x.T_;
  return x;
}

// facts [B, H, T]; delta = sum over e of dout out, less the gradient of lse
template <class T>
static void row_facts(const AttentionBackward& op, RowFacts<Compute<T>>* facts, int threads) {
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
      const double lse = stat_at(op.lse, b, h, t);
      const C shift = lse == -INFINITY ? INFINITY : static_cast<C>(lse);
      const C factor = lse == -INFINITY ? C(1) : static_cast<C>(::exp(shift - lse));
      const double dlse = op.dlse.given ? stat_at(op.dlse, b, h, t) : 0;
      facts[i] = {shift, factor, static_cast<C>(sum.sum() - dlse)};
    }
  });
}

// The element of x [.., .., .., ..] that index i of an expanded dimension falls on.
static int64_t unless_one(const Tensor& t, int dim, int64_t i) { return t.size[dim] == 1 ? 0 : i; }

// dbias: a task owns the gradients of a tile of keys (all keys where they are summed into one) and
// recomputes dS of every batch, head and query that was expanded onto them, in order.
template <class T>
static Status bias_gradient(const AttentionBackward& op, const RowFacts<Compute<T>>* facts,
                            int threads) {
  using C = Compute<T>;
  const Tensor& db = op.dbias;
  const int64_t B = op.q.size[0], H = op.q.size[1], T_ = op.q.size[2], D = op.q.size[3];
  const int64_t S = op.k.size[2], E = op.v.size[3], tiles = (S + kKeys - 1) / kKeys;
  const int64_t heads = op.k.size[1] == 0 ? 0 : H / op.k.size[1], Tb = db.size[2];
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
          const BackwardGroup<T> x = backward_group<T>(op, facts, b, h / heads);
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
  // dq sums chains of tiles, chain c those of c, c + kChains, ..., and then the chains: an order of
  // the keys' positions alone, so that neither batch nor padding shows in its bits.
  const int chains = static_cast<int>(tiles < kChains ? tiles : kChains);
  const bool shared = pairs < kChains && chains > 1;  // each chain of a head is a task
  const bool summed = !shared && tiles > kChains;     // a task sums its chains in a second array
  const int64_t dq_size = heads * T_ * D_padded;

  const Scratch all_facts(B * H * T_ * sizeof(RowFacts<C>));
  const Scratch scratch(BackwardMemory<T>::bytes(D, E), threads);
  const Scratch dqs(dq_size * sizeof(C), shared ? chains : summed ? 2 * threads : threads);
  if (!all_facts.ok() || !scratch.ok() || !dqs.ok()) return Status::out_of_memory;
  RowFacts<C>* facts = all_facts.template at<RowFacts<C>>();
  row_facts<T>(op, facts, threads);

  const auto keys_of = [&](int64_t pair, int64_t chain, int64_t step, int slot, int thread) {
    const int64_t b = pair / G, g = pair % G;
    BackwardMemory<T> memory(D, E, scratch.at<char>(thread));
    C* dq = dqs.template at<C>(slot);
    for (int64_t i = 0; i < dq_size; ++i) dq[i] = C(0);
    backward_keys<T>(backward_group<T>(op, facts, b, g), chain, step, memory, dq,
                     row_at<T>(op.dk, b, g, 0), op.dk.stride[2], row_at<T>(op.dv, b, g, 0),
                     op.dv.stride[2]);
  };
  const auto write_dq = [&](int64_t pair, int64_t r, int parts, int slot) {
    T* dq = row_at<T>(op.dq, pair / G, pair % G * heads + r / T_, r % T_);
    each_vector<C>(D, [&](int64_t i, int n) {
      Vec<C> sum = load(dqs.template at<C>(slot) + r * D_padded + i);
      for (int part = 1; part < parts; ++part)
        sum = sum + load(dqs.template at<C>(slot + part) + r * D_padded + i);
      store_n(dq + i, sum * Vec<C>::splat(static_cast<C>(op.scale)), n);
    });
  };

  if (shared) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      parallel_for(chains, threads, [&](int64_t chain, int thread) {
        keys_of(pair, chain, kChains, static_cast<int>(chain), thread);
      });
      parallel_rows(heads * T_, 64, threads, [&](int64_t first, int64_t last, int) {
        for (int64_t r = first; r < last; ++r) write_dq(pair, r, chains, 0);
      });
    }
  } else {
    parallel_for(pairs, threads, [&](int64_t pair, int thread) {
      if (summed) {
        C *sum = dqs.template at<C>(thread), *part = dqs.template at<C>(threads + thread);
        for (int64_t i = 0; i < dq_size; ++i) sum[i] = C(0);
        for (int chain = 0; chain < kChains; ++chain) {
          keys_of(pair, chain, kChains, threads + thread, thread);
          for (int64_t i = 0; i < dq_size; ++i) sum[i] += part[i];
        }
      } else {
        keys_of(pair, 0, 1, thread, thread);
      }
      for (int64_t r = 0; r < heads * T_; ++r) write_dq(pair, r, 1, thread);
    });
  }
  return op.dbias.given ? bias_gradient<T>(op, facts, threads) : Status::ok;
}

}  // namespace

Status attention_backward(const AttentionBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

// attention, backward: one task owns a key head (or a chain of its tiles) and recomputes the
// weights tile by tile, so that nothing of size T x S is kept and nothing is added atomically.
//   P = exp(score - lse)   dP = Z (dout v^T)   dS = P (dP - delta)   delta = sum(dout out) - dlse
//   dv = (Z P)^T dout   dk = scale dS^T q   dq = scale dS k   dbias = dS   dsinks = -P_sink delta
#include "cpu/attention_weights.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "ops/attention.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int kRun = 32;    // units of rows summed in one go for dk and dv: long sums round more
constexpr int kChains = 8;  // of tiles; with fewer key heads than this every chain is a task

// The rows of a product's left operand A: A[i][u] at data[i row + u unit].
template <class T>
struct Left {
  const Compute<T>* data;
  int64_t row, unit;
};

// c[i][:] += sum over u of A[i][u] B[u][:], added after every `run` units, for `rows` rows of c
// [rows, width]. span(i, n, begin, end) gives the units in which rows i .. i + n - 1 of A are not
// all 0; see(i, k) tells whether row i takes part in number k of the sum; hide is set when B has
// numbers that a row must not touch.
template <class T, class Span, class See>
static void accumulate(Compute<T>* c, int rows, int64_t width, Left<T> a, Right<T> b, int64_t count,
                       int64_t run, const Span& span, bool hide, Compute<T>* hidden,
                       const See& see) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int W = kTileColumns<T>, R = kTileRows;
  const auto add_products = [&](auto tile_rows, int i0, int64_t begin, int64_t end, int64_t column,
                                const C* rows_of_b, int64_t b_unit) {
    constexpr int n = tile_rows.value;
    for (int64_t u = begin; u < end;) {
      const int64_t stop = u / run * run + run < end ? u / run * run + run : end;
      V acc[n][kTileVectors] = {};
      multiply_tile<T, n, kTileVectors>(stop - u, a.data + i0 * a.row + u * a.unit, a.row, a.unit,
                                        rows_of_b + u * b_unit, b_unit, acc);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j < kTileVectors; ++j) {
          C* to = c + (i0 + i) * width + column + j * V::lanes;
          store(to, load(to) + acc[i][j]);
        }
      u = stop;
    }
  };
  for (int i = 0; i < rows; i += R) {
    const int n = rows - i < R ? rows - i : R;
    int64_t begin, end;
    span(i, n, begin, end);
    if constexpr (!kFused) begin = begin / 16 * 16;  // where the runs of multiply_tile begin
    if (begin >= end) continue;
    for (int64_t column = 0; column < width; column += W) {
      const C* rows_of_b = b.data + column / W * b.panel;
      if (!hide) {
        with_rows(n, [&](auto tile_rows) {
          add_products(tile_rows, i, begin, end, column, rows_of_b, b.unit);
        });
        continue;
      }
      for (int one = i; one < i + n; ++one) {
        hide_rows<T>(hidden, rows_of_b, b.unit, units<T>(count),
                     [&](int64_t k) { return see(one, k); });
        add_products(Count<1>{}, one, begin, end, column, hidden, W);
      }
    }
  }
}

// The queries that may see a key of [first, last]: [begin, end). begin is that of a chunk, so that
// every tile cuts the queries, and sums over them, alike.
template <class T>
static void queries_of(const Group<T>& x, int64_t first, int64_t last, int64_t& begin,
                       int64_t& end) {
  const int64_t shift = x.S - x.T_;  // query t sits on key t + shift
  begin = x.right < 0 ? 0 : first - x.right - shift;
  end = x.left < 0 ? x.T_ : last + x.left - shift + 1;
  begin = begin < 0 ? 0 : begin / kChunkRows * kChunkRows;
  end = end > x.T_ ? x.T_ : end;
}

// q and dout of a group as right operands: in place, or packed once for all tiles.
template <class T>
struct QueryRows {
  Compute<T>*q = nullptr, *dout = nullptr;  // [heads] operands of T rows, or null: in place

  static int64_t size(int64_t T_, int64_t width) {
    return rows_in_place<T>(width)
               ? 0
               : units<T>(T_) * round_up(width, kTileColumns<T>) + Vec<Compute<T>>::lanes;
  }
  void pack(const BackwardGroup<T>& x) {
    for (int64_t h = 0; h < x.heads; ++h) {
      if (size(x.T_, x.D)) right_rows<T>(x.q.at(h, 0), x.q.row, x.T_, x.D, q + h * size(x.T_, x.D));
      if (size(x.T_, x.E))
        right_rows<T>(x.dout.at(h, 0), x.dout.row, x.T_, x.E, dout + h * size(x.T_, x.E));
    }
  }
  Right<T> q_rows(const BackwardGroup<T>& x, int64_t h, int64_t t) const {
    return at(x.q, x.D, x.T_, q, h, t);
  }
  Right<T> dout_rows(const BackwardGroup<T>& x, int64_t h, int64_t t) const {
    return at(x.dout, x.E, x.T_, dout, h, t);
  }

 private:
  static Right<T> at(const RowList<const T>& rows, int64_t width, int64_t T_,
                     const Compute<T>* packed, int64_t h, int64_t t) {
    constexpr int W = kTileColumns<T>;
    if (rows_in_place<T>(width))
      return {reinterpret_cast<const Compute<T>*>(rows.at(h, t)), rows.row, W};
    return {packed + h * size(T_, width) + t / kUnit<T> * W, W, units<T>(T_) * W};
  }
};

// Gradients of the keys of the tiles first_tile, first_tile + step, ..., written; dq [heads, T,
// D_padded] of the whole group, added, once per tile.
template <class T>
static void backward_keys(const BackwardGroup<T>& x, int64_t first_tile, int64_t step,
                          BackwardMemory<T>& memory, const QueryRows<T>& queries, Compute<T>* dq,
                          T* dk, int64_t dk_row, T* dv, int64_t dv_row, double scale) {
  using C = Compute<T>;
  const int64_t D_padded = memory.D_padded, E_padded = memory.E_padded;
  Sight sight;
  for (int64_t tile = first_tile; tile * kKeys < x.S; tile += step) {
    const int64_t first = tile * kKeys;
    const int keys = static_cast<int>(x.S - first < kKeys ? x.S - first : kKeys);
    bool packed = false;
    Right<T> k_rows = {};
    for (int64_t i = 0; i < kKeys * D_padded; ++i) memory.dk[i] = C(0);
    for (int64_t i = 0; i < kKeys * E_padded; ++i) memory.dv[i] = C(0);

    int64_t t_begin, t_end;
    queries_of(x, first, first + keys - 1, t_begin, t_end);
    for (int64_t h = 0; h < x.heads; ++h)
      for (int64_t t0 = t_begin; t0 < t_end; t0 += kChunkRows) {
        const int rows = static_cast<int>(t_end - t0 < kChunkRows ? t_end - t0 : kChunkRows);
        look(x, h, t0, rows, first, keys, sight);
        if (sight.any == 0) continue;
        if (!packed) {
          const T *k = x.k + first * x.k_row, *v = x.v + first * x.v_row;
          pack_keys<T>(memory.k_columns, k, x.k_row, keys, x.D);
          pack_keys<T>(memory.v_columns, v, x.v_row, keys, x.E);
          k_rows = right_rows<T>(k, x.k_row, keys, x.D, memory.k_rows);
          packed = true;
        }
        weights_chunk<T>(x, h, t0, rows, first, sight, memory);
        const Right<T> q_rows = queries.q_rows(x, h, t0), dout_rows = queries.dout_rows(x, h, t0);
        const int64_t row_units = units<T>(rows);
        const auto hides = [&](const Right<T>& b, int64_t count, int64_t width) {
          return sight.partial && !all_finite<T>(b, count, width);
        };
        const auto key_sees = [&](int64_t key, int64_t row) { return sight.words[row] >> key & 1; };
        const auto row_sees = [&](int64_t row, int64_t key) { return sight.words[row] >> key & 1; };
        const auto rows_seeing = [&](int key, int n, int64_t& begin, int64_t& end) {
          sight.rows_that_see(low_bits(n) << key, rows, kUnit<T>, begin, end);
        };
        const auto keys_seen = [&](int row, int n, int64_t& begin, int64_t& end) {
          uint64_t any = 0;
          for (int i = row; i < row + n; ++i) any |= sight.words[i];
          begin = any == 0 ? 0 : __builtin_ctzll(any) / kUnit<T>;
          end = any == 0 ? 0 : units<T>(64 - __builtin_clzll(any));
        };
        accumulate<T>(memory.dv, kKeys, E_padded, {memory.p_pairs, 1, kKeys}, dout_rows, rows, kRun,
                      rows_seeing, hides(dout_rows, row_units, E_padded), memory.hidden, key_sees);
        accumulate<T>(memory.dk, kKeys, D_padded, {memory.ds_pairs, 1, kKeys}, q_rows, rows, kRun,
                      rows_seeing, hides(q_rows, row_units, D_padded), memory.hidden, key_sees);
        accumulate<T>(dq + (h * x.T_ + t0) * D_padded, rows, D_padded,
                      {memory.ds_rows, kKeys / kUnit<T>, 1}, k_rows, keys, kKeys, keys_seen,
                      hides(k_rows, units<T>(keys), D_padded), memory.hidden, row_sees);
      }
    for (int64_t key = 0; key < keys; ++key) {
      each_vector<C>(x.D, [&](int64_t i, int n) {
        const auto sum = load(memory.dk + key * D_padded + i) * Vec<C>::splat(C(scale));
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
  const Place at = place_of(op, b);
  const int64_t h = g * x.heads;
  x.dout = {row_at<const T>(op.dout, at.batch, h, at.q_row), op.dout.stride[1], op.dout.stride[2]};
  x.facts_head = op.q.size[2];
  x.facts = facts + (at.batch * op.q.size[1] + h) * x.facts_head + at.q_row;
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
      const double lse = stat_at(op.lse, b, h, t) * kLog2E;
      const C shift = lse == -INFINITY ? INFINITY : static_cast<C>(lse);
      const double dlse = op.dlse.given ? stat_at(op.dlse, b, h, t) : 0;
      facts[i] = {shift, rounding_factor(shift, lse), static_cast<C>(sum.sum() - dlse)};
    }
  });
}

// dsinks[h] = - sum over b, t of exp(sink - lse) delta, in this order
template <class T>
static void sink_gradient(const AttentionBackward& op, const RowFacts<Compute<T>>* facts,
                          int threads) {
  const int64_t B = op.q.size[0], H = op.q.size[1], T_ = op.q.size[2];
  parallel_for(H, threads, [&](int64_t h, int) {
    const double sink = widen(static_cast<const T*>(op.sinks.data)[h * op.sinks.stride[0]]);
    double sum = 0;
    for (int64_t b = 0; b < B && sink != -INFINITY; ++b)
      for (int64_t t = 0; t < T_; ++t)
        sum -= ::exp(sink - stat_at(op.lse, b, h, t)) *
               static_cast<double>(facts[(b * H + h) * T_ + t].delta);
    static_cast<T*>(op.dsinks.data)[h * op.dsinks.stride[0]] =
        narrow<T>(static_cast<Compute<T>>(sum));
  });
}

// dbias: a task owns the gradients of a tile of keys (all keys where they are summed into one) and
// recomputes dS of every batch, head and query that was expanded onto them, in order.
template <class T>
static Status bias_gradient(const AttentionBackward& op, const RowFacts<Compute<T>>* facts,
                            int threads) {
  using C = Compute<T>;
  const Tensor& db = op.dbias;
  const int64_t B = op.q.size[0], H = op.q.size[1], D = op.q.size[3];
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
    Sight sight;
    for (int64_t i = 0; i < Tb * kKeys; ++i) sum[i] = C(0);
    for (int64_t tile = one_key ? 0 : part; tile < (one_key ? tiles : part + 1); ++tile)
      for (int64_t b = db.size[0] == 1 ? 0 : bb; b < (db.size[0] == 1 ? B : bb + 1); ++b)
        for (int64_t h = db.size[1] == 1 ? 0 : hb; h < (db.size[1] == 1 ? H : hb + 1); ++h) {
          const BackwardGroup<T> x = backward_group<T>(op, facts, b, h / heads);
          const int64_t first = tile * kKeys, keys = S - first < kKeys ? S - first : kKeys;
          pack_keys<T>(memory.k_columns, x.k + first * x.k_row, x.k_row, keys, D);
          pack_keys<T>(memory.v_columns, x.v + first * x.v_row, x.v_row, keys, E);
          int64_t t_begin, t_end;
          queries_of(x, first, first + keys - 1, t_begin, t_end);
          for (int64_t t0 = t_begin; t0 < t_end; t0 += kChunkRows) {
            const int rows = static_cast<int>(t_end - t0 < kChunkRows ? t_end - t0 : kChunkRows);
            look(x, h % heads, t0, rows, first, static_cast<int>(keys), sight);
            if (sight.any == 0) continue;
            score_gradients<T>(x, h % heads, t0, rows, first, sight, memory);
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
  const int64_t H = op.q.size[1], D = op.q.size[3], G = op.k.size[1], E = op.v.size[3];
  const int64_t D_padded = round_up(D, kTileColumns<T>);
  const int64_t heads = G == 0 ? 0 : H / G, pairs = sequences_of(op) * G;
  int64_t most_queries = 0, most_keys = 0;  // of a sequence
  for (int64_t b = 0; b < sequences_of(op); ++b) {
    const Place at = place_of(op, b);
    most_queries = at.queries > most_queries ? at.queries : most_queries;
    most_keys = at.keys > most_keys ? at.keys : most_keys;
  }
  const int64_t tiles = (most_keys + kKeys - 1) / kKeys;
  // dq sums chains of tiles, chain c those of c, c + kChains, ..., and then the chains: an order of
  // the keys' positions alone, so that neither batch nor padding shows in its bits.
  const int chains = static_cast<int>(tiles < kChains ? tiles : kChains);
  const bool shared = pairs < kChains && chains > 1;  // each chain of a head is a task
  const bool summed = !shared && tiles > kChains;     // a task sums its chains in a second array
  const int64_t dq_size = heads * most_queries * D_padded;

  const Scratch all_facts(op.q.size[0] * H * op.q.size[2] * sizeof(RowFacts<C>));
  const Scratch scratch(BackwardMemory<T>::bytes(D, E), threads);
  const int64_t q_size = heads * QueryRows<T>::size(most_queries, D);
  const int64_t dout_size = heads * QueryRows<T>::size(most_queries, E);
  const Scratch packed((q_size + dout_size) * sizeof(C), shared ? 1 : threads);
  const Scratch dqs(dq_size * sizeof(C), shared ? chains : summed ? 2 * threads : threads);
  if (!all_facts.ok() || !scratch.ok() || !packed.ok() || !dqs.ok()) return Status::out_of_memory;
  RowFacts<C>* facts = all_facts.template at<RowFacts<C>>();
  row_facts<T>(op, facts, threads);

  const auto pack_queries = [&](int64_t pair, int block) {
    C* memory = packed.at<C>(block);
    QueryRows<T> queries = {memory, memory + q_size};
    queries.pack(backward_group<T>(op, facts, pair / G, pair % G));
    return queries;
  };
  const auto keys_of = [&](int64_t pair, const QueryRows<T>& queries, int64_t chain, int64_t step,
                           int slot, int thread) {
    const int64_t b = pair / G, g = pair % G;
    const Place at = place_of(op, b);
    BackwardMemory<T> memory(D, E, scratch.at<char>(thread));
    C* dq = dqs.template at<C>(slot);
    for (int64_t i = 0; i < heads * at.queries * D_padded; ++i) dq[i] = C(0);
    backward_keys<T>(backward_group<T>(op, facts, b, g), chain, step, memory, queries, dq,
                     row_at<T>(op.dk, at.batch, g, at.k_row), op.dk.stride[2],
                     row_at<T>(op.dv, at.batch, g, at.k_row), op.dv.stride[2], op.scale);
  };
  const auto write_dq = [&](int64_t pair, int64_t first, int64_t last, int parts, int slot) {
    const Place at = place_of(op, pair / G);
    for (int64_t r = first; r < last; ++r) {
      T* dq =
          row_at<T>(op.dq, at.batch, pair % G * heads + r / at.queries, at.q_row + r % at.queries);
      each_vector<C>(D, [&](int64_t i, int n) {
        Vec<C> sum = load(dqs.template at<C>(slot) + r * D_padded + i);
        for (int part = 1; part < parts; ++part)
          sum = sum + load(dqs.template at<C>(slot + part) + r * D_padded + i);
        store_n(dq + i, sum * Vec<C>::splat(static_cast<C>(op.scale)), n);
      });
    }
  };

  if (shared) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const QueryRows<T> queries = pack_queries(pair, 0);
      parallel_for(chains, threads, [&](int64_t chain, int thread) {
        keys_of(pair, queries, chain, kChains, static_cast<int>(chain), thread);
      });
      parallel_rows(
          heads * place_of(op, pair / G).queries, 64, threads,
          [&](int64_t first, int64_t last, int) { write_dq(pair, first, last, chains, 0); });
    }
  } else {
    parallel_for(pairs, threads, [&](int64_t pair, int thread) {
      const int64_t rows = heads * place_of(op, pair / G).queries;
      const QueryRows<T> queries = pack_queries(pair, thread);
      if (summed) {
        C *sum = dqs.template at<C>(thread), *part = dqs.template at<C>(threads + thread);
        for (int64_t i = 0; i < rows * D_padded; ++i) sum[i] = C(0);
        for (int chain = 0; chain < kChains; ++chain) {
          keys_of(pair, queries, chain, kChains, threads + thread, thread);
          for (int64_t i = 0; i < rows * D_padded; ++i) sum[i] += part[i];
        }
      } else {
        keys_of(pair, queries, 0, 1, thread, thread);
      }
      write_dq(pair, 0, rows, 1, thread);
    });
  }
  if (op.dsinks.given) sink_gradient<T>(op, facts, threads);
  return op.dbias.given ? bias_gradient<T>(op, facts, threads) : Status::ok;
}

}  // namespace

Status attention_backward(const AttentionBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

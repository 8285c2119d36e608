// The layers of a language model as loops of one team of threads. A layer is five loops: qkv,
// attention with the append, projection, up and down; the norms of more than a few rows are two
// more.
#pragma once
#include "cpu/activate.h"
#include "cpu/attention_forward.h"
#include "cpu/norm_rows.h"
#include "cpu/panels.h"
#include "cpu/rotate.h"
#include "ops/lm_step.h"

PYKERN_BEGIN_ISA
namespace {

// The rows of one text in a step.
struct Text {
  int64_t first, rows, length;
  const int32_t* pages;
  int64_t pages_step;
};

static Text text_of(const LmStep& op, int64_t s) {
  const auto at = [](const Tensor& t, int64_t i) {
    return static_cast<const int32_t*>(t.data)[i * t.stride[0]];
  };
  const int64_t first = at(op.first_rows, s);
  return {first, at(op.first_rows, s + 1) - first, at(op.lengths, s),
          static_cast<const int32_t*>(op.block_table.data) + s * op.block_table.stride[0],
          op.block_table.stride[1]};
}

// The most new tokens and the most keys of a text, which then gets `more` tokens.
struct Extent {
  int64_t rows = 0, keys = 0;

  Extent(const LmStep& op, int64_t more) {
    for (int64_t s = 0; s < op.lengths.size[0]; ++s) {
      const Text text = text_of(op, s);
      rows = text.rows > rows ? text.rows : rows;
      keys = text.length + text.rows + more > keys ? text.length + text.rows + more : keys;
    }
  }
};

// What is between the layers and inside them: a matrix of R rows each.
template <class T>
struct Work {
  const int64_t E, Q, H;  // widths: of the stream, of q, k and v together, inside the MLP
  const Scratch stream, normed, qkv, hidden, gate, last;
  const Scratch own;  // of each thread: rows that it normalises for itself
  const ProductMemory<T> product;
  const int64_t parts;  // of the keys of a text, where threads share one
  const Scratch attention, partial;

  static int64_t bytes(int64_t rows, int64_t width) { return rows * width * sizeof(T); }
  Work(const LmModel& m, int64_t rows, int64_t texts, Extent most, int threads)
      : E(m.embedding.size[1]),
        Q((m.n_head + 2 * m.n_kv_head) * m.head_size),
        H(m.hidden),
        stream(bytes(rows, E)),
        normed(bytes(rows, E)),
        qkv(bytes(rows, Q)),
        hidden(bytes(rows, H)),
        gate(m.layers[0].gate.panels.given ? bytes(rows, H) : 0),
        last(bytes(texts, E)),
        own(bytes(threads, E), threads),
        product(rows, E > H ? E : H, kWidened<T, WeightKind::numbers> || quantised(m), threads),
        parts(deals_parts<T>(texts * m.n_kv_head, m.n_head / m.n_kv_head * most.rows, most.keys,
                             threads)
                  ? parts_of(most.keys)
                  : 0),
        attention(forward_bytes<T>(m.head_size, m.head_size), threads),
        partial(texts * m.n_kv_head * parts * part_size<T>(m.head_size) * sizeof(Compute<T>)) {}
  static bool quantised(const LmModel& m) {
    bool some = m.head.kind != WeightKind::numbers;
    for (int64_t i = 0; i < m.n_layer; ++i) {
      const LmLayer& l = m.layers[i];
      const PackedWeight* const weights[] = {&l.attn, &l.proj, &l.up, &l.gate, &l.down};
      for (const PackedWeight* w : weights) some = some || w->kind != WeightKind::numbers;
    }
    return some;
  }
  bool ok() const {
    return stream.ok() && normed.ok() && qkv.ok() && hidden.ok() && gate.ok() && last.ok() &&
           own.ok() && product.ok() && attention.ok();
  }
};

template <class T>
static void embed_row(const LmModel& m, int64_t token, int64_t position, int64_t E, T* x) {
  using C = Compute<T>;
  using V = Vec<C>;
  const T* from = static_cast<const T*>(m.embedding.data) + token * E;
  if (m.embedding_scale == 1) {
    memcpy(x, from, E * sizeof(T));
  } else {
    const V scale = V::splat(static_cast<C>(m.embedding_scale));
    each_vector<C>(E, [&](int64_t i, int n) { store_n(x + i, load_n(from + i, n) * scale, n); });
  }
  if (!m.positions.given) return;
  const T* table = static_cast<const T*>(m.positions.data) + position * E;
  each_vector<C>(
      E, [&](int64_t i, int n) { store_n(x + i, load_n(x + i, n) + load_n(table + i, n), n); });
}

template <class T>
static void normalise(const LmModel& m, const T* x, const Tensor& weight, const Tensor& bias,
                      int64_t E, T* out) {
  using C = Compute<T>;
  C mean, rstd;
  const Numbers<C> w(weight), b(bias), to(out, kDType<T>);
  if (m.layer_norm)
    normalise_row<true>(x, E, w, b, m.norm_eps, to, 0, &mean, &rstd);
  else
    normalise_row<false>(x, E, w, b, m.norm_eps, to, 0, &mean, &rstd);
}

// The heads of q and k of one row: normalised and rotated, in place.
template <class T>
static void place_heads(const LmModel& m, int64_t heads, int64_t position, T* x) {
  using C = Compute<T>;
  const int64_t D = m.head_size;
  const Numbers<C> none(nullptr, kDType<T>);
  for (int64_t h = 0; h < heads; ++h, x += D) {
    C mean, rstd;
    if (m.qk_norm)
      normalise_row<false>(x, D, none, none, m.qk_norm_eps, Numbers<C>(x, kDType<T>), 0, &mean,
                           &rstd);
    if (!m.rotary_cos.given) continue;
    const float* cos = static_cast<const float*>(m.rotary_cos.data) + position * (D / 2);
    const float* sin = static_cast<const float*>(m.rotary_sin.data) + position * (D / 2);
    rotate_row<false>(x, cos, sin, 1, D / 2, D, x);
  }
}

// One row into the cache: as it is or, with scales, as int8, q = x / scale to the nearest integer
// with scale = max |x| / 127. Where a number is not finite, the row that is read is NaN.
template <class T>
static void store_row(const Tensor& cache, const Tensor& scales, int64_t page, int64_t g,
                      int64_t slot, const T* x, int64_t D) {
  if (!scales.given) {
    memcpy(row_at<T>(cache, page, g, slot), x, D * sizeof(T));
    return;
  }
  float most = 0;
  bool finite = true;
  for (int64_t i = 0; i < D; ++i) {
    const float size = __builtin_fabsf(widen(x[i]));
    finite = finite && size < INFINITY;
    most = size > most ? size : most;
  }
  const float scale = finite ? most / 127.0f : NAN;
  *(static_cast<float*>(scales.data) + page * scales.stride[0] + g * scales.stride[1] + slot) =
      scale;
  int8_t* q = row_at<int8_t>(cache, page, g, slot);
  for (int64_t i = 0; i < D; ++i)
    q[i] = finite && scale > 0 ? static_cast<int8_t>(__builtin_rintf(widen(x[i]) / scale)) : 0;
}

// Puts key head g of the text's new tokens into the cache, and readies its queries.
template <class T>
static void append_head(const LmModel& m, const LmLayer& layer, const Text& text, int64_t g, T* qkv,
                        int64_t Q) {
  const int64_t D = m.head_size, heads = m.n_head / m.n_kv_head, page = layer.k_cache.size[2];
  for (int64_t i = 0; i < text.rows; ++i) {
    const int64_t position = text.length + i;
    T* row = qkv + (text.first + i) * Q;
    T *k = row + (m.n_head + g) * D, *v = row + (m.n_head + m.n_kv_head + g) * D;
    place_heads(m, heads, position, row + g * heads * D);
    place_heads(m, 1, position, k);
    const int64_t id = text.pages[position / page * text.pages_step], slot = position % page;
    store_row(layer.k_cache, layer.k_scale, id, g, slot, k, D);
    store_row(layer.v_cache, layer.v_scale, id, g, slot, v, D);
  }
}

// The query heads of key head g, over all keys of the text.
template <class T>
static Group<T> group_of_text(const LmModel& m, const LmLayer& layer, const Text& text, int64_t g,
                              const T* qkv, int64_t Q) {
  Group<T> x = {};
  const int64_t D = m.head_size, heads = m.n_head / m.n_kv_head, h = g * heads;
  x.heads = heads, x.T_ = text.rows, x.S = text.length + text.rows, x.D = x.E = D;
  x.q = {qkv + text.first * Q + h * D, D, Q};
  x.k = row_at<const T>(layer.k_cache, 0, g, 0), x.k_row = layer.k_cache.stride[2];
  x.v = row_at<const T>(layer.v_cache, 0, g, 0), x.v_row = layer.v_cache.stride[2];
  x.pages = text.pages, x.pages_step = text.pages_step, x.page = layer.k_cache.size[2];
  x.k_page = layer.k_cache.stride[0], x.v_page = layer.v_cache.stride[0];
  if (layer.k_scale.given) {
    const int64_t at = g * layer.k_scale.stride[1];
    x.k = reinterpret_cast<const T*>(row_at<const int8_t>(layer.k_cache, 0, g, 0));
    x.v = reinterpret_cast<const T*>(row_at<const int8_t>(layer.v_cache, 0, g, 0));
    x.k_scale = static_cast<const float*>(layer.k_scale.data) + at;
    x.v_scale = static_cast<const float*>(layer.v_scale.data) + at;
    x.scale_page = layer.k_scale.stride[0];
  }
  if (m.alibi_slopes.given) x.slopes = static_cast<const float*>(m.alibi_slopes.data) + h;
  x.slope_head = 1;
  if (m.distance_bias.given) {  // key s and query t: max_len - 1 - (length + t) + s
    const int64_t width = m.distance_bias.size[1];
    x.bias = static_cast<const T*>(m.distance_bias.data) + h * width + m.max_len - 1 - text.length;
    x.bias_head = width, x.bias_row = -1, x.bias_key = 1;
  }
  set_window(x, -1, 0);
  set_scores(x, m.scale, 0);
  return x;
}

template <class T>
static void attend(Team& team, const LmStep& op, const LmLayer& layer, const Work<T>& work) {
  const LmModel& m = *op.model;
  const int64_t S = op.lengths.size[0], R = op.tokens.size[0], G = m.n_kv_head;
  const int64_t heads = m.n_head / G, D = m.head_size;
  T* const qkv = work.qkv.template at<T>();
  Tensor out;  // [1, heads, R, D] over rows of E
  out.data = work.normed.template at<T>();
  out.size[0] = 1, out.size[1] = m.n_head, out.size[2] = R, out.size[3] = D;
  out.stride[0] = 0, out.stride[1] = D, out.stride[2] = work.E, out.stride[3] = 1;
  const Tensor no_lse;
  const Extent most(op, 0);
  const int64_t blocks = (heads * most.rows + kBlockRows - 1) / kBlockRows;
  char* const memory = work.attention.template at<char>(team.thread());
  const auto results = [&](const Text& text, int64_t g) {
    return Results{out, no_lse, 0, g * heads, text.first};
  };
  const auto group = [&](int64_t i) {
    return group_of_text<T>(m, layer, text_of(op, i / G), i % G, qkv, work.Q);
  };
  const auto block = [&](int64_t i, int64_t first) {
    Group<T> x = group(i);
    const int64_t rows = x.rows(), next = i + team.size();
    if (first >= rows) return;
    if (next < S * G) expect(x, group(next));
    forward_block<T>(x, first, first + kBlockRows < rows ? first + kBlockRows : rows,
                     results(text_of(op, i / G), i % G), memory);
  };
  const int64_t parts = work.parts > 0 ? parts_of(most.keys) : 0;
  if (blocks == 1 && parts <= 1) {  // whoever appends the keys of a head attends to them
    team.loop(S * G, [&](int64_t i) {
      append_head<T>(m, layer, text_of(op, i / G), i % G, qkv, work.Q);
      block(i, 0);
    });
    return;
  }
  team.loop(S * G,
            [&](int64_t i) { append_head<T>(m, layer, text_of(op, i / G), i % G, qkv, work.Q); });
  if (parts > 1) {
    const auto at = [&](int64_t task, int64_t part) {
      return work.partial.template at<Compute<T>>() + (task * work.parts + part) * part_size<T>(D);
    };
    team.loop(S * G * parts, [&](int64_t i) {
      const int64_t task = i / parts, part = i % parts;
      const Group<T> x = group(task);
      if (part < parts_of(x.S)) sum_one_part(x, part, at(task, part), memory);
    });
    team.loop(S * G, [&](int64_t task) {
      join_parts(group(task), at(task, 0), results(text_of(op, task / G), task % G), memory);
    });
    return;
  }
  team.loop(S * G * blocks, [&](int64_t i) { block(i / blocks, i % blocks * kBlockRows); });
}

// to [R, N] = x w^T + bias, plus what is there where `adds`
template <class T>
static void project(Team& team, const PackedWeight& w, const Tensor& bias_, const T* x, int64_t R,
                    const Work<T>& work, bool adds, T* to) {
  using C = Compute<T>;
  const Numbers<C> bias(bias_);
  product<T>(team, w, x, w.K, R, work.product, [&](int64_t row, int64_t column, Vec<C> y, int n) {
    if (bias.data) y = y + bias.load(column, n);
    T* at = to + row * w.N + column;
    if (adds) y = y + load_n(at, n);
    store_n(at, y, n);
  });
}

template <class T>
static void mlp(Team& team, const LmModel& m, const LmLayer& layer, const T* x, int64_t R,
                const Work<T>& work) {
  using C = Compute<T>;
  T *const hidden = work.hidden.template at<T>(), *const gate = work.gate.template at<T>();
  const bool gated = layer.gate.panels.given;
  if (gated) project<T>(team, layer.gate, layer.gate_bias, x, R, work, false, gate);
  const Numbers<C> bias(layer.up_bias);
  product<T>(team, layer.up, x, work.E, R, work.product,
             [&](int64_t row, int64_t column, Vec<C> y, int n) {
               const int64_t i = row * work.H + column;
               if (bias.data) y = y + bias.load(column, n);
               y = gated ? activate_any(m.activation, load_n(gate + i, n)) * y
                         : activate_any(m.activation, y);
               store_n(hidden + i, y, n);
             });
  project<T>(team, layer.down, layer.down_bias, hidden, R, work, true,
             work.stream.template at<T>());
}

// The step, by every thread of the team. logits: rows of V numbers, `step` apart; null: none
// wanted.
template <class T>
static void step(Team& team, const LmStep& op, const int64_t* tokens, T* logits, int64_t logits_row,
                 bool last_rows, const Work<T>& work) {
  using C = Compute<T>;
  const LmModel& m = *op.model;
  const int64_t R = op.tokens.size[0], S = op.lengths.size[0], E = work.E;
  T *const x = work.stream.template at<T>(), *const y = work.normed.template at<T>();
  // The norms of n rows of x, row i from row from(i): in `to`, or, where threads are as many, each
  // makes all of them for itself, which is cheaper than to wait for another.
  const auto norm_rows = [&](int64_t n, const Tensor& weight, const Tensor& bias, T* to,
                             const auto& from) -> const T* {
    const bool own = n <= team.size();
    if (own) to = work.own.template at<T>(team.thread());
    const auto row = [&](int64_t i) { normalise(m, x + from(i) * E, weight, bias, E, to + i * E); };
    if (own)
      for (int64_t i = 0; i < n; ++i) row(i);
    else
      team.loop(n, row);
    return to;
  };
  const auto same = [](int64_t i) { return i; };
  team.loop(S, [&](int64_t s) {
    const Text text = text_of(op, s);
    for (int64_t i = 0; i < text.rows; ++i)
      embed_row<T>(m, tokens[text.first + i], text.length + i, E, x + (text.first + i) * E);
  });
  for (int64_t i = 0; i < m.n_layer; ++i) {
    const LmLayer& layer = m.layers[i];
    const T* normed = norm_rows(R, layer.ln_1_weight, layer.ln_1_bias, y, same);
    project<T>(team, layer.attn, layer.attn_bias, normed, R, work, false,
               work.qkv.template at<T>());
    attend<T>(team, op, layer, work);
    project<T>(team, layer.proj, layer.proj_bias, y, R, work, true, x);
    normed = norm_rows(R, layer.ln_2_weight, layer.ln_2_bias, y, same);
    mlp<T>(team, m, layer, normed, R, work);
  }
  if (!logits) return;
  const int64_t outputs = last_rows ? S : R;
  const T* const states = norm_rows(outputs, m.ln_f_weight, m.ln_f_bias,
                                    last_rows ? work.last.template at<T>() : y, [&](int64_t i) {
                                      const Text text = text_of(op, last_rows ? i : 0);
                                      return last_rows ? text.first + text.rows - 1 : i;
                                    });
  product<T>(team, m.head, states, E, outputs, work.product,
             [&](int64_t row, int64_t column, Vec<C> v, int n) {
               store_n(logits + row * logits_row + column, v, n);
             });
}

}  // namespace
PYKERN_END_ISA

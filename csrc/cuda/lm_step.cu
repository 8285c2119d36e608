// lm_step: the layers as the ops of this folder, one after the other in a stream; what the host
// knows of the texts is copied to the device first. lm_generate: a step and the choice of its
// tokens, captured as a graph and launched once for each token; the host waits once, at the end.
//
// A layer is eight kernels of R rows: two norms, four products (five where the MLP is gated, and a
// pass between), append, attention; and one more where q and k are normalised.
#include <string.h>

#include <vector>

#include "cuda/elementwise.cuh"
#include "cuda/graph.h"
#include "cuda/sampling.h"
#include "ops/all.h"
#include "ops/lm_step.h"

namespace pykern::cuda {
namespace {

constexpr const char* kOp = "lm_step";

// ---- what a step needs to know of its texts

Tensor vector_of(void* data, DType dtype, int64_t n, const Tensor& like) {
  Tensor t = like;
  t.data = data, t.dtype = dtype, t.rank = 1, t.given = true, t.readonly = false;
  t.size[0] = n, t.stride[0] = 1;
  return t;
}

// Integers of the host, side by side, on their way to the device in one copy and back in another.
class Controls {
 public:
  explicit Controls(const Tensor& like) : like_(like) {}

  // Room for n numbers; from: what they are, if anything
  int64_t add(DType dtype, int64_t n, const void* from = nullptr) {
    const int64_t bytes = n * item_size(dtype), at = static_cast<int64_t>(host_.size());
    host_.resize(at + ceil_div(bytes, 16) * 16);
    if (from) memcpy(host_.data() + at, from, bytes);
    return at;
  }
  void send(const Workspace& memory, Stream stream) {
    device_ = memory.at<char>();
    require(cudaMemcpyAsync(device_, host_.data(), host_.size(), cudaMemcpyHostToDevice,
                            static_cast<cudaStream_t>(stream)),
            kOp);
  }
  void fetch(Stream stream) {
    require(cudaMemcpyAsync(host_.data(), device_, host_.size(), cudaMemcpyDeviceToHost,
                            static_cast<cudaStream_t>(stream)),
            kOp);
    require(cudaStreamSynchronize(static_cast<cudaStream_t>(stream)), kOp);
  }
  size_t bytes() const { return host_.size(); }
  Tensor vector(int64_t at, DType dtype, int64_t n) const {
    return vector_of(device_ + at, dtype, n, like_);
  }
  template <class T>
  T* on_host(int64_t at) {
    return reinterpret_cast<T*>(host_.data() + at);
  }

 private:
  const Tensor& like_;
  std::vector<char> host_;
  char* device_ = nullptr;
};

int64_t number(const Tensor& t, int64_t i) {
  return static_cast<const int32_t*>(t.data)[i * t.stride[0]];
}

// The texts of a step, on the device; counts of rows are the host's.
struct Texts {
  int64_t S, R, pages;
  std::vector<int64_t> first_rows;                     // [S + 1]
  int64_t tokens, lengths, table, text_of_row, first;  // in the controls
  Controls* controls;

  Texts(const LmStep& op, Controls& c)
      : S(op.lengths.size[0]), R(op.tokens.size[0]), pages(op.block_table.size[1]), controls(&c) {
    std::vector<int32_t> table_(S * pages), text_(R), first_(S + 1), lengths_(S);
    for (int64_t s = 0; s <= S; ++s) {
      first_rows.push_back(number(op.first_rows, s));
      first_[s] = static_cast<int32_t>(first_rows[s]);
    }
    for (int64_t s = 0; s < S; ++s) {
      lengths_[s] = static_cast<int32_t>(number(op.lengths, s));
      for (int64_t r = first_rows[s]; r < first_rows[s + 1]; ++r)
        text_[r] = static_cast<int32_t>(s);
      for (int64_t i = 0; i < pages; ++i)
        table_[s * pages + i] = static_cast<const int32_t*>(
            op.block_table.data)[s * op.block_table.stride[0] + i * op.block_table.stride[1]];
    }
    tokens = c.add(DType::i64, R, op.tokens.data);
    lengths = c.add(DType::i32, S, lengths_.data());
    table = c.add(DType::i32, S * pages, table_.data());
    text_of_row = c.add(DType::i32, R, text_.data());
    first = c.add(DType::i32, S + 1, first_.data());
  }
  int64_t rows(int64_t s) const { return first_rows[s + 1] - first_rows[s]; }
  // Calls body(s, count, rows) for every run of texts with equally many rows.
  template <class Body>
  void each_run(const Body& body) const {
    for (int64_t s = 0, end; s < S; s = end) {
      for (end = s + 1; end < S && rows(end) == rows(s);) ++end;
      body(s, end - s, rows(s));
    }
  }
};

// ---- x = embedding[token] * embedding_scale + positions[p]

template <class T>
struct Embed {
  const T *embedding, *positions;
  const int64_t* tokens;
  const int32_t *lengths, *text_of_row, *first;
  T* out;
  Extent extent;  // R rows of E
  int64_t V, most_position;
  Compute<T> scale;
  Running running;
  int64_t S;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads) lm_embed(const Embed<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  if (a.running.tokens) {  // a step of lm_generate begins
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.running.now += 1;
    if (*a.running.last < a.running.steps) {  // for nobody: lengths that append refuses
      for (int64_t s = threadIdx.x; blockIdx.x == 0 && s < a.S; s += blockDim.x)
        a.running.lengths[s] = -1;
      return;
    }
  }
  const int64_t E = a.extent.D;
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    const int64_t token = a.tokens[row];
    const int text = a.text_of_row[row];
    const int64_t position = a.lengths[text] + row - a.first[text];
    C x[W], y[W];
    if (token < 0 || token >= a.V || position > a.most_position) {  // after a broken text
#pragma unroll
      for (int j = 0; j < W; ++j) x[j] = 0;
      store(a.out + row * E + first, valid, a.extent.vectors, x);
      return;
    }
    load(a.embedding + token * E + first, valid, a.extent.vectors, x);
    if (a.scale != 1) {
#pragma unroll
      for (int j = 0; j < W; ++j) x[j] = widen(narrow<T>(x[j] * a.scale));
    }
    if (a.positions) {
      load(a.positions + position * E + first, valid, a.extent.vectors, y);
#pragma unroll
      for (int j = 0; j < W; ++j) x[j] += y[j];
    }
    store(a.out + row * E + first, valid, a.extent.vectors, x);
  });
}

// ---- the layers

// Matrices of R rows between the layers and inside them.
class Steps {
 public:
  Steps(const LmModel& m, const Texts& texts, Stream stream)
      : m_(m),
        texts_(texts),
        stream_(stream),
        E_(m.embedding.size[1]),
        Q_((m.n_head + 2 * m.n_kv_head) * m.head_size),
        turned_(m.qk_norm ? (m.n_head + m.n_kv_head) * m.head_size : 0),
        item_(item_size(m.embedding.dtype)),
        memory_(bytes(E_) * 2 + bytes(Q_) + bytes(turned_) + stat_bytes() * 2, stream) {
    char* at = memory_.at<char>();
    const auto take = [&](size_t size) {
      char* const taken = at;
      at += size;
      return taken;
    };
    x_ = take(bytes(E_)), y_ = take(bytes(E_)), qkv_ = take(bytes(Q_)), qk_ = take(bytes(turned_));
    mean_ = take(stat_bytes()), rstd_ = take(stat_bytes());
  }

  // logits: [R, V] or, of the last rows, [S, V]; may be absent
  void run(const Tensor& logits, const Running& running) const {
    embed(running);
    const Tensor x = matrix(x_, texts_.R, E_), y = matrix(y_, texts_.R, E_);
    for (int64_t i = 0; i < m_.n_layer; ++i) {
      const LmLayer& layer = m_.layers[i];
      normalise(x, layer.ln_1_weight, layer.ln_1_bias, m_.norm_eps, y);
      linear(y, layer.attn, layer.attn_bias, {}, matrix(qkv_, texts_.R, Q_));
      attend(layer);
      linear(y, layer.proj, layer.proj_bias, x, x);
      normalise(x, layer.ln_2_weight, layer.ln_2_bias, m_.norm_eps, y);
      MlpForward mlp{};
      mlp.x = y, mlp.residual = x, mlp.out = x, mlp.activation = m_.activation;
      mlp.up_weight = layer.up.panels, mlp.up_bias = layer.up_bias;
      mlp.gate_weight = layer.gate.panels, mlp.gate_bias = layer.gate_bias;
      mlp.down_weight = layer.down.panels, mlp.down_bias = layer.down_bias;
      mlp_forward(mlp, stream_);
    }
    if (!logits.given) return;
    const bool last = logits.size[0] == texts_.S;
    if (last)
      texts_.each_run([&](int64_t s, int64_t count, int64_t n) {
        Tensor rows = matrix(x_, count, E_, (texts_.first_rows[s] + n - 1) * E_);
        rows.stride[0] = n * E_;
        normalise(rows, m_.ln_f_weight, m_.ln_f_bias, m_.norm_eps, matrix(y_, count, E_, s * E_));
      });
    else
      normalise(x, m_.ln_f_weight, m_.ln_f_bias, m_.norm_eps, y);
    linear(matrix(y_, logits.size[0], E_), m_.head, {}, {}, logits);
  }

 private:
  size_t bytes(int64_t width) const { return ceil_div(texts_.R * width * item_, 256) * 256; }
  size_t stat_bytes() const {
    return ceil_div(texts_.R * (m_.n_head + m_.n_kv_head) * int64_t(sizeof(float)), 256) * 256;
  }
  Tensor matrix(void* data, int64_t rows, int64_t columns, int64_t first = 0) const {
    Tensor t =
        vector_of(static_cast<char*>(data) + first * item_, m_.embedding.dtype, rows, m_.embedding);
    t.rank = 2, t.size[1] = columns, t.stride[0] = columns, t.stride[1] = 1;
    return t;
  }
  // [B, heads, n, D] of rows `row` apart, from head `head` and row `first` on
  Tensor heads_of(void* data, int64_t row, int64_t first, int64_t head, int64_t heads, int64_t B,
                  int64_t n) const {
    Tensor t = matrix(data, B, heads, first * row + head * m_.head_size);
    t.rank = 4;
    const int64_t size[] = {B, heads, n, m_.head_size}, stride[] = {n * row, m_.head_size, row, 1};
    for (int i = 0; i < 4; ++i) t.size[i] = size[i], t.stride[i] = stride[i];
    return t;
  }

  void embed(const Running& running) const {
    const Controls& c = *texts_.controls;
    with_type(m_.embedding.dtype, [&]<class T>(T) {
      const Tensor x = matrix(x_, texts_.R, E_);
      const Extent extent{texts_.R, E_, take_packs<T>({&m_.embedding, &m_.positions, &x})};
      const auto numbers = [&](int64_t at, DType dtype, int64_t n) {
        return c.vector(at, dtype, n).data;
      };
      const Embed<T> a{
          .embedding = static_cast<const T*>(m_.embedding.data),
          .positions = static_cast<const T*>(m_.positions.given ? m_.positions.data : nullptr),
          .tokens = static_cast<const int64_t*>(numbers(texts_.tokens, DType::i64, texts_.R)),
          .lengths = static_cast<const int32_t*>(numbers(texts_.lengths, DType::i32, texts_.S)),
          .text_of_row =
              static_cast<const int32_t*>(numbers(texts_.text_of_row, DType::i32, texts_.R)),
          .first = static_cast<const int32_t*>(numbers(texts_.first, DType::i32, texts_.S + 1)),
          .out = static_cast<T*>(x.data),
          .extent = extent,
          .V = m_.vocabulary,
          .most_position = m_.max_len - 1,
          .scale = static_cast<Compute<T>>(m_.embedding_scale),
          .running = running,
          .S = texts_.S};
      launch(kOp, lm_embed<T>, element_grid<T>(extent), stream_, a);
    });
  }

  void normalise(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps,
                 const Tensor& out, bool rms = false) const {
    const auto filled = [&](auto op) {
      op.x = x, op.weight = weight, op.bias = bias, op.out = out, op.eps = eps;
      op.mean = vector_of(mean_, DType::f32, rows(x), x);
      op.rstd = vector_of(rstd_, DType::f32, rows(x), x);
      return op;
    };
    if (m_.layer_norm && !rms)
      layer_norm_forward(filled(LayerNormForward{}), stream_);
    else
      rms_norm_forward(filled(RmsNormForward{}), stream_);
  }

  void linear(const Tensor& x, const PackedWeight& w, const Tensor& bias, const Tensor& residual,
              const Tensor& out) const {
    LinearForward op{};
    op.x = x, op.weight = w.panels, op.bias = bias, op.residual = residual, op.out = out;
    linear_forward(op, stream_);
  }

  // From qkv to y, through the caches of the layer
  void attend(const LmLayer& layer) const {
    const int64_t H = m_.n_head, G = m_.n_kv_head, D = m_.head_size;
    const Controls& c = *texts_.controls;
    void* qk = qkv_;
    int64_t qk_row = Q_;
    if (m_.qk_norm) {
      Tensor from = matrix(qkv_, texts_.R, H + G), to = matrix(qk_, texts_.R, H + G);
      for (Tensor* t : {&from, &to})
        t->rank = 3, t->size[2] = D, t->stride[1] = D, t->stride[2] = 1;
      from.stride[0] = Q_, to.stride[0] = turned_;
      normalise(from, {}, {}, m_.qk_norm_eps, to, true);
      qk = qk_, qk_row = turned_;
    }
    texts_.each_run([&](int64_t s, int64_t count, int64_t n) {
      const int64_t first = texts_.first_rows[s];
      DecodeForward op{};
      op.q = heads_of(qk, qk_row, first, 0, H, count, n);
      op.k = heads_of(qk, qk_row, first, H, G, count, n);
      op.v = heads_of(qkv_, Q_, first, H + G, G, count, n);
      op.out = heads_of(y_, E_, first, 0, H, count, n);
      op.k_cache = layer.k_cache, op.v_cache = layer.v_cache;
      op.k_scale = layer.k_scale, op.v_scale = layer.v_scale;
      op.cache_seqlens = c.vector(texts_.lengths + s * int64_t(sizeof(int32_t)), DType::i32, count);
      op.block_table =
          c.vector(texts_.table + s * texts_.pages * int64_t(sizeof(int32_t)), DType::i32, count);
      op.block_table.rank = 2, op.block_table.size[1] = texts_.pages;
      op.block_table.stride[0] = texts_.pages, op.block_table.stride[1] = 1;
      op.rotary_cos = m_.rotary_cos, op.rotary_sin = m_.rotary_sin;
      if (m_.alibi_slopes.given) {
        op.alibi_slopes = m_.alibi_slopes;
        op.alibi_slopes.rank = 2, op.alibi_slopes.size[0] = count, op.alibi_slopes.size[1] = H;
        op.alibi_slopes.stride[1] = op.alibi_slopes.stride[0], op.alibi_slopes.stride[0] = 0;
      }
      op.left = -1, op.right = 0, op.scale = m_.scale;
      attention_with_kvcache(op, stream_);
    });
  }

  const LmModel& m_;
  const Texts& texts_;
  const Stream stream_;
  const int64_t E_, Q_, turned_, item_;  // widths: of the stream, of q, k and v, of q and k
  const Workspace memory_;
  void *x_, *y_, *qkv_, *qk_, *mean_, *rstd_;
};

void require_kernels(const LmModel& m) {
  PYKERN_CHECK(value, !m.distance_bias.given, kOp, ": distance_bias has no CUDA kernel yet");
}

}  // namespace

void lm_step(const LmStep& op, Stream stream) {
  require_kernels(*op.model);
  const OnDevice device(op.model->embedding);
  Controls controls(op.model->embedding);
  const Texts texts(op, controls);
  const Workspace memory(controls.bytes(), stream);
  controls.send(memory, stream);
  Steps(*op.model, texts, stream).run(op.logits, {});
}

void lm_generate(const LmGenerate& op, Stream after) {
  const LmModel& m = *op.step.model;
  require_kernels(m);
  const OnDevice device(m.embedding);
  const int64_t S = op.step.lengths.size[0], K = op.ids.size[1], V = m.vocabulary;
  const int64_t stops = op.stop_tokens.given ? op.stop_tokens.size[0] : 0;
  const int64_t written = op.history.given ? op.history.size[1] : 0;
  const OwnStream stream(after);
  Controls c(m.embedding);
  const Texts texts(op.step, c);
  const int64_t seeds = c.add(DType::i64, S, op.seeds.data);
  const int64_t draws = c.add(DType::i64, S, op.draws.data);
  const int64_t history = c.add(DType::i64, S * written, op.history.data);
  const int64_t counts = c.add(DType::i64, written > 0 ? S : 0, op.counts.data);
  const int64_t stop_tokens = c.add(DType::i64, stops, op.stop_tokens.data);
  const int64_t ids = c.add(DType::i64, S * K, op.ids.data);
  const int32_t begin[] = {0, static_cast<int32_t>(K)};
  const int64_t state = c.add(DType::i32, 2, begin);
  const Workspace memory(c.bytes(), stream);
  c.send(memory, stream);

  const Workspace logits_memory(S * V * item_size(m.embedding.dtype), stream);
  Tensor logits = vector_of(logits_memory.at<void>(), m.embedding.dtype, S, m.embedding);
  logits.rank = 2, logits.size[1] = V, logits.stride[0] = V, logits.stride[1] = 1;
  int* const now = static_cast<int*>(c.vector(state, DType::i32, 2).data);
  Choice choice{.logits = logits,
                .seeds = c.vector(seeds, DType::i64, S),
                .draws = c.vector(draws, DType::i64, S),
                .history = {},
                .counts = {},
                .ids = c.vector(ids, DType::i64, S),
                .options = op.options,
                .running = {}};
  choice.ids.rank = 2, choice.ids.size[1] = K, choice.ids.stride[0] = K, choice.ids.stride[1] = 1;
  if (written > 0) {
    choice.history = c.vector(history, DType::i64, S);
    choice.history.rank = 2, choice.history.size[1] = written;
    choice.history.stride[0] = written, choice.history.stride[1] = 1;
    choice.counts = c.vector(counts, DType::i64, S);
  }
  choice.running = {static_cast<int64_t*>(c.vector(texts.tokens, DType::i64, S).data),
                    static_cast<int32_t*>(c.vector(texts.lengths, DType::i32, S).data),
                    now,
                    now + 1,
                    static_cast<int>(K),
                    static_cast<const int64_t*>(c.vector(stop_tokens, DType::i64, stops).data),
                    stops};
  const Workspace scratch(choice_bytes(choice), stream);
  const auto step = [&] {
    Steps(m, texts, stream).run(logits, choice.running);
    choose(choice, scratch.at<void>(), stream);
  };
  if (K > 1) {
    const Graph graph(stream, step);
    for (int64_t k = 0; k < K; ++k) graph.launch();
    c.fetch(stream);  // the graph must live until it is done
  } else {
    step();
    c.fetch(stream);
  }

  memcpy(op.ids.data, c.on_host<char>(ids), S * K * sizeof(int64_t));
  memcpy(op.draws.data, c.on_host<char>(draws), S * sizeof(int64_t));
  if (written > 0) {
    memcpy(op.history.data, c.on_host<char>(history), S * written * sizeof(int64_t));
    memcpy(op.counts.data, c.on_host<char>(counts), S * sizeof(int64_t));
  }
  *op.steps = c.on_host<int32_t>(state)[1];
}

}  // namespace pykern::cuda

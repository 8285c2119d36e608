#include "ops/lm_step.h"

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"lm_step"};

static int64_t at(const Tensor& t, int64_t i) {
  return static_cast<const int32_t*>(t.data)[i * t.stride[0]];
}

// What is said about the texts is read by the host, wherever the model is.
static void on_host(const Arg& a) {
  PYKERN_CHECK(value, !a.t.given || a.t.device == Device::cpu, c.op, ": ", a.name,
               " must be on the CPU, also where the model is not");
}

static void check_vector(const char* name, const Tensor& t, int64_t n, const Tensor& like) {
  const Arg a{name, t};
  c.same_dtype(a, {"embedding", like});
  c.rank(a, 1, "[n]");
  c.size(a, 0, n, "its width");
  c.contiguous(a);
}

static void check_weight(const char* name, const PackedWeight& w, int64_t N, int64_t K,
                         const Tensor& like) {
  const Arg panels{name, w.panels}, scales{name, w.scales};
  PYKERN_CHECK(value, w.panels.given && w.N == N && w.K == K, c.op, ": ", name, " is [", w.N, ", ",
               w.K, "], expected [", N, ", ", K, "]");
  c.contiguous(panels);
  if (w.panels.rank == 2) {  // rows, on CUDA
    c.same_dtype(panels, {"embedding", like});
    c.size(panels, 0, N, "its rows");
    c.size(panels, 1, K, "its columns");
    return;
  }
  PYKERN_CHECK(value, w.panels.rank >= 3, c.op, ": ", name, " is not packed");
  const bool bytes = w.kind != WeightKind::numbers;
  const int64_t nibbles = w.kind == WeightKind::int4 ? 2 : 1;
  int64_t W = w.panels.size[2] * nibbles;
  const int64_t units = w.panels.size[1] * (w.panels.rank == 4 ? 2 : 1);
  PYKERN_CHECK(value, W > 0 && w.panels.size[0] * W >= N && (w.panels.size[0] - 1) * W < N, c.op,
               ": ", name, " has ", w.panels.size[0], " panels of ", W, " for ", N, " rows");
  PYKERN_CHECK(value, units == K || (w.panels.rank == 4 && units == K + 1), c.op, ": ", name,
               " has panels of ", units, " numbers, expected ", K);
  if (!bytes) {
    c.same_dtype(panels, {"embedding", like});
    return;
  }
  c.dtype(panels, DType::u8);
  c.same_device(panels, {"embedding", like});
  c.same_device(scales, {"embedding", like});
  PYKERN_CHECK(type, like.dtype == DType::f32, c.op, ": ", name,
               " is quantised, which needs a float32 step");
  c.dtype(scales, DType::bf16);
  c.contiguous(scales);
  PYKERN_CHECK(value, w.group >= 16 && 128 % w.group == 0, c.op, ": ", name, " has groups of ",
               w.group, ", expected 16, 32, 64 or 128");
  const int64_t expected[] = {w.panels.size[0], (K + w.group - 1) / w.group, nibbles, W};
  PYKERN_CHECK(value, w.scales.given && w.scales.rank == 4, c.op, ": ", name, " has no scales");
  for (int i = 0; i < 4; ++i) c.size(scales, i, expected[i], "that of the panels");
}

static void check_layer(const LmModel& m, const LmLayer& layer, int64_t E) {
  const int64_t H = m.n_head, G = m.n_kv_head, D = m.head_size;
  check_vector("ln_1 weight", layer.ln_1_weight, E, m.embedding);
  check_vector("ln_1 bias", layer.ln_1_bias, E, m.embedding);
  check_vector("ln_2 weight", layer.ln_2_weight, E, m.embedding);
  check_vector("ln_2 bias", layer.ln_2_bias, E, m.embedding);
  check_weight("c_attn", layer.attn, (H + 2 * G) * D, E, m.embedding);
  check_weight("attn.c_proj", layer.proj, E, E, m.embedding);
  check_weight("c_fc", layer.up, m.hidden, E, m.embedding);
  check_weight("mlp.c_proj", layer.down, E, m.hidden, m.embedding);
  PYKERN_CHECK(value, layer.gate.panels.given == m.layers[0].gate.panels.given, c.op,
               ": gate is given in some layers only");
  if (layer.gate.panels.given) check_weight("c_gate", layer.gate, m.hidden, E, m.embedding);
  check_vector("c_attn bias", layer.attn_bias, (H + 2 * G) * D, m.embedding);
  check_vector("attn.c_proj bias", layer.proj_bias, E, m.embedding);
  check_vector("c_fc bias", layer.up_bias, m.hidden, m.embedding);
  check_vector("c_gate bias", layer.gate_bias, m.hidden, m.embedding);
  check_vector("mlp.c_proj bias", layer.down_bias, E, m.embedding);
  for (const Arg& cache : {Arg{"k_cache", layer.k_cache}, Arg{"v_cache", layer.v_cache}}) {
    PYKERN_CHECK(value, cache.t.given, c.op, ": ", cache.name, " is missing");
    if (layer.k_scale.given)
      c.dtype(cache, DType::u8);
    else
      c.same_dtype(cache, {"embedding", m.embedding});
    c.same_device(cache, {"embedding", m.embedding});
    c.rank(cache, 4, "[pages, G, page, D]");
    c.size(cache, 1, G, "n_kv_head");
    c.size(cache, 3, D, "head size");
    c.same_shape(cache, {"k_cache", m.layers[0].k_cache});
    c.unit_last(cache);
    c.output(cache);
    PYKERN_CHECK(value, cache.t.size[2] > 0, c.op, ": k_cache has pages of 0 keys");
  }
  PYKERN_CHECK(value, layer.k_scale.given == layer.v_scale.given, c.op,
               ": k_scale and v_scale must be given together");
  for (const Arg& scale : {Arg{"k_scale", layer.k_scale}, Arg{"v_scale", layer.v_scale}}) {
    c.dtype(scale, DType::f32);
    c.same_device(scale, {"embedding", m.embedding});
    c.rows_of(scale, {"k_cache", layer.k_cache});
    c.contiguous(scale);
    if (scale.t.given) c.output(scale);
  }
}

void check(const LmModel& m) {
  const Arg embedding{"embedding", m.embedding};
  PYKERN_CHECK(type, m.embedding.dtype == DType::f32 || m.embedding.dtype == DType::bf16, c.op,
               ": embedding has dtype ", name(m.embedding.dtype), ", expected float32 or bfloat16");
  c.rank(embedding, 2, "[V, E]");
  c.contiguous(embedding);
  c.size(embedding, 0, m.vocabulary, "vocabulary");
  const int64_t E = m.embedding.size[1], H = m.n_head, D = m.head_size;
  PYKERN_CHECK(value, H > 0 && m.n_kv_head > 0 && H % m.n_kv_head == 0 && H * D == E && D <= 1024,
               c.op, ": ", H, " heads of ", D, " and ", m.n_kv_head,
               " key heads do not make a width of ", E);
  const Arg positions{"positions", m.positions}, cos{"rotary_cos", m.rotary_cos};
  const Arg sin{"rotary_sin", m.rotary_sin}, slopes{"alibi_slopes", m.alibi_slopes};
  const Arg distance{"distance_bias", m.distance_bias};
  c.same_dtype(positions, embedding);
  c.rank(positions, 2, "[max_len, E]");
  c.size(positions, 0, m.max_len, "max_len");
  c.size(positions, 1, E, "width");
  PYKERN_CHECK(value, m.rotary_cos.given == m.rotary_sin.given, c.op,
               ": rotary_cos and rotary_sin must be given together");
  for (const Arg& table : {cos, sin}) {
    c.dtype(table, DType::f32);
    c.rank(table, 2, "[max_len, D / 2]");
    c.size(table, 0, m.max_len, "max_len");
    if (table.t.given)
      PYKERN_CHECK(value, 2 * table.t.size[1] == D, c.op, ": ", table.name, " has shape ",
                   shape(table.t), ", expected half of the head size ", D);
  }
  c.dtype(slopes, DType::f32);
  c.rank(slopes, 1, "[H]");
  c.size(slopes, 0, H, "heads");
  c.same_dtype(distance, embedding);
  c.rank(distance, 2, "[H, 2 max_len - 1]");
  c.size(distance, 0, H, "heads");
  c.size(distance, 1, 2 * m.max_len - 1, "2 max_len - 1");
  for (const Arg& table : {positions, cos, sin, slopes, distance}) {
    c.same_device(table, embedding);
    c.contiguous(table);
  }
  check_vector("ln_f weight", m.ln_f_weight, E, m.embedding);
  check_vector("ln_f bias", m.ln_f_bias, E, m.embedding);
  check_weight("head", m.head, m.vocabulary, E, m.embedding);
  PYKERN_CHECK(value, m.n_layer > 0, c.op, ": the model has no layers");
  for (int64_t i = 0; i < m.n_layer; ++i) check_layer(m, m.layers[i], E);
}

// Lengths, pages and rows of every text, which then gets `more` tokens in all.
static void check_texts(const LmStep& op, int64_t more) {
  const LmModel& m = *op.model;
  const Tensor &cache = m.layers[0].k_cache, &table = op.block_table;
  const int64_t S = op.lengths.size[0], R = op.tokens.size[0], page = cache.size[2];
  PYKERN_CHECK(value, at(op.first_rows, 0) == 0 && at(op.first_rows, S) == R, c.op,
               ": first_rows must go from 0 to the ", R, " rows of tokens");
  for (int64_t s = 0; s < S; ++s) {
    const int64_t length = at(op.lengths, s);
    const int64_t rows = at(op.first_rows, s + 1) - at(op.first_rows, s);
    PYKERN_CHECK(value, rows > 0 && at(op.first_rows, s + 1) <= R, c.op, ": text ", s, " has ",
                 rows, " new tokens");
    const int64_t end = length + rows + more;
    PYKERN_CHECK(index, length >= 0 && length <= m.max_len, c.op, ": lengths[", s, "] is ", length,
                 ", expected 0..", m.max_len);
    PYKERN_CHECK(value, end <= m.max_len && end <= page * table.size[1], c.op,
                 ": the cache is full: text ", s, " holds ", length, " tokens and ", rows + more,
                 " follow, but there is room for ",
                 page * table.size[1] < m.max_len ? page * table.size[1] : m.max_len);
    for (int64_t i = 0; i * page < end; ++i) {
      const int64_t id =
          static_cast<const int32_t*>(table.data)[s * table.stride[0] + i * table.stride[1]];
      PYKERN_CHECK(index, id >= 0 && id < cache.size[0], c.op, ": block_table[", s, ", ", i,
                   "] is ", id, ", expected 0..", cache.size[0] - 1);
    }
  }
}

static void check_step(const LmStep& op, int64_t more) {
  const LmModel& m = *op.model;
  const Arg tokens{"tokens", op.tokens}, first_rows{"first_rows", op.first_rows};
  const Arg lengths{"lengths", op.lengths}, table{"block_table", op.block_table};
  const Arg logits{"logits", op.logits};
  c.dtype(tokens, DType::i64);
  c.rank(tokens, 1, "[R]");
  c.contiguous(tokens);
  c.dtype(lengths, DType::i32);
  c.rank(lengths, 1, "[S]");
  const int64_t S = op.lengths.size[0], R = op.tokens.size[0];
  PYKERN_CHECK(value, S > 0, c.op, ": there are no texts");
  c.dtype(first_rows, DType::i32);
  c.rank(first_rows, 1, "[S + 1]");
  c.size(first_rows, 0, S + 1, "texts and one");
  c.dtype(table, DType::i32);
  c.rank(table, 2, "[S, pages of a text]");
  c.size(table, 0, S, "texts");
  for (const Arg& a : {tokens, first_rows, lengths, table}) on_host(a);
  if (op.logits.given) {
    c.same_dtype(logits, {"embedding", m.embedding});
    c.rank(logits, 2, "[R, V] or [S, V]");
    PYKERN_CHECK(value, op.logits.size[0] == R || op.logits.size[0] == S, c.op, ": logits have ",
                 op.logits.size[0], " rows, expected ", R, " or ", S);
    c.size(logits, 1, m.vocabulary, "vocabulary");
    c.unit_last(logits);
    c.output(logits);
  }
  check_texts(op, more);
  c.indices(tokens, m.vocabulary, "the embedding");
}

void check(const LmStep& op) { check_step(op, 0); }

void check(const LmGenerate& op) {
  const Arg ids{"ids", op.ids}, seeds{"seeds", op.seeds}, draws{"draws", op.draws};
  const Arg history{"history", op.history}, counts{"counts", op.counts};
  const Arg stop{"stop_tokens", op.stop_tokens}, tokens{"tokens", op.step.tokens};
  c.rank(ids, 2, "[S, K]");
  check_step(op.step, op.ids.size[1] - 1);
  const int64_t S = op.step.lengths.size[0], K = op.ids.size[1];
  PYKERN_CHECK(value, op.step.tokens.size[0] == S, c.op, ": every text must have one new token");
  PYKERN_CHECK(value, K >= 1, c.op, ": ids have no columns");
  PYKERN_CHECK(value, !op.step.logits.given, c.op, ": lm_generate gives no logits");
  c.size(ids, 0, S, "texts");
  for (const Arg& a : {ids, seeds, draws, history, counts, stop}) {
    c.dtype(a, DType::i64);
    on_host(a);
    c.contiguous(a);
  }
  for (const Arg& a : {seeds, draws, counts}) {
    c.rank(a, 1, "[S]");
    c.size(a, 0, S, "texts");
  }
  c.rank(stop, 1, "[n]");
  PYKERN_CHECK(value, op.history.given == op.counts.given, c.op,
               ": history and counts must be given together");
  if (op.history.given) {
    c.rank(history, 2, "[S, n]");
    c.size(history, 0, S, "texts");
    check_history(c.op, op.history, op.counts, K, op.step.model->vocabulary);
  }
  for (const Arg& a : {ids, draws, history, counts}) c.output(a);
  c.disjoint({ids, draws, history, counts}, {tokens, seeds, stop});
  check(op.options, c.op);
}

}  // namespace pykern

#include "ops/attention.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"attention"};

static void check_head_sizes(const AttentionInputs& op) {
  const int64_t H = op.q.size[1], D = op.q.size[3], G = op.k.size[1], S = op.k.size[2];
  PYKERN_CHECK(value, op.k.size[3] == D, "attention: k has head size ", op.k.size[3], " but q has ",
               D);
  PYKERN_CHECK(value, op.v.size[1] == G, "attention: v has ", op.v.size[1], " heads but k has ", G);
  PYKERN_CHECK(value, op.v.size[2] == S, "attention: v has ", op.v.size[2], " keys but k has ", S);
  PYKERN_CHECK(value, H == 0 || (G > 0 && H % G == 0), "attention: q has ", H,
               " heads, which is not a multiple of the ", G, " heads of k");
  PYKERN_CHECK(value, D >= 1 && D <= 1024 && op.v.size[3] <= 1024, "attention: head sizes ", D,
               " and ", op.v.size[3], " must be 1..1024");
}

static void check_options(const AttentionInputs& op) {
  PYKERN_CHECK(value, std::isfinite(op.scale), "attention: scale is ", op.scale,
               ", expected a finite number");
  PYKERN_CHECK(value, std::isfinite(op.softcap) && op.softcap >= 0, "attention: softcap is ",
               op.softcap, ", expected a positive number, or 0 for none");
  PYKERN_CHECK(value, op.left >= -1 && op.right >= -1, "attention: window is (", op.left, ", ",
               op.right, "), expected numbers of keys, or None for no limit");
}

static void check_dropout(const Tensor& seed, double p, Arg where) {
  PYKERN_CHECK(value, p >= 0 && p <= 1, "attention: dropout_p is ", p, ", expected 0..1");
  PYKERN_CHECK(value, p == 0 || seed.given, "attention: dropout_p is ", p, " without a seed");
  if (!seed.given) return;
  c.dtype({"seed", seed}, DType::i64);
  c.same_device({"seed", seed}, where);
  PYKERN_CHECK(value, count(seed) == 1, "attention: seed has shape ", shape(seed),
               ", expected one element");
}

// The sequences' offsets into the rows of q or k: from 0 up to their number, never down.
static void check_offsets(Arg offsets, int64_t total, const char* rows_of) {
  const int32_t* at = static_cast<const int32_t*>(offsets.t.data);
  const int64_t n = offsets.t.size[0], stride = offsets.t.stride[0];
  PYKERN_CHECK(value, at[0] == 0, "attention: ", offsets.name, "[0] is ", at[0], ", expected 0");
  for (int64_t i = 1; i < n; ++i)
    PYKERN_CHECK(value, at[i * stride] >= at[(i - 1) * stride], "attention: ", offsets.name, "[", i,
                 "] is ", at[i * stride], ", less than the ", at[(i - 1) * stride], " before it");
  PYKERN_CHECK(value, at[(n - 1) * stride] == total, "attention: ", offsets.name, " ends with ",
               at[(n - 1) * stride], ", expected the ", total, " rows of ", rows_of);
}

static void check_ragged(const AttentionInputs& op) {
  const Arg cu_q{"cu_seqlens_q", op.cu_seqlens_q}, cu_k{"cu_seqlens_k", op.cu_seqlens_k};
  PYKERN_CHECK(value, cu_q.t.given == cu_k.t.given,
               "attention: cu_seqlens_q and cu_seqlens_k must be given together");
  if (!cu_q.t.given) return;
  PYKERN_CHECK(value, !op.mask.given && !op.bias.given,
               "attention: mask and bias cannot be combined with cu_seqlens_q");
  c.size({"q", op.q}, 0, 1, "one batch of packed sequences");
  for (const Arg& cu : {cu_q, cu_k}) {
    c.dtype(cu, DType::i32);
    c.same_device(cu, {"q", op.q});
    c.rank(cu, 1, "[sequences + 1]");
    PYKERN_CHECK(value, cu.t.size[0] >= 1, "attention: ", cu.name,
                 " is empty, expected sequences + 1 numbers");
  }
  c.size(cu_k, 0, cu_q.t.size[0], "that of cu_seqlens_q");
  if (op.q.device != Device::cpu) return;
  check_offsets(cu_q, op.q.size[2], "q");
  check_offsets(cu_k, op.k.size[2], "k");
}

static void check_inputs(const AttentionInputs& op) {
  const Arg q{"q", op.q}, k{"k", op.k}, v{"v", op.v}, mask{"mask", op.mask}, bias{"bias", op.bias};
  const Arg slopes{"alibi_slopes", op.alibi_slopes}, sinks{"sinks", op.sinks};
  c.floating(q);
  c.rank(q, 4, "[B, H, T, D]");
  c.rank(k, 4, "[B, G, S, D]");
  c.rank(v, 4, "[B, G, S, E]");
  for (const Arg& a : {k, v, bias, sinks}) c.same_dtype(a, q);
  const int64_t expected[] = {op.q.size[0], op.q.size[1], op.q.size[2], op.k.size[2]};
  c.size(k, 0, expected[0], "batch");
  c.size(v, 0, expected[0], "batch");
  check_head_sizes(op);
  for (const Arg& a : {q, k, v}) c.unit_last(a);
  for (const Arg& a : {mask, bias}) {
    if (!a.t.given) continue;
    c.rank(a, 4, "expanded to [B, H, T, S]");
    for (int i = 0; i < 4; ++i)
      PYKERN_CHECK(value, a.t.size[i] == expected[i], "attention: ", a.name, " has shape ",
                   shape(a.t), ", expected [", expected[0], ", ", expected[1], ", ", expected[2],
                   ", ", expected[3], "]");
  }
  c.dtype(mask, DType::b8);
  c.same_device(mask, q);
  check_ragged(op);
  const int64_t sequences = op.cu_seqlens_q.given ? op.cu_seqlens_q.size[0] - 1 : expected[0];
  if (op.alibi_slopes.given) {
    c.dtype(slopes, DType::f32);
    c.same_device(slopes, q);
    c.rank(slopes, 2, "[B, H]");
    c.size(slopes, 0, sequences, "batch");
    c.size(slopes, 1, expected[1], "heads of q");
  }
  if (op.sinks.given) {
    c.rank(sinks, 1, "[H]");
    c.size(sinks, 0, expected[1], "heads of q");
  }
  check_options(op);
  check_dropout(op.seed, op.dropout_p, q);
}

// [B, H, T, E] like out and [B, H, T] like lse, float32 or float64
static void check_results(Arg out, Arg lse, const AttentionInputs& op) {
  const Arg q{"q", op.q};
  c.same_dtype(out, q);
  c.rank(out, 4, "[B, H, T, E]");
  for (int i = 0; i < 3; ++i) c.size(out, i, op.q.size[i], "that of q");
  c.size(out, 3, op.v.size[3], "head size of v");
  c.unit_last(out);
  if (!lse.t.given) return;
  if (lse.t.dtype != DType::f64) c.dtype(lse, stat_dtype(op.q.dtype));
  c.same_device(lse, q);
  c.rows_of(lse, q);
}

void check(const AttentionForward& op) {
  const Arg out{"out", op.out}, lse{"lse", op.lse};
  check_inputs(op);
  check_results(out, lse, op);
  c.output(out);
  c.output(lse);
  c.disjoint({out, lse}, {{"q", op.q},
                          {"k", op.k},
                          {"v", op.v},
                          {"mask", op.mask},
                          {"bias", op.bias},
                          {"alibi_slopes", op.alibi_slopes},
                          {"sinks", op.sinks},
                          {"cu_seqlens_q", op.cu_seqlens_q},
                          {"cu_seqlens_k", op.cu_seqlens_k},
                          {"seed", op.seed}});
}

static void check_bias_gradient(const AttentionBackward& op) {
  const Arg dbias{"dbias", op.dbias};
  if (!op.dbias.given) return;
  PYKERN_CHECK(value, op.bias.given, "attention: dbias is given without bias");
  c.same_dtype(dbias, {"q", op.q});
  c.rank(dbias, 4, "[B, H, T, S], sizes of 1 allowed");
  for (int i = 0; i < 4; ++i)
    PYKERN_CHECK(value, op.dbias.size[i] == op.bias.size[i] || op.dbias.size[i] == 1,
                 "attention: dbias has shape ", shape(op.dbias), ", which does not broadcast to ",
                 shape(op.bias));
  c.output(dbias);
}

void check(const AttentionBackward& op) {
  const Arg q{"q", op.q}, k{"k", op.k}, v{"v", op.v}, mask{"mask", op.mask}, bias{"bias", op.bias};
  const Arg slopes{"alibi_slopes", op.alibi_slopes}, sinks{"sinks", op.sinks};
  const Arg out{"out", op.out}, lse{"lse", op.lse}, dout{"dout", op.dout}, dlse{"dlse", op.dlse};
  const Arg dq{"dq", op.dq}, dk{"dk", op.dk}, dv{"dv", op.dv};
  const Arg dbias{"dbias", op.dbias}, dsinks{"dsinks", op.dsinks};
  check_inputs(op);
  check_results(out, lse, op);
  check_results(dout, dlse, op);
  const Arg pairs[][2] = {{dq, q}, {dk, k}, {dv, v}};
  for (const auto& [gradient, input] : pairs) {
    c.same_dtype(gradient, q);
    c.same_shape(gradient, input);
    c.unit_last(gradient);
    c.output(gradient);
  }
  check_bias_gradient(op);
  if (op.dsinks.given) {
    PYKERN_CHECK(value, op.sinks.given, "attention: dsinks is given without sinks");
    c.same_dtype(dsinks, q);
    c.same_shape(dsinks, sinks);
    c.output(dsinks);
  }
  c.disjoint({dq, dk, dv, dbias, dsinks}, {q,
                                           k,
                                           v,
                                           mask,
                                           bias,
                                           slopes,
                                           sinks,
                                           out,
                                           lse,
                                           dout,
                                           dlse,
                                           {"cu_seqlens_q", op.cu_seqlens_q},
                                           {"cu_seqlens_k", op.cu_seqlens_k},
                                           {"seed", op.seed}});
}

void check(const AttentionWeights& op) {
  const Arg q{"q", op.q}, lse{"lse", op.lse}, rows{"rows", op.rows}, weights{"weights", op.weights};
  check_inputs(op);
  PYKERN_CHECK(value, !op.cu_seqlens_q.given,
               "attention: weights are not given for ragged batches (cu_seqlens_q)");
  if (lse.t.dtype != DType::f64) c.dtype(lse, stat_dtype(op.q.dtype));
  c.same_device(lse, q);
  c.rows_of(lse, q);
  c.same_dtype(weights, q);
  c.rank(weights, 4, "[B, H, rows, S]");
  c.size(weights, 0, op.q.size[0], "batch");
  c.size(weights, 1, op.q.size[1], "heads of q");
  c.size(weights, 3, op.k.size[2], "keys");
  c.unit_last(weights);
  c.output(weights);
  c.disjoint({weights}, {q,
                         {"k", op.k},
                         {"v", op.v},
                         {"mask", op.mask},
                         {"bias", op.bias},
                         {"alibi_slopes", op.alibi_slopes},
                         lse,
                         rows});
  if (!op.rows.given) {
    c.size(weights, 2, op.q.size[2], "queries");
    return;
  }
  c.dtype(rows, DType::i64);
  c.same_device(rows, q);
  c.rank(rows, 1, "[rows]");
  c.size(weights, 2, op.rows.size[0], "that of rows");
  if (op.q.device == Device::cpu) c.indices(rows, op.q.size[2], "q");
}

void check(const AttentionDropout& op) {
  const Arg keep{"keep", op.keep};
  c.dtype(keep, DType::b8);
  c.rank(keep, 4, "[B, H, T, S]");
  c.contiguous(keep);
  c.output(keep);
  check_dropout(op.seed, op.dropout_p, keep);
}

}  // namespace pykern

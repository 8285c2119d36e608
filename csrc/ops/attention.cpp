#include "ops/attention.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"attention"};

static void check_inputs(Arg q, Arg k, Arg v, Arg mask, Arg bias, double scale) {
  c.floating(q);
  c.rank(q, 4, "[B, H, T, D]");
  c.rank(k, 4, "[B, G, S, D]");
  c.rank(v, 4, "[B, G, S, E]");
  for (const Arg& a : {k, v, bias}) c.same_dtype(a, q);
  const int64_t B = q.t.size[0], H = q.t.size[1], T = q.t.size[2], D = q.t.size[3];
  const int64_t G = k.t.size[1], S = k.t.size[2];
  c.size(k, 0, B, "batch");
  c.size(v, 0, B, "batch");
  PYKERN_CHECK(value, k.t.size[3] == D, "attention: k has head size ", k.t.size[3], " but q has ",
               D);
  PYKERN_CHECK(value, v.t.size[1] == G, "attention: v has ", v.t.size[1], " heads but k has ", G);
  PYKERN_CHECK(value, v.t.size[2] == S, "attention: v has ", v.t.size[2], " keys but k has ", S);
  PYKERN_CHECK(value, H == 0 || (G > 0 && H % G == 0), "attention: q has ", H,
               " heads, which is not a multiple of the ", G, " heads of k");
  PYKERN_CHECK(value, D >= 1 && D <= 1024 && v.t.size[3] <= 1024, "attention: head sizes ", D,
               " and ", v.t.size[3], " must be 1..1024");
  for (const Arg& a : {q, k, v}) c.unit_last(a);
  for (const Arg& a : {mask, bias}) {
    if (!a.t.given) continue;
    c.rank(a, 4, "expanded to [B, H, T, S]");
    const int64_t expected[] = {B, H, T, S};
    for (int i = 0; i < 4; ++i)
      PYKERN_CHECK(value, a.t.size[i] == expected[i], "attention: ", a.name, " has shape ",
                   shape(a.t), ", expected [", B, ", ", H, ", ", T, ", ", S, "]");
  }
  c.dtype(mask, DType::b8);
  c.same_device(mask, q);
  PYKERN_CHECK(value, std::isfinite(scale), "attention: scale is ", scale,
               ", expected a finite number");
}

// out [B, H, T, E] and lse [B, H, T], float32 or float64
static void check_results(Arg out, Arg lse, Arg q, Arg v) {
  c.same_dtype(out, q);
  c.rank(out, 4, "[B, H, T, E]");
  for (int i = 0; i < 3; ++i) c.size(out, i, q.t.size[i], "that of q");
  c.size(out, 3, v.t.size[3], "head size of v");
  c.unit_last(out);
  if (lse.t.dtype != DType::f64) c.dtype(lse, stat_dtype(q.t.dtype));
  c.same_device(lse, q);
  c.rows_of(lse, q);
}

void check(const AttentionForward& op) {
  const Arg q{"q", op.q}, k{"k", op.k}, v{"v", op.v}, mask{"mask", op.mask}, bias{"bias", op.bias};
  const Arg out{"out", op.out}, lse{"lse", op.lse};
  check_inputs(q, k, v, mask, bias, op.scale);
  check_results(out, lse, q, v);
  c.output(out);
  c.output(lse);
  c.disjoint({out, lse}, {q, k, v, mask, bias});
}

void check(const AttentionBackward& op) {
  const Arg q{"q", op.q}, k{"k", op.k}, v{"v", op.v}, mask{"mask", op.mask}, bias{"bias", op.bias};
  const Arg out{"out", op.out}, lse{"lse", op.lse}, dout{"dout", op.dout}, dlse{"dlse", op.dlse};
  const Arg dq{"dq", op.dq}, dk{"dk", op.dk}, dv{"dv", op.dv}, dbias{"dbias", op.dbias};
  check_inputs(q, k, v, mask, bias, op.scale);
  check_results(out, lse, q, v);
  check_results(dout, dlse, q, v);
  const Arg pairs[][2] = {{dq, q}, {dk, k}, {dv, v}};
  for (const auto& [gradient, input] : pairs) {
    c.same_dtype(gradient, q);
    c.same_shape(gradient, input);
    c.unit_last(gradient);
    c.output(gradient);
  }
  if (op.dbias.given) {
    PYKERN_CHECK(value, op.bias.given, "attention: dbias is given without bias");
    c.same_dtype(dbias, q);
    c.rank(dbias, 4, "[B, H, T, S], sizes of 1 allowed");
    for (int i = 0; i < 4; ++i)
      PYKERN_CHECK(value, op.dbias.size[i] == op.bias.size[i] || op.dbias.size[i] == 1,
                   "attention: dbias has shape ", shape(op.dbias), ", which does not broadcast to ",
                   shape(op.bias));
    c.output(dbias);
  }
  c.disjoint({dq, dk, dv, dbias}, {q, k, v, mask, bias, out, lse, dout, dlse});
}

}  // namespace pykern

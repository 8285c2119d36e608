#include "ops/mlp.h"

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"mlp"};

static int64_t columns(const Tensor& t) { return t.size[t.rank - 1]; }

// a matrix [n, k] that multiplies x
static void check_weight(Arg a, Arg x, const char* layout, int64_t n, int64_t k) {
  if (!a.t.given) return;
  c.same_dtype_or_float(a, x);
  c.rank(a, 2, layout);
  c.size(a, 0, n, "outputs");
  c.size(a, 1, k, "inputs");
  c.row_strided(a);
}

static void check_bias(Arg a, Arg x, int64_t n) {
  c.same_dtype_or_float(a, x);
  c.rank(a, 1, "a vector");
  c.size(a, 0, n, "outputs");
  c.unit_last(a);
}

// a [..., n] with the leading dimensions of x
static void check_rows(Arg a, Arg x, int64_t n) {
  if (!a.t.given) return;
  bool same = a.t.rank == x.t.rank && columns(a.t) == n;
  for (int i = 0; same && i + 1 < a.t.rank; ++i) same = a.t.size[i] == x.t.size[i];
  PYKERN_CHECK(value, same, "mlp: ", a.name, " has shape ", shape(a.t),
               ", expected the leading dimensions of x ", shape(x.t), " and ", n);
  c.row_strided(a);
}

static void check_operands(Arg x, Arg up_weight, Arg gate_weight, Arg down_weight) {
  c.floating(x);
  PYKERN_CHECK(value, x.t.rank >= 1, "mlp: x must be [..., K], got a scalar");
  c.row_strided(x);
  c.rank(up_weight, 2, "[H, K]");
  c.rank(down_weight, 2, "[N, H]");
  const int64_t H = up_weight.t.size[0], K = columns(x.t);
  check_weight(up_weight, x, "[H, K]", H, K);
  check_weight(gate_weight, x, "[H, K]", H, K);
  check_weight(down_weight, x, "[N, H]", down_weight.t.size[0], H);
}

static void check_pair(Arg gradient, Arg weight) {
  c.same_dtype(gradient, weight);
  c.same_shape(gradient, weight);
  c.unit_last(gradient);
}

void check(const MlpForward& op) {
  const Arg x{"x", op.x}, up_weight{"up_weight", op.up_weight}, up_bias{"up_bias", op.up_bias},
      gate_weight{"gate_weight", op.gate_weight}, gate_bias{"gate_bias", op.gate_bias},
      down_weight{"down_weight", op.down_weight}, down_bias{"down_bias", op.down_bias},
      residual{"residual", op.residual}, out{"out", op.out}, up{"up", op.up}, gate{"gate", op.gate};
  check_operands(x, up_weight, gate_weight, down_weight);
  const int64_t H = op.up_weight.size[0], N = op.down_weight.size[0];
  PYKERN_CHECK(value, op.gate_weight.given || !op.gate_bias.given,
               "mlp: gate_bias is given without gate_weight");
  PYKERN_CHECK(value, op.gate_weight.given ? op.up.given == op.gate.given : !op.gate.given,
               "mlp: gate must be given with up when there is a gate_weight, and only then");
  check_bias(up_bias, x, H);
  check_bias(gate_bias, x, H);
  check_bias(down_bias, x, N);
  c.same_dtype_or_float(residual, x);
  c.same_dtype(out, op.residual.given ? residual : x);
  for (const Arg& a : {residual, out}) check_rows(a, x, N);
  for (const Arg& a : {up, gate}) {
    c.same_dtype(a, x);
    check_rows(a, x, H);
  }
  for (const Arg& a : {out, up, gate}) c.output(a);
  c.disjoint({out, up, gate},
             {x, up_weight, up_bias, gate_weight, gate_bias, down_weight, down_bias, residual});
}

void check(const MlpBackward& op) {
  const Arg x{"x", op.x}, up_weight{"up_weight", op.up_weight},
      gate_weight{"gate_weight", op.gate_weight}, down_weight{"down_weight", op.down_weight},
      up{"up", op.up}, gate{"gate", op.gate}, dout{"dout", op.dout}, dx{"dx", op.dx},
      dup_weight{"dup_weight", op.dup_weight}, dup_bias{"dup_bias", op.dup_bias},
      dgate_weight{"dgate_weight", op.dgate_weight}, dgate_bias{"dgate_bias", op.dgate_bias},
      ddown_weight{"ddown_weight", op.ddown_weight}, ddown_bias{"ddown_bias", op.ddown_bias};
  check_operands(x, up_weight, gate_weight, down_weight);
  const int64_t H = op.up_weight.size[0], N = op.down_weight.size[0];
  PYKERN_CHECK(value, op.gate.given == op.gate_weight.given,
               "mlp: gate must be given with gate_weight, and only then");
  PYKERN_CHECK(value, op.gate.given || !(op.dgate_weight.given || op.dgate_bias.given),
               "mlp: gradients of a gate are wanted without gate_weight");
  for (const Arg& a : {up, gate}) {
    c.same_dtype(a, x);
    check_rows(a, x, H);
  }
  c.same_dtype_or_float(dout, x);
  check_rows(dout, x, N);
  check_pair(dx, x);
  check_pair(dup_weight, up_weight);
  check_pair(dgate_weight, gate_weight);
  check_pair(ddown_weight, down_weight);
  check_bias(dup_bias, x, H);
  check_bias(dgate_bias, x, H);
  check_bias(ddown_bias, x, N);
  for (const Arg& a :
       {dx, dup_weight, dup_bias, dgate_weight, dgate_bias, ddown_weight, ddown_bias})
    c.output(a);
  c.disjoint({dx, dup_weight, dup_bias, dgate_weight, dgate_bias, ddown_weight, ddown_bias},
             {x, up_weight, gate_weight, down_weight, up, gate, dout});
}

}  // namespace pykern

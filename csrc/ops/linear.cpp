#include "ops/linear.h"

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"linear"};

// x [..., K] and weight [N, K]: rows at one constant stride
static void check_operands(Arg x, Arg weight) {
  c.floating(x);
  c.same_dtype_or_float(weight, x);
  PYKERN_CHECK(value, x.t.rank >= 1, "linear: x must be [..., K], got a scalar");
  c.rank(weight, 2, "[N, K]");
  const int64_t K = x.t.size[x.t.rank - 1];
  PYKERN_CHECK(value, weight.t.size[1] == K, "linear: weight has shape ", shape(weight.t),
               " but x has ", K, " inputs");
  c.row_strided(x);
  c.row_strided(weight);
}

// a [..., N] with the leading dimensions of x
static void check_rows(Arg a, Arg x, int64_t N) {
  if (!a.t.given) return;
  bool same = a.t.rank == x.t.rank && a.t.size[a.t.rank - 1] == N;
  for (int i = 0; same && i + 1 < a.t.rank; ++i) same = a.t.size[i] == x.t.size[i];
  PYKERN_CHECK(value, same, "linear: ", a.name, " has shape ", shape(a.t),
               ", expected the leading dimensions of x ", shape(x.t), " and ", N);
  c.unit_last(a);
}

static void check_vector(Arg a, Arg x, int64_t n, const char* meaning) {
  c.same_dtype_or_float(a, x);
  c.rank(a, 1, "[N]");
  c.size(a, 0, n, meaning);
  c.unit_last(a);
}

void check(const LinearForward& op) {
  const Arg x{"x", op.x}, weight{"weight", op.weight}, bias{"bias", op.bias};
  const Arg residual{"residual", op.residual}, out{"out", op.out}, pre{"pre", op.pre};
  check_operands(x, weight);
  const int64_t N = op.weight.size[0];
  check_vector(bias, x, N, "N");
  c.same_dtype_or_float(residual, x);
  c.same_dtype(out, op.residual.given ? residual : x);
  c.same_dtype(pre, x);
  for (const Arg& a : {residual, out, pre}) check_rows(a, x, N);
  for (const Arg& a : {out, pre}) c.output(a);
  c.disjoint({out, pre}, {x, weight, bias, residual});
}

void check(const LinearBackward& op) {
  const Arg x{"x", op.x}, weight{"weight", op.weight}, pre{"pre", op.pre}, dout{"dout", op.dout};
  const Arg dx{"dx", op.dx}, dweight{"dweight", op.dweight}, dbias{"dbias", op.dbias};
  check_operands(x, weight);
  const int64_t N = op.weight.size[0];
  c.same_dtype_or_float(dout, x);
  c.same_dtype(pre, x);
  check_rows(dout, x, N);
  c.row_strided(dout);
  check_rows(pre, x, N);
  PYKERN_CHECK(value, op.pre.given || op.activation == Activation::none,
               "linear: pre is needed for the gradient of an activation");
  c.same_dtype(dx, x);
  c.same_shape(dx, x);
  c.unit_last(dx);
  c.same_dtype(dweight, weight);
  c.same_shape(dweight, weight);
  c.unit_last(dweight);
  check_vector(dbias, x, N, "N");
  for (const Arg& a : {dx, dweight, dbias}) c.output(a);
  c.disjoint({dx, dweight, dbias}, {x, weight, pre, dout});
}

}  // namespace pykern

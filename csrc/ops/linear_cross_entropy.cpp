#include "ops/check.h"
#include "ops/cross_entropy.h"

namespace pykern {

static constexpr Checker c{"linear_cross_entropy"};

static void check_stat_vector(Arg a, Arg x) {
  c.dtype(a, stat_dtype(x.t.dtype));
  c.same_device(a, x);
  c.rank(a, 1, "[M]");
  c.size(a, 0, x.t.size[0], "rows of x");
}

static void check_bias(Arg a, Arg x, Arg weight) {
  c.same_dtype_or_float(a, x);
  c.rank(a, 1, "[V]");
  c.size(a, 0, weight.t.size[0], "classes of weight");
  c.unit_last(a);
}

void check(const LinearCrossEntropy& op) {
  const Arg x{"x", op.x}, weight{"weight", op.weight}, bias{"bias", op.bias},
      target{"target", op.target}, loss{"loss", op.loss}, dloss{"dloss", op.dloss}, dx{"dx", op.dx},
      dweight{"dweight", op.dweight}, dbias{"dbias", op.dbias};
  c.floating(x);
  c.rank(x, 2, "[M, K]");
  c.same_dtype_or_float(weight, x);
  c.rank(weight, 2, "[V, K]");
  c.size(weight, 1, x.t.size[1], "inputs of x");
  for (const Arg& a : {x, weight}) c.unit_last(a);
  check_bias(bias, x, weight);
  c.dtype(target, DType::i64);
  c.same_device(target, x);
  c.rank(target, 1, "[M]");
  c.size(target, 0, x.t.size[0], "rows of x");
  for (const Arg& a : {loss, dloss}) check_stat_vector(a, x);
  PYKERN_CHECK(value, op.dloss.given || !(op.dx.given || op.dweight.given || op.dbias.given),
               "linear_cross_entropy: dloss is needed for gradients");
  c.same_dtype(dx, x);
  c.same_shape(dx, x);
  c.same_dtype(dweight, weight);
  c.same_shape(dweight, weight);
  check_bias(dbias, x, weight);
  for (const Arg& a : {dx, dweight}) c.unit_last(a);
  for (const Arg& a : {loss, dx, dweight, dbias}) c.output(a);
  c.disjoint({loss, dx, dweight, dbias}, {x, weight, bias, target, dloss});
  check_labels("linear_cross_entropy", target.t, weight.t.size[0], op.options);
}

}  // namespace pykern

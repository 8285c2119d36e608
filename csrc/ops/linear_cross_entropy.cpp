#include "ops/check.h"
#include "ops/cross_entropy.h"

namespace pykern {

static constexpr Checker c{"linear_cross_entropy"};

static void check_stat_vector(Arg a, Arg x) {
  if (a.t.dtype != DType::f64) c.dtype(a, stat_dtype(x.t.dtype));
  c.same_device(a, x);
  c.rank(a, 1, "[M]");
  c.size(a, 0, x.t.size[0], "rows of x");
}

static void check_inputs(Arg x, Arg weight, Arg bias, Arg target, Arg lse,
                         const CrossEntropyOptions& options) {
  c.floating(x);
  c.rank(x, 2, "[M, K]");
  c.same_dtype(weight, x);
  c.rank(weight, 2, "[V, K]");
  c.size(weight, 1, x.t.size[1], "inputs of x");
  c.same_dtype(bias, x);
  c.rank(bias, 1, "[V]");
  c.size(bias, 0, weight.t.size[0], "classes of weight");
  for (const Arg& a : {x, weight, bias}) c.unit_last(a);
  c.dtype(target, DType::i64);
  c.same_device(target, x);
  c.rank(target, 1, "[M]");
  c.size(target, 0, x.t.size[0], "rows of x");
  check_stat_vector(lse, x);
  check_labels("linear_cross_entropy", target.t, weight.t.size[0], options);
}

void check(const LinearCrossEntropyForward& op) {
  const Arg x{"x", op.x}, weight{"weight", op.weight}, bias{"bias", op.bias},
      target{"target", op.target}, loss{"loss", op.loss}, lse{"lse", op.lse};
  check_inputs(x, weight, bias, target, lse, op.options);
  check_stat_vector(loss, x);
  for (const Arg& a : {loss, lse}) c.output(a);
  c.disjoint({loss, lse}, {x, weight, bias, target});
}

void check(const LinearCrossEntropyBackward& op) {
  const Arg x{"x", op.x}, weight{"weight", op.weight}, bias{"bias", op.bias},
      target{"target", op.target}, lse{"lse", op.lse}, dloss{"dloss", op.dloss};
  const Arg dx{"dx", op.dx}, dweight{"dweight", op.dweight}, dbias{"dbias", op.dbias};
  check_inputs(x, weight, bias, target, lse, op.options);
  check_stat_vector(dloss, x);
  const Arg pairs[][2] = {{dx, x}, {dweight, weight}};
  for (const auto& [gradient, input] : pairs) {
    c.same_dtype(gradient, x);
    c.same_shape(gradient, input);
  }
  c.same_dtype(dbias, x);
  c.rank(dbias, 1, "[V]");
  c.size(dbias, 0, op.weight.size[0], "classes of weight");
  for (const Arg& a : {dx, dweight, dbias}) {
    c.unit_last(a);
    c.output(a);
  }
  c.disjoint({dx, dweight, dbias}, {x, weight, bias, target, lse, dloss});
}

}  // namespace pykern

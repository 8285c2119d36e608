#include "ops/adamw.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

static void check_not_negative(const char* option, double value) {
  PYKERN_CHECK(value, std::isfinite(value) && value >= 0.0, "adamw: ", option, " is ", value,
               ", expected a finite number >= 0");
}

static void check_beta(const char* option, double value) {
  PYKERN_CHECK(value, value >= 0.0 && value < 1.0, "adamw: ", option, " is ", value,
               ", expected 0 <= ", option, " < 1");
}

static void check_state(const Checker& c, const AdamWState& state, Arg scale) {
  const Arg param{"param", state.param}, grad{"grad", state.grad}, m{"exp_avg", state.exp_avg},
      v{"exp_avg_sq", state.exp_avg_sq}, master{"master", state.master};
  c.floating(param);
  c.same_dtype(grad, param);
  const DType stat = stat_dtype(state.param.dtype);
  PYKERN_CHECK(value, !state.master.given || state.param.dtype != stat,
               "adamw: master is for bfloat16 and float16 parameters, param has dtype ",
               name(state.param.dtype));
  for (const Arg& a : {m, v, master}) {
    c.dtype(a, stat);
    c.same_device(a, param);
  }
  c.same_device(scale, param);
  for (const Arg& a : {grad, m, v, master}) c.same_shape(a, param);
  for (const Arg& a : {param, grad, m, v, master}) c.unit_last(a);
  for (const Arg& a : {param, m, v, master}) c.output(a);
  c.disjoint({param, m, v, master}, {grad, scale});
}

void check(const AdamW& op) {
  const Checker c{"adamw"};
  const Arg scale{"scale", op.scale};
  c.dtype(scale, DType::f64);
  c.rank(scale, 1, "[1]");
  c.size(scale, 0, 1, "one factor");
  for (int64_t i = 0; i < op.count; ++i) {
    check_state(c, op.states[i], scale);
    c.same_device({"param of a state", op.states[i].param}, {"the first one", op.states[0].param});
  }
  check_not_negative("lr", op.lr);
  check_beta("beta1", op.beta1);
  check_beta("beta2", op.beta2);
  check_not_negative("eps", op.eps);
  check_not_negative("weight_decay", op.weight_decay);
  PYKERN_CHECK(value, op.step >= 1, "adamw: step is ", op.step, ", expected 1 for the first step");
  PYKERN_CHECK(value, std::isfinite(op.grad_scale), "adamw: grad_scale is ", op.grad_scale,
               ", expected a finite number");
}

void check(const SquareSum& op) {
  const Checker c{"square_sum"};
  const Arg out{"out", op.out};
  c.dtype(out, DType::f64);
  c.rank(out, 1, "[tensors]");
  c.size(out, 0, op.count, "tensors");
  c.contiguous(out);
  c.output(out);
  for (int64_t i = 0; i < op.count; ++i) {
    const Arg x{"x", op.x[i]};
    c.floating(x);
    c.unit_last(x);
    c.same_device(out, x);
    c.disjoint({out}, {x});
  }
}

}  // namespace pykern

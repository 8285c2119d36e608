#include "ops/norm.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

static void check_row(const Checker& c, Arg first, Arg a) {
  c.same_shape(a, first);
  c.unit_last(a);
}

// Rows like those of first, in its dtype.
static void check_rows(const Checker& c, Arg first, std::initializer_list<Arg> args) {
  c.floating(first);
  PYKERN_CHECK(value, first.t.rank >= 1, c.op, ": ", first.name,
               " must be [..., D] with at least one dimension, got a scalar");
  c.unit_last(first);
  for (const Arg& a : args) {
    c.same_dtype(a, first);
    check_row(c, first, a);
  }
}

// Rows like those of first, in its dtype or, beside float32, in bfloat16 or float16.
static void check_normed(const Checker& c, Arg first, Arg a) {
  if (first.t.dtype == DType::f32 && (a.t.dtype == DType::bf16 || a.t.dtype == DType::f16))
    c.same_device(a, first);
  else
    c.same_dtype(a, first);
  check_row(c, first, a);
}

// One number per column of first, in its dtype or, beside a half one, float32.
static void check_columns(const Checker& c, Arg first, std::initializer_list<Arg> args) {
  for (const Arg& a : args) {
    c.same_dtype_or_float(a, first);
    c.rank(a, 1, "[D]");
    c.size(a, 0, first.t.size[first.t.rank - 1], "D");
    c.unit_last(a);
  }
}

static void check_stats(const Checker& c, Arg first, std::initializer_list<Arg> args) {
  for (const Arg& a : args) {
    c.dtype(a, stat_dtype(first.t.dtype));
    c.same_device(a, first);
    c.rows_of(a, first);
    c.contiguous(a);
  }
}

static void check_outputs(const Checker& c, std::initializer_list<Arg> outputs,
                          std::initializer_list<Arg> inputs) {
  for (const Arg& a : outputs) c.output(a);
  c.disjoint(outputs, inputs);
}

static void check_forward(const Checker& c, const NormForward& op) {
  const Arg x{"x", op.x}, weight{"weight", op.weight}, bias{"bias", op.bias},
      residual{"residual", op.residual}, out{"out", op.out}, sum{"sum", op.sum},
      mean{"mean", op.mean}, rstd{"rstd", op.rstd};
  check_rows(c, x, {residual, sum});
  check_normed(c, x, out);
  check_columns(c, x, {weight, bias});
  check_stats(c, x, {mean, rstd});
  PYKERN_CHECK(value, op.residual.given == op.sum.given, c.op, ": ",
               op.sum.given ? "sum is given without residual" : "residual is given without sum");
  PYKERN_CHECK(value, op.eps >= 0 && std::isfinite(op.eps), c.op, ": eps is ", op.eps,
               ", expected a finite number of at least 0");
  check_outputs(c, {out, sum, mean, rstd}, {x, weight, bias, residual});
}

static void check_backward(const Checker& c, const NormBackward& op) {
  const Arg h{"h", op.h}, weight{"weight", op.weight}, mean{"mean", op.mean}, rstd{"rstd", op.rstd},
      dout{"dout", op.dout}, dsum{"dsum", op.dsum}, dh{"dh", op.dh}, dweight{"dweight", op.dweight},
      dbias{"dbias", op.dbias};
  check_rows(c, h, {dsum, dh});
  check_normed(c, h, dout);
  check_columns(c, h, {weight, dweight, dbias});
  c.same_dtype(dweight, weight);
  check_stats(c, h, {mean, rstd});
  check_outputs(c, {dh, dweight, dbias}, {h, weight, mean, rstd, dout, dsum});
}

void check(const LayerNormForward& op) { check_forward({"layer_norm"}, op); }
void check(const RmsNormForward& op) { check_forward({"rms_norm"}, op); }
void check(const LayerNormBackward& op) { check_backward({"layer_norm"}, op); }
void check(const RmsNormBackward& op) { check_backward({"rms_norm"}, op); }

}  // namespace pykern

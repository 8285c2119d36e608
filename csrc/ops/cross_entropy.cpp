#include "ops/cross_entropy.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"cross_entropy"};

static int64_t element(const Tensor& t, int64_t index) {
  int64_t offset = 0;
  for (int i = t.rank - 1; i >= 0; --i) {
    offset += index % t.size[i] * t.stride[i];
    index /= t.size[i];
  }
  return offset;
}

void check_labels(const char* op, const Tensor& target, int64_t V,
                  const CrossEntropyOptions& options) {
  PYKERN_CHECK(value, options.label_smoothing >= 0.0 && options.label_smoothing <= 1.0, op,
               ": label_smoothing is ", options.label_smoothing, ", expected 0..1");
  PYKERN_CHECK(value, std::isfinite(options.z_loss) && options.z_loss >= 0.0, op, ": z_loss is ",
               options.z_loss, ", expected a finite number >= 0");
  if (target.device != Device::cpu) return;
  const int64_t n = count(target);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t y = static_cast<const int64_t*>(target.data)[element(target, i)];
    PYKERN_CHECK(index, (y >= 0 && y < V) || y == options.ignore_index, op, ": target ", y,
                 " at position ", i, " is neither in 0 <= target < ", V,
                 " nor ignore_index = ", options.ignore_index);
  }
}

static void check_inputs(Arg logits, Arg target, Arg lse, const CrossEntropyOptions& options) {
  c.floating(logits);
  PYKERN_CHECK(value, logits.t.rank >= 1, "cross_entropy: logits must be [..., V], got a scalar");
  c.dtype(target, DType::i64);
  c.same_device(target, logits);
  c.rows_of(target, logits);
  c.unit_last(logits);
  if (lse.t.dtype != DType::f64) c.dtype(lse, stat_dtype(logits.t.dtype));
  c.same_device(lse, logits);
  c.rows_of(lse, logits);
  check_labels("cross_entropy", target.t, logits.t.size[logits.t.rank - 1], options);
}

static void check_stat_rows(Arg a, Arg logits) {
  c.dtype(a, stat_dtype(logits.t.dtype));
  c.same_device(a, logits);
  c.rows_of(a, logits);
}

void check(const CrossEntropyForward& op) {
  const Arg logits{"logits", op.logits}, target{"target", op.target}, loss{"loss", op.loss},
      lse{"lse", op.lse};
  check_inputs(logits, target, lse, op.options);
  check_stat_rows(loss, logits);
  for (const Arg& a : {loss, lse}) c.output(a);
  c.disjoint({loss, lse}, {logits, target});
}

// The same elements at the same addresses: each is read before it is written.
static bool in_place(const Tensor& a, const Tensor& b) {
  bool same = a.data == b.data && a.rank == b.rank;
  for (int i = 0; same && i < a.rank; ++i) same = a.size[i] <= 1 || a.stride[i] == b.stride[i];
  return same;
}

void check(const CrossEntropyBackward& op) {
  const Arg logits{"logits", op.logits}, target{"target", op.target}, lse{"lse", op.lse},
      dloss{"dloss", op.dloss}, dlogits{"dlogits", op.dlogits};
  check_inputs(logits, target, lse, op.options);
  check_stat_rows(dloss, logits);
  c.same_dtype(dlogits, logits);
  c.same_shape(dlogits, logits);
  c.unit_last(dlogits);
  c.output(dlogits);
  c.disjoint({dlogits}, {target, lse, dloss});
  if (!in_place(op.dlogits, op.logits)) c.disjoint({dlogits}, {logits});
}

}  // namespace pykern

#include "ops/softmax.h"

#include "ops/check.h"

namespace pykern {

static void check_alike(const Checker& c, Arg first, std::initializer_list<Arg> args) {
  c.floating(first);
  PYKERN_CHECK(value, first.t.rank >= 1, c.op, ": ", first.name,
               " must be [..., D] with at least one dimension, got a scalar");
  c.unit_last(first);
  for (const Arg& a : args) {
    c.same_dtype(a, first);
    c.same_shape(a, first);
    c.unit_last(a);
  }
}

// A mask that is the same for a whole row may say so with stride 0.
static void check_mask(const Checker& c, Arg mask, Arg x) {
  c.dtype(mask, DType::b8);
  c.same_device(mask, x);
  c.same_shape(mask, x);
  const int last = x.t.rank - 1;
  if (!mask.t.given || mask.t.stride[last] != 0) c.unit_last(mask);
}

void check(const SoftmaxForward& op) {
  const Checker c{"softmax"};
  const Arg x{"x", op.x}, mask{"mask", op.mask}, out{"out", op.out};
  check_alike(c, x, {out});
  check_mask(c, mask, x);
  c.output(out);
  c.disjoint({out}, {x, mask});
}

void check(const SoftmaxBackward& op) {
  const Checker c{"softmax"};
  const Arg out{"out", op.out}, dout{"dout", op.dout}, dx{"dx", op.dx};
  check_alike(c, out, {dout, dx});
  c.output(dx);
  c.disjoint({dx}, {out, dout});
}

}  // namespace pykern

#include "ops/rope.h"

#include "ops/check.h"

namespace pykern {

static void check_positions(const Checker& c, const Rope& op) {
  const int64_t B = op.x.size[0], T = op.x.size[2], P = op.cos.size[0];
  const Arg positions{"positions", op.positions};
  if (!op.positions.given) {
    PYKERN_CHECK(index, T <= P, c.op, ": x has ", T, " positions, but cos has ", P, " rows");
    return;
  }
  c.dtype(positions, DType::i64);
  c.same_device(positions, {"x", op.x});
  PYKERN_CHECK(value, op.positions.rank == 1 || op.positions.rank == 2, c.op,
               ": positions must be [T] or [B, T], got shape ", shape(op.positions));
  c.size(positions, op.positions.rank - 1, T, "T");
  if (op.positions.rank == 2) c.size(positions, 0, B, "B");
  c.indices(positions, P, "cos");
}

void check(const Rope& op) {
  const Checker c{"rope"};
  const Arg x{"x", op.x}, cos{"cos", op.cos}, sin{"sin", op.sin}, out{"out", op.out};
  c.floating(x);
  c.rank(x, 4, "[B, H, T, D]");
  c.same_dtype(out, x);
  c.same_shape(out, x);
  c.same_device(cos, x);
  if (op.cos.dtype != op.x.dtype) c.dtype(cos, stat_dtype(op.x.dtype));
  c.rank(cos, 2, "[P, R/2]");
  c.same_dtype(sin, cos);
  c.same_shape(sin, cos);
  PYKERN_CHECK(value, 2 * op.cos.size[1] <= op.x.size[3], c.op, ": cos of shape ", shape(op.cos),
               " rotates R = ", 2 * op.cos.size[1], " numbers, but x has D = ", op.x.size[3]);
  for (const Arg& a : {x, cos, sin, out}) c.unit_last(a);
  c.output(out);
  c.disjoint({out}, {x, cos, sin, {"positions", op.positions}});
  check_positions(c, op);
}

}  // namespace pykern

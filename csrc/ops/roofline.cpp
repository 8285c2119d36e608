#include "ops/roofline.h"

#include "ops/check.h"

namespace pykern {

static constexpr Checker c{"roofline"};

static void check_positive(const char* option, int64_t value) {
  PYKERN_CHECK(value, value >= 1, "roofline: ", option, " is ", value, ", expected at least 1");
}

static void check_vector(Arg a) {
  c.rank(a, 1, "[n]");
  c.contiguous(a);
  PYKERN_CHECK(value, count(a.t) > 0, "roofline: ", a.name, " is empty");
}

void check(const RooflineFma& op) {
  const Arg sink{"sink", op.sink};
  c.floating(sink);
  check_vector(sink);
  c.output(sink);
  check_positive("repeats", op.repeats);
}

void check(const RooflineRead& op) {
  const Arg source{"source", op.source}, sink{"sink", op.sink};
  for (const Arg& a : {source, sink}) {
    c.dtype(a, DType::f32);
    c.same_device(a, source);
    check_vector(a);
  }
  c.output(sink);
  c.disjoint({sink}, {source});
  check_positive("repeats", op.repeats);
}

void check(const RooflineCopy& op) {
  const Arg source{"source", op.source}, target{"target", op.target};
  for (const Arg& a : {source, target}) {
    c.dtype(a, DType::f32);
    check_vector(a);
  }
  c.same_device(target, source);
  c.same_shape(target, source);
  c.output(target);
  c.disjoint({target}, {source});
  check_positive("tasks", op.tasks);
  check_positive("repeats", op.repeats);
}

}  // namespace pykern

#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kRoofline = "roofline";

static double roofline_fma(py::handle sink, int64_t repeats) {
  const Borrowed sink_(sink, kRoofline, "sink");
  double flops = 0;
  const RooflineFma op{sink_, repeats, &flops};
  PYKERN_RUN(roofline_fma, op, op.sink);
  return flops;
}

static void roofline_read(py::handle source, py::handle sink, int64_t repeats) {
  const Borrowed source_(source, kRoofline, "source"), sink_(sink, kRoofline, "sink");
  const RooflineRead op{source_, sink_, repeats};
  PYKERN_RUN(roofline_read, op, op.source);
}

static void roofline_copy(py::handle source, py::handle target, int64_t tasks, int64_t repeats) {
  const Borrowed source_(source, kRoofline, "source"), target_(target, kRoofline, "target");
  const RooflineCopy op{source_, target_, tasks, repeats};
  PYKERN_RUN(roofline_copy, op, op.source);
}

void bind_roofline(py::module_& m) {
  using py::arg;
  m.def("roofline_fma", roofline_fma, arg("sink"), py::kw_only(), arg("repeats"));
  m.def("roofline_read", roofline_read, arg("source"), arg("sink"), py::kw_only(), arg("repeats"));
  m.def("roofline_copy", roofline_copy, arg("source"), arg("target"), py::kw_only(), arg("tasks"),
        arg("repeats"));
}

}  // namespace pykern

#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void softmax_forward(py::handle x, py::handle mask, py::handle out) {
  const Borrowed x_(x, "softmax", "x"), out_(out, "softmax", "out");
  const Optional mask_(mask, "softmax", "mask");
  const SoftmaxForward op{x_, mask_, out_};
  PYKERN_RUN(softmax_forward, op, op.x);
}

static void softmax_backward(py::handle out, py::handle dout, py::handle dx) {
  const Borrowed out_(out, "softmax", "out"), dout_(dout, "softmax", "dout"),
      dx_(dx, "softmax", "dx");
  const SoftmaxBackward op{out_, dout_, dx_};
  PYKERN_RUN(softmax_backward, op, op.out);
}

void bind_softmax(py::module_& m) {
  using py::arg;
  m.def("softmax_forward", softmax_forward, arg("x"), arg("mask"), arg("out"));
  m.def("softmax_backward", softmax_backward, arg("out"), arg("dout"), arg("dx"));
}

}  // namespace pykern

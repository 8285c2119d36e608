#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void activation_forward(py::handle x, py::handle out, const char* kind) {
  const Activation f = activation_named("activation", kind);
  const char* name = public_name(f);
  const Borrowed x_(x, name, "x"), out_(out, name, "out");
  const ActivationForward op{x_, out_, f};
  PYKERN_RUN(activation_forward, op, op.x);
}

static void activation_backward(py::handle x, py::handle dout, py::handle dx, const char* kind) {
  const Activation f = activation_named("activation", kind);
  const char* name = public_name(f);
  const Borrowed x_(x, name, "x"), dout_(dout, name, "dout"), dx_(dx, name, "dx");
  const ActivationBackward op{x_, dout_, dx_, f};
  PYKERN_RUN(activation_backward, op, op.x);
}

static void swiglu_forward(py::handle gate, py::handle up, py::handle out) {
  const Borrowed gate_(gate, "swiglu", "gate"), up_(up, "swiglu", "up"), out_(out, "swiglu", "out");
  const SwigluForward op{gate_, up_, out_};
  PYKERN_RUN(swiglu_forward, op, op.gate);
}

static void swiglu_backward(py::handle gate, py::handle up, py::handle dout, py::handle dgate,
                            py::handle dup) {
  const Borrowed gate_(gate, "swiglu", "gate"), up_(up, "swiglu", "up"),
      dout_(dout, "swiglu", "dout"), dgate_(dgate, "swiglu", "dgate"), dup_(dup, "swiglu", "dup");
  const SwigluBackward op{gate_, up_, dout_, dgate_, dup_};
  PYKERN_RUN(swiglu_backward, op, op.gate);
}

void bind_activation(py::module_& m) {
  using py::arg;
  m.def("activation_forward", activation_forward, arg("x"), arg("out"), py::kw_only(), arg("kind"));
  m.def("activation_backward", activation_backward, arg("x"), arg("dout"), arg("dx"), py::kw_only(),
        arg("kind"));
  m.def("swiglu_forward", swiglu_forward, arg("gate"), arg("up"), arg("out"));
  m.def("swiglu_backward", swiglu_backward, arg("gate"), arg("up"), arg("dout"), arg("dgate"),
        arg("dup"));
}

}  // namespace pykern

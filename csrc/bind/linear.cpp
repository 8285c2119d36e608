#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void linear_forward(py::handle x, py::handle weight, py::handle bias, py::handle residual,
                           py::handle out, py::handle pre, const char* activation, bool tf32) {
  const Borrowed x_(x, "linear", "x"), weight_(weight, "linear", "weight"),
      out_(out, "linear", "out");
  const Optional bias_(bias, "linear", "bias"), residual_(residual, "linear", "residual"),
      pre_(pre, "linear", "pre");
  const LinearForward op{
      x_, weight_, bias_, residual_, out_, pre_, activation_named("linear", activation), tf32};
  PYKERN_RUN(linear_forward, op, op.x);
}

static void linear_backward(py::handle x, py::handle weight, py::handle pre, py::handle dout,
                            py::handle dx, py::handle dweight, py::handle dbias,
                            const char* activation, bool tf32) {
  const Borrowed x_(x, "linear", "x"), weight_(weight, "linear", "weight"),
      dout_(dout, "linear", "dout");
  const Optional pre_(pre, "linear", "pre"), dx_(dx, "linear", "dx"),
      dweight_(dweight, "linear", "dweight"), dbias_(dbias, "linear", "dbias");
  const LinearBackward op{x_,  weight_,  pre_,   dout_,
                          dx_, dweight_, dbias_, activation_named("linear", activation),
                          tf32};
  PYKERN_RUN(linear_backward, op, op.x);
}

void bind_linear(py::module_& m) {
  using py::arg;
  m.def("linear_forward", linear_forward, arg("x"), arg("weight"), arg("bias"), arg("residual"),
        arg("out"), arg("pre"), py::kw_only(), arg("activation"), arg("tf32") = false);
  m.def("linear_backward", linear_backward, arg("x"), arg("weight"), arg("pre"), arg("dout"),
        arg("dx"), arg("dweight"), arg("dbias"), py::kw_only(), arg("activation"),
        arg("tf32") = false);
}

}  // namespace pykern

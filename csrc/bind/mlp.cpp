#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kMlp = "mlp";

static void mlp_forward(py::handle x, py::handle up_weight, py::handle up_bias,
                        py::handle gate_weight, py::handle gate_bias, py::handle down_weight,
                        py::handle down_bias, py::handle residual, py::handle out, py::handle up,
                        py::handle gate, const char* activation, bool tf32) {
  const Borrowed x_(x, kMlp, "x"), up_weight_(up_weight, kMlp, "up_weight"),
      down_weight_(down_weight, kMlp, "down_weight"), out_(out, kMlp, "out");
  const Optional up_bias_(up_bias, kMlp, "up_bias"), gate_weight_(gate_weight, kMlp, "gate_weight"),
      gate_bias_(gate_bias, kMlp, "gate_bias"), down_bias_(down_bias, kMlp, "down_bias"),
      residual_(residual, kMlp, "residual"), up_(up, kMlp, "up"), gate_(gate, kMlp, "gate");
  const MlpForward op{x_,         up_weight_,   up_bias_,   gate_weight_,
                      gate_bias_, down_weight_, down_bias_, residual_,
                      out_,       up_,          gate_,      activation_named(kMlp, activation),
                      tf32};
  PYKERN_RUN(mlp_forward, op, op.x);
}

static void mlp_backward(py::handle x, py::handle up_weight, py::handle gate_weight,
                         py::handle down_weight, py::handle up, py::handle gate, py::handle dout,
                         py::handle dx, py::handle dup_weight, py::handle dup_bias,
                         py::handle dgate_weight, py::handle dgate_bias, py::handle ddown_weight,
                         py::handle ddown_bias, const char* activation, bool tf32) {
  const Borrowed x_(x, kMlp, "x"), up_weight_(up_weight, kMlp, "up_weight"),
      down_weight_(down_weight, kMlp, "down_weight"), up_(up, kMlp, "up"),
      dout_(dout, kMlp, "dout");
  const Optional gate_weight_(gate_weight, kMlp, "gate_weight"), gate_(gate, kMlp, "gate"),
      dx_(dx, kMlp, "dx"), dup_weight_(dup_weight, kMlp, "dup_weight"),
      dup_bias_(dup_bias, kMlp, "dup_bias"), dgate_weight_(dgate_weight, kMlp, "dgate_weight"),
      dgate_bias_(dgate_bias, kMlp, "dgate_bias"),
      ddown_weight_(ddown_weight, kMlp, "ddown_weight"),
      ddown_bias_(ddown_bias, kMlp, "ddown_bias");
  const MlpBackward op{x_,
                       up_weight_,
                       gate_weight_,
                       down_weight_,
                       up_,
                       gate_,
                       dout_,
                       dx_,
                       dup_weight_,
                       dup_bias_,
                       dgate_weight_,
                       dgate_bias_,
                       ddown_weight_,
                       ddown_bias_,
                       activation_named(kMlp, activation),
                       tf32};
  PYKERN_RUN(mlp_backward, op, op.x);
}

void bind_mlp(py::module_& m) {
  using py::arg;
  m.def("mlp_forward", mlp_forward, arg("x"), arg("up_weight"), arg("up_bias"), arg("gate_weight"),
        arg("gate_bias"), arg("down_weight"), arg("down_bias"), arg("residual"), arg("out"),
        arg("up"), arg("gate"), py::kw_only(), arg("activation"), arg("tf32") = false);
  m.def("mlp_backward", mlp_backward, arg("x"), arg("up_weight"), arg("gate_weight"),
        arg("down_weight"), arg("up"), arg("gate"), arg("dout"), arg("dx"), arg("dup_weight"),
        arg("dup_bias"), arg("dgate_weight"), arg("dgate_bias"), arg("ddown_weight"),
        arg("ddown_bias"), py::kw_only(), arg("activation"), arg("tf32") = false);
}

}  // namespace pykern

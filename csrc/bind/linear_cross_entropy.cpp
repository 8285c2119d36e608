#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kOp = "linear_cross_entropy";

static void linear_cross_entropy_forward(py::handle x, py::handle weight, py::handle bias,
                                         py::handle target, py::handle loss, py::handle lse,
                                         int64_t ignore_index, double label_smoothing,
                                         double z_loss) {
  const Borrowed x_(x, kOp, "x"), weight_(weight, kOp, "weight");
  const Optional bias_(bias, kOp, "bias");
  const Borrowed target_(target, kOp, "target"), loss_(loss, kOp, "loss"), lse_(lse, kOp, "lse");
  const LinearCrossEntropyForward op{
      x_, weight_, bias_, target_, loss_, lse_, {ignore_index, label_smoothing, z_loss}};
  PYKERN_RUN(linear_cross_entropy_forward, op, op.x);
}

static void linear_cross_entropy_backward(py::handle x, py::handle weight, py::handle bias,
                                          py::handle target, py::handle lse, py::handle dloss,
                                          py::handle dx, py::handle dweight, py::handle dbias,
                                          int64_t ignore_index, double label_smoothing,
                                          double z_loss) {
  const Borrowed x_(x, kOp, "x"), weight_(weight, kOp, "weight");
  const Optional bias_(bias, kOp, "bias");
  const Borrowed target_(target, kOp, "target"), lse_(lse, kOp, "lse"), dloss_(dloss, kOp, "dloss");
  const Optional dx_(dx, kOp, "dx"), dweight_(dweight, kOp, "dweight"), dbias_(dbias, kOp, "dbias");
  const LinearCrossEntropyBackward op{
      x_,     weight_, bias_,    target_, lse_,
      dloss_, dx_,     dweight_, dbias_,  {ignore_index, label_smoothing, z_loss}};
  PYKERN_RUN(linear_cross_entropy_backward, op, op.x);
}

void bind_linear_cross_entropy(py::module_& m) {
  using py::arg;
  m.def("linear_cross_entropy_forward", linear_cross_entropy_forward, arg("x"), arg("weight"),
        arg("bias"), arg("target"), arg("loss"), arg("lse"), py::kw_only(), arg("ignore_index"),
        arg("label_smoothing"), arg("z_loss"));
  m.def("linear_cross_entropy_backward", linear_cross_entropy_backward, arg("x"), arg("weight"),
        arg("bias"), arg("target"), arg("lse"), arg("dloss"), arg("dx"), arg("dweight"),
        arg("dbias"), py::kw_only(), arg("ignore_index"), arg("label_smoothing"), arg("z_loss"));
}

}  // namespace pykern

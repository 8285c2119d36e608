#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kLinearCrossEntropy = "linear_cross_entropy";

static void linear_cross_entropy(py::handle x, py::handle weight, py::handle bias,
                                 py::handle target, py::handle loss, py::handle dloss,
                                 py::handle dx, py::handle dweight, py::handle dbias,
                                 int64_t ignore_index, double label_smoothing, double z_loss,
                                 bool tf32) {
  const Borrowed x_(x, kLinearCrossEntropy, "x"), weight_(weight, kLinearCrossEntropy, "weight"),
      target_(target, kLinearCrossEntropy, "target");
  const Optional bias_(bias, kLinearCrossEntropy, "bias"), loss_(loss, kLinearCrossEntropy, "loss"),
      dloss_(dloss, kLinearCrossEntropy, "dloss"), dx_(dx, kLinearCrossEntropy, "dx"),
      dweight_(dweight, kLinearCrossEntropy, "dweight"),
      dbias_(dbias, kLinearCrossEntropy, "dbias");
  const LinearCrossEntropy op{
      x_,     weight_, bias_,    target_, loss_,
      dloss_, dx_,     dweight_, dbias_,  {ignore_index, label_smoothing, z_loss},
      tf32};
  PYKERN_RUN(linear_cross_entropy, op, op.x);
}

void bind_linear_cross_entropy(py::module_& m) {
  using py::arg;
  m.def("linear_cross_entropy", linear_cross_entropy, arg("x"), arg("weight"), arg("bias"),
        arg("target"), arg("loss"), arg("dloss"), arg("dx"), arg("dweight"), arg("dbias"),
        py::kw_only(), arg("ignore_index"), arg("label_smoothing"), arg("z_loss"),
        arg("tf32") = false);
}

}  // namespace pykern

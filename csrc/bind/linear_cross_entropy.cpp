#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kOp = "linear_cross_entropy";

static void linear_cross_entropy(py::handle x, py::handle weight, py::handle bias,
                                 py::handle target, py::handle loss, py::handle dloss,
                                 py::handle dx, py::handle dweight, py::handle dbias,
                                 int64_t ignore_index, double label_smoothing, double z_loss) {
  const Borrowed x_(x, kOp, "x"), weight_(weight, kOp, "weight"), target_(target, kOp, "target");
  const Optional bias_(bias, kOp, "bias"), loss_(loss, kOp, "loss"), dloss_(dloss, kOp, "dloss"),
      dx_(dx, kOp, "dx"), dweight_(dweight, kOp, "dweight"), dbias_(dbias, kOp, "dbias");
  const LinearCrossEntropy op{
      x_,     weight_, bias_,    target_, loss_,
      dloss_, dx_,     dweight_, dbias_,  {ignore_index, label_smoothing, z_loss}};
  PYKERN_RUN(linear_cross_entropy, op, op.x);
}

void bind_linear_cross_entropy(py::module_& m) {
  using py::arg;
  m.def("linear_cross_entropy", linear_cross_entropy, arg("x"), arg("weight"), arg("bias"),
        arg("target"), arg("loss"), arg("dloss"), arg("dx"), arg("dweight"), arg("dbias"),
        py::kw_only(), arg("ignore_index"), arg("label_smoothing"), arg("z_loss"));
}

}  // namespace pykern

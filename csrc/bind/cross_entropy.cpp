#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kCrossEntropy = "cross_entropy";

static void cross_entropy_forward(py::handle logits, py::handle target, py::handle loss,
                                  py::handle lse, int64_t ignore_index, double label_smoothing,
                                  double z_loss) {
  const Borrowed logits_(logits, kCrossEntropy, "logits"), target_(target, kCrossEntropy, "target"),
      loss_(loss, kCrossEntropy, "loss"), lse_(lse, kCrossEntropy, "lse");
  const CrossEntropyForward op{
      logits_, target_, loss_, lse_, {ignore_index, label_smoothing, z_loss}};
  PYKERN_RUN(cross_entropy_forward, op, op.logits);
}

static void cross_entropy_backward(py::handle logits, py::handle target, py::handle lse,
                                   py::handle dloss, py::handle dlogits, int64_t ignore_index,
                                   double label_smoothing, double z_loss) {
  const Borrowed logits_(logits, kCrossEntropy, "logits"), target_(target, kCrossEntropy, "target"),
      lse_(lse, kCrossEntropy, "lse"), dloss_(dloss, kCrossEntropy, "dloss"),
      dlogits_(dlogits, kCrossEntropy, "dlogits");
  const CrossEntropyBackward op{logits_, target_,  lse_,
                                dloss_,  dlogits_, {ignore_index, label_smoothing, z_loss}};
  PYKERN_RUN(cross_entropy_backward, op, op.logits);
}

void bind_cross_entropy(py::module_& m) {
  using py::arg;
  m.def("cross_entropy_forward", cross_entropy_forward, arg("logits"), arg("target"), arg("loss"),
        arg("lse"), py::kw_only(), arg("ignore_index"), arg("label_smoothing"), arg("z_loss"));
  m.def("cross_entropy_backward", cross_entropy_backward, arg("logits"), arg("target"), arg("lse"),
        arg("dloss"), arg("dlogits"), py::kw_only(), arg("ignore_index"), arg("label_smoothing"),
        arg("z_loss"));
}

}  // namespace pykern

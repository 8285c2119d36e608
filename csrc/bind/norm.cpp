#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void layer_norm_forward(py::handle x, py::handle weight, py::handle bias,
                               py::handle residual, py::handle out, py::handle sum, py::handle mean,
                               py::handle rstd, double eps) {
  constexpr const char* kOp = "layer_norm";
  const Borrowed x_(x, kOp, "x"), out_(out, kOp, "out"), mean_(mean, kOp, "mean"),
      rstd_(rstd, kOp, "rstd");
  const Optional weight_(weight, kOp, "weight"), bias_(bias, kOp, "bias"),
      residual_(residual, kOp, "residual"), sum_(sum, kOp, "sum");
  const LayerNormForward op{{x_, weight_, bias_, residual_, out_, sum_, mean_, rstd_, eps}};
  PYKERN_RUN(layer_norm_forward, op, op.x);
}

static void layer_norm_backward(py::handle h, py::handle weight, py::handle mean, py::handle rstd,
                                py::handle dout, py::handle dsum, py::handle dh, py::handle dweight,
                                py::handle dbias) {
  constexpr const char* kOp = "layer_norm";
  const Borrowed h_(h, kOp, "h"), mean_(mean, kOp, "mean"), rstd_(rstd, kOp, "rstd"),
      dout_(dout, kOp, "dout"), dh_(dh, kOp, "dh");
  const Optional weight_(weight, kOp, "weight"), dsum_(dsum, kOp, "dsum"),
      dweight_(dweight, kOp, "dweight"), dbias_(dbias, kOp, "dbias");
  const LayerNormBackward op{{h_, weight_, mean_, rstd_, dout_, dsum_, dh_, dweight_, dbias_}};
  PYKERN_RUN(layer_norm_backward, op, op.h);
}

static void rms_norm_forward(py::handle x, py::handle weight, py::handle residual, py::handle out,
                             py::handle sum, py::handle rstd, double eps) {
  constexpr const char* kOp = "rms_norm";
  const Borrowed x_(x, kOp, "x"), out_(out, kOp, "out"), rstd_(rstd, kOp, "rstd");
  const Optional weight_(weight, kOp, "weight"), residual_(residual, kOp, "residual"),
      sum_(sum, kOp, "sum");
  const RmsNormForward op{{x_, weight_, {}, residual_, out_, sum_, {}, rstd_, eps}};
  PYKERN_RUN(rms_norm_forward, op, op.x);
}

static void rms_norm_backward(py::handle h, py::handle weight, py::handle rstd, py::handle dout,
                              py::handle dsum, py::handle dh, py::handle dweight) {
  constexpr const char* kOp = "rms_norm";
  const Borrowed h_(h, kOp, "h"), rstd_(rstd, kOp, "rstd"), dout_(dout, kOp, "dout"),
      dh_(dh, kOp, "dh");
  const Optional weight_(weight, kOp, "weight"), dsum_(dsum, kOp, "dsum"),
      dweight_(dweight, kOp, "dweight");
  const RmsNormBackward op{{h_, weight_, {}, rstd_, dout_, dsum_, dh_, dweight_, {}}};
  PYKERN_RUN(rms_norm_backward, op, op.h);
}

void bind_norm(py::module_& m) {
  using py::arg;
  m.def("layer_norm_forward", layer_norm_forward, arg("x"), arg("weight"), arg("bias"),
        arg("residual"), arg("out"), arg("sum"), arg("mean"), arg("rstd"), py::kw_only(),
        arg("eps"));
  m.def("layer_norm_backward", layer_norm_backward, arg("h"), arg("weight"), arg("mean"),
        arg("rstd"), arg("dout"), arg("dsum"), arg("dh"), arg("dweight"), arg("dbias"));
  m.def("rms_norm_forward", rms_norm_forward, arg("x"), arg("weight"), arg("residual"), arg("out"),
        arg("sum"), arg("rstd"), py::kw_only(), arg("eps"));
  m.def("rms_norm_backward", rms_norm_backward, arg("h"), arg("weight"), arg("rstd"), arg("dout"),
        arg("dsum"), arg("dh"), arg("dweight"));
}

}  // namespace pykern

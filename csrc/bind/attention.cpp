#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static constexpr const char* kOp = "attention";

static void attention_forward(py::handle q, py::handle k, py::handle v, py::handle mask,
                              py::handle bias, py::handle out, py::handle lse, bool causal,
                              double scale) {
  const Borrowed q_(q, kOp, "q"), k_(k, kOp, "k"), v_(v, kOp, "v");
  const Optional mask_(mask, kOp, "mask"), bias_(bias, kOp, "bias");
  const Borrowed out_(out, kOp, "out"), lse_(lse, kOp, "lse");
  const AttentionForward op{q_, k_, v_, mask_, bias_, out_, lse_, causal, scale};
  PYKERN_RUN(attention_forward, op, op.q);
}

static void attention_backward(py::handle q, py::handle k, py::handle v, py::handle mask,
                               py::handle bias, py::handle out, py::handle lse, py::handle dout,
                               py::handle dlse, py::handle dq, py::handle dk, py::handle dv,
                               py::handle dbias, bool causal, double scale) {
  const Borrowed q_(q, kOp, "q"), k_(k, kOp, "k"), v_(v, kOp, "v");
  const Optional mask_(mask, kOp, "mask"), bias_(bias, kOp, "bias");
  const Borrowed out_(out, kOp, "out"), lse_(lse, kOp, "lse"), dout_(dout, kOp, "dout");
  const Optional dlse_(dlse, kOp, "dlse"), dbias_(dbias, kOp, "dbias");
  const Borrowed dq_(dq, kOp, "dq"), dk_(dk, kOp, "dk"), dv_(dv, kOp, "dv");
  const AttentionBackward op{q_,    k_,  v_,  mask_, bias_,  out_,   lse_, dout_,
                             dlse_, dq_, dk_, dv_,   dbias_, causal, scale};
  PYKERN_RUN(attention_backward, op, op.q);
}

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_forward", attention_forward, arg("q"), arg("k"), arg("v"), arg("mask"),
        arg("bias"), arg("out"), arg("lse"), py::kw_only(), arg("causal"), arg("scale"));
  m.def("attention_backward", attention_backward, arg("q"), arg("k"), arg("v"), arg("mask"),
        arg("bias"), arg("out"), arg("lse"), arg("dout"), arg("dlse"), arg("dq"), arg("dk"),
        arg("dv"), arg("dbias"), py::kw_only(), arg("causal"), arg("scale"));
}

}  // namespace pykern

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

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_forward", attention_forward, arg("q"), arg("k"), arg("v"), arg("mask"),
        arg("bias"), arg("out"), arg("lse"), py::kw_only(), arg("causal"), arg("scale"));
}

}  // namespace pykern

#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void embedding_forward(py::handle weight, py::handle ids, py::handle out) {
  const Borrowed weight_(weight, "embedding", "weight"), ids_(ids, "embedding", "ids"),
      out_(out, "embedding", "out");
  const EmbeddingForward op{weight_, ids_, out_};
  PYKERN_RUN(embedding_forward, op, op.weight);
}

static void embedding_backward(py::handle ids, py::handle dout, py::handle dweight) {
  const Borrowed ids_(ids, "embedding", "ids"), dout_(dout, "embedding", "dout"),
      dweight_(dweight, "embedding", "dweight");
  const EmbeddingBackward op{ids_, dout_, dweight_};
  PYKERN_RUN(embedding_backward, op, op.dout);
}

void bind_embedding(py::module_& m) {
  using py::arg;
  m.def("embedding_forward", embedding_forward, arg("weight"), arg("ids"), arg("out"));
  m.def("embedding_backward", embedding_backward, arg("ids"), arg("dout"), arg("dweight"));
}

}  // namespace pykern

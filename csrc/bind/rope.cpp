#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void rope(py::handle x, py::handle cos, py::handle sin, py::handle positions, py::handle out,
                 bool interleaved, bool inverse) {
  const Borrowed x_(x, "rope", "x"), cos_(cos, "rope", "cos"), sin_(sin, "rope", "sin"),
      out_(out, "rope", "out");
  const Optional positions_(positions, "rope", "positions");
  const Rope op{x_, cos_, sin_, positions_, out_, interleaved, inverse};
  PYKERN_RUN(rope, op, op.x);
}

void bind_rope(py::module_& m) {
  using py::arg;
  m.def("rope", rope, arg("x"), arg("cos"), arg("sin"), arg("positions"), arg("out"), py::kw_only(),
        arg("interleaved"), arg("inverse"));
}

}  // namespace pykern

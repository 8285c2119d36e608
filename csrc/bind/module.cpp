// The Python module: errors, the runtime, and one bind function per op.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind/borrow.h"
#include "core/device.h"
#include "ops/all.h"
#include "runtime/runtime.h"

namespace pykern {

// bind_<room>, defined in bind/<room>.cpp
// clang-format off
#define PYKERN_ROOMS(X) \
  X(activation) \
  X(adamw) \
  X(attention) \
  X(cross_entropy) \
  X(decode) \
  X(embedding) \
  X(linear) \
  X(linear_cross_entropy) \
  X(lm_step) \
  X(mlp) \
  X(memory) \
  X(norm) \
  X(roofline) \
  X(rope) \
  X(sampling) \
  X(softmax) \
  /* end of the list */
// clang-format on

#define PYKERN_DECLARE(room) void bind_##room(py::module_& m);
PYKERN_ROOMS(PYKERN_DECLARE)
#undef PYKERN_DECLARE

static PyObject* exception_of(Kind kind) {
  switch (kind) {
    case Kind::type: return PyExc_TypeError;
    case Kind::value: return PyExc_ValueError;
    case Kind::index: return PyExc_IndexError;
    case Kind::runtime: return PyExc_RuntimeError;
  }
  return PyExc_RuntimeError;
}

static void translate(std::exception_ptr pending) {
  try {
    if (pending) std::rethrow_exception(pending);
  } catch (const Error& error) {
    PyErr_SetString(exception_of(error.kind), error.what());
  }
}

}  // namespace pykern

PYBIND11_MODULE(_C, m) {
  using namespace pykern;
  m.doc() = "pykern's compiled kernels; see _C.pyi";
  py::register_local_exception_translator(translate);

  m.def("isa", runtime::isa);
  m.def("isas", runtime::isas);
  m.def("panel_width", runtime::panel_width);
  m.def("pairs_bf16", runtime::pairs_bf16);
  m.def("num_threads", runtime::threads);
  m.def("set_num_threads", runtime::set_threads, py::arg("n"));
  m.def("cuda_status", [] { return cuda_status().sentence; });
  m.def("cuda_kernels", [] {
    std::vector<std::string> names;
    if (!kCudaBuilt) return names;
#define PYKERN_NAME(kernel, Op) names.emplace_back(#kernel);
    PYKERN_CUDA_OPS(PYKERN_NAME)
#undef PYKERN_NAME
    return names;
  });
  m.def(
      "borrow_path",
      [](py::handle array) { return Borrowed(array, "borrow_path", "array").path(); },
      py::arg("array"));

#define PYKERN_BIND(room) bind_##room(m);
  PYKERN_ROOMS(PYKERN_BIND)
#undef PYKERN_BIND
}

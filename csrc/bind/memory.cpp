// Memory for large results. Fresh memory costs a page fault every 4 KiB and is cleared before it is
// given out, which takes longer than many kernels; here it lies on huge pages and comes again.
#include "core/memory.h"

#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bind/borrow.h"
#include "bind/dlpack_abi.h"
#include "ops/check.h"

namespace pykern {
namespace {

struct Result {
  dlpack::Managed managed;
  std::vector<int64_t> size;
};

void drop(dlpack::Managed* managed) {
  give_result(managed->view.data);
  delete static_cast<Result*>(managed->context);
}

void drop_unused(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;  // somebody has taken what is in it
  const auto managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

dlpack::DataType data_type(const std::string& dtype) {
  if (dtype == "float32") return {dlpack::kFloat, 32, 1};
  if (dtype == "float64") return {dlpack::kFloat, 64, 1};
  if (dtype == "float16") return {dlpack::kFloat, 16, 1};
  if (dtype == "bfloat16") return {dlpack::kBfloat, 16, 1};
  if (dtype == "uint8") return {dlpack::kUInt, 8, 1};
  if (dtype == "int32") return {dlpack::kInt, 32, 1};
  if (dtype == "int64") return {dlpack::kInt, 64, 1};
  throw py::type_error("large_result: dtype " + dtype + " is not supported");
}

py::capsule large_result(std::vector<int64_t> size, const std::string& dtype) {
  const dlpack::DataType type = data_type(dtype);
  int64_t bytes = type.bits / 8;
  for (const int64_t n : size) {
    PYKERN_CHECK(value, n >= 0, "large_result: a size is ", n, " but must not be negative");
    PYKERN_CHECK(value, !__builtin_mul_overflow(bytes, n, &bytes),
                 "large_result: more numbers than memory has addresses");
  }
  auto result = std::make_unique<Result>();
  result->size = std::move(size);
  void* const data = take_result(bytes);
  if (!data) throw std::bad_alloc();
  const auto rank = static_cast<int32_t>(result->size.size());
  result->managed = {
      {data, {dlpack::kCPU, 0}, rank, type, result->size.data(), nullptr, 0}, result.get(), drop};
  return py::capsule(&result.release()->managed, "dltensor", drop_unused);
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def("large_result", large_result, py::arg("size"), py::arg("dtype"));
  m.def("kept_results", kept_results);
}

}  // namespace pykern

// Borrows the memory of a Python array for the length of one call.
#pragma once
#include <pybind11/pybind11.h>

#include "core/error.h"
#include "core/tensor.h"

namespace pykern {

namespace py = pybind11;

// Tries, in this order: the DLPack exchange API of the object's type (torch), numpy, __dlpack__().
// Shape and strides are copied, so the tensor stays valid while the GIL is released. Anything that
// is not an array is a TypeError that names op and argument.
class Borrowed {
 public:
  Borrowed() = default;
  Borrowed(py::handle array, const char* op, const char* name);
  const Tensor& tensor() const { return tensor_; }
  operator const Tensor&() const { return tensor_; }
  const char* path() const { return path_; }

 private:
  Tensor tensor_;
  py::object capsule_;  // owns the memory when it came through __dlpack__()
  const char* path_ = "none";
};

// None is allowed and gives a tensor that is not given.
class Optional : public Borrowed {
 public:
  Optional(py::handle array, const char* op, const char* name)
      : Borrowed(array.is_none() ? Borrowed{} : Borrowed{array, op, name}) {}
};

// RuntimeError that says why, unless CUDA kernels can run.
void require_cuda(const char* kernel);

// Checks op, then runs it where its first tensor lives, without the GIL; on CUDA in the stream of
// its framework.
template <class Op>
void run(const char* kernel, const Op& op, const Tensor& first, void (*on_cpu)(const Op&),
         void (*on_cuda)(const Op&, Stream)) {
  check(op);
  if (first.device == Device::cuda) require_cuda(kernel);
  py::gil_scoped_release unlocked;
  if (first.device == Device::cpu)
    on_cpu(op);
  else
    on_cuda(op, first.stream);
}

}  // namespace pykern

#define PYKERN_RUN(kernel, op, first) \
  ::pykern::run(#kernel, (op), (first), ::pykern::cpu::kernel, ::pykern::cuda::kernel)

// activation, swiglu: elementwise, one read and one write per number; the memory is the limit.
#include "cuda/activate.cuh"
#include "cuda/elementwise.cuh"
#include "ops/activation.h"

namespace pykern::cuda {
namespace {

struct Activate {  // x -> out
  Activation kind;
  template <class C>
  __device__ __forceinline__ void operator()(const C (&x)[1], C (&y)[1]) const {
    y[0] = activate(kind, x[0]);
  }
};

struct ActivateBackward {  // x, dout -> dx
  Activation kind;
  template <class C>
  __device__ __forceinline__ void operator()(const C (&x)[2], C (&y)[1]) const {
    C value;
    y[0] = x[1] * derivative(kind, x[0], &value);
  }
};

struct Swiglu {  // gate, up -> out
  template <class C>
  __device__ __forceinline__ void operator()(const C (&x)[2], C (&y)[1]) const {
    y[0] = activate(Activation::silu, x[0]) * x[1];
  }
};

struct SwigluGradient {  // gate, up, dout -> dgate, dup
  template <class C>
  __device__ __forceinline__ void operator()(const C (&x)[3], C (&y)[2]) const {
    C value;
    y[0] = x[2] * x[1] * derivative(Activation::silu, x[0], &value);
    y[1] = x[2] * value;
  }
};

}  // namespace

void activation_forward(const ActivationForward& op, Stream stream) {
  elementwise("activation_forward", {op.x}, {op.out}, Activate{op.kind}, stream);
}

void activation_backward(const ActivationBackward& op, Stream stream) {
  elementwise("activation_backward", {op.x, op.dout}, {op.dx}, ActivateBackward{op.kind}, stream);
}

void swiglu_forward(const SwigluForward& op, Stream stream) {
  elementwise("swiglu_forward", {op.gate, op.up}, {op.out}, Swiglu{}, stream);
}

void swiglu_backward(const SwigluBackward& op, Stream stream) {
  elementwise("swiglu_backward", {op.gate, op.up, op.dout}, {op.dgate, op.dup}, SwigluGradient{},
              stream);
}

}  // namespace pykern::cuda

// activation, swiglu: elementwise, one read and one write per number; the memory is the limit.
#include "cuda/activate.cuh"
#include "cuda/elementwise.cuh"
#include "ops/activation.h"

namespace pykern::cuda {
namespace {

struct Activate {  // x -> out
  Activation kind;
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[1][W], C (&y)[1][W]) const {
    with_kind(kind, [&](Activation known) {
#pragma unroll
      for (int j = 0; j < W; ++j) y[0][j] = activate<C, T>(known, x[0][j]);
    });
  }
};

struct ActivateBackward {  // x, dout -> dx
  Activation kind;
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[2][W], C (&y)[1][W]) const {
    with_kind(kind, [&](Activation known) {
      C value;
#pragma unroll
      for (int j = 0; j < W; ++j) y[0][j] = x[1][j] * derivative<C, T>(known, x[0][j], &value);
    });
  }
};

struct Swiglu {  // gate, up -> out
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[2][W], C (&y)[1][W]) const {
#pragma unroll
    for (int j = 0; j < W; ++j) y[0][j] = activate<C, T>(Activation::silu, x[0][j]) * x[1][j];
  }
};

struct SwigluGradient {  // gate, up, dout -> dgate, dup
  template <class T, class C, int W>
  __device__ __forceinline__ void apply(const C (&x)[3][W], C (&y)[2][W]) const {
#pragma unroll
    for (int j = 0; j < W; ++j) {
      C value;
      y[0][j] = x[2][j] * x[1][j] * derivative<C, T>(Activation::silu, x[0][j], &value);
      y[1][j] = x[2][j] * value;
    }
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

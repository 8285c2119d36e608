// Elementwise activations: one read and one write per number, in pieces of a few pages.
#include "ops/activation.h"

#include "cpu/math.h"
#include "cpu/pieces.h"

PYKERN_BEGIN_ISA

// Calls body(constant) with the activation as a compile-time constant.
template <Activation f>
struct Constant {
  static constexpr Activation value = f;
};
template <class Body>
static void with_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::none: return body(Constant<Activation::none>{});
    case Activation::relu: return body(Constant<Activation::relu>{});
    case Activation::gelu: return body(Constant<Activation::gelu>{});
    case Activation::gelu_tanh: return body(Constant<Activation::gelu_tanh>{});
    case Activation::silu: return body(Constant<Activation::silu>{});
    case Activation::sigmoid: return body(Constant<Activation::sigmoid>{});
  }
}

Status activation_forward(const ActivationForward& op, int threads) {
  with_type(op.x.dtype, [&]<class T>(T) {
    with_activation(op.kind, [&](auto kind) {
      each_piece(op.x, threads, [&](int64_t row, int64_t first, int64_t length) {
        const T* x = row_of<T>(op.x, row) + first;
        T* out = row_of<T>(op.out, row) + first;
        each_vector<Compute<T>>(length, [&](int64_t i, int n) {
          store_n(out + i, activate<kind.value>(load_n(x + i, n)), n);
        });
      });
    });
  });
  return Status::ok;
}

Status activation_backward(const ActivationBackward& op, int threads) {
  with_type(op.x.dtype, [&]<class T>(T) {
    with_activation(op.kind, [&](auto kind) {
      each_piece(op.x, threads, [&](int64_t row, int64_t first, int64_t length) {
        const T* x = row_of<T>(op.x, row) + first;
        const T* dout = row_of<T>(op.dout, row) + first;
        T* dx = row_of<T>(op.dx, row) + first;
        each_vector<Compute<T>>(length, [&](int64_t i, int n) {
          Vec<Compute<T>> value;
          const auto slope = derivative<kind.value>(load_n(x + i, n), &value);
          store_n(dx + i, load_n(dout + i, n) * slope, n);
        });
      });
    });
  });
  return Status::ok;
}

Status swiglu_forward(const SwigluForward& op, int threads) {
  with_type(op.gate.dtype, [&]<class T>(T) {
    each_piece(op.gate, threads, [&](int64_t row, int64_t first, int64_t length) {
      const T* gate = row_of<T>(op.gate, row) + first;
      const T* up = row_of<T>(op.up, row) + first;
      T* out = row_of<T>(op.out, row) + first;
      each_vector<Compute<T>>(length, [&](int64_t i, int n) {
        store_n(out + i, activate<Activation::silu>(load_n(gate + i, n)) * load_n(up + i, n), n);
      });
    });
  });
  return Status::ok;
}

Status swiglu_backward(const SwigluBackward& op, int threads) {
  with_type(op.gate.dtype, [&]<class T>(T) {
    each_piece(op.gate, threads, [&](int64_t row, int64_t first, int64_t length) {
      const T* gate = row_of<T>(op.gate, row) + first;
      const T* up = row_of<T>(op.up, row) + first;
      const T* dout = row_of<T>(op.dout, row) + first;
      T* dgate = row_of<T>(op.dgate, row) + first;
      T* dup = row_of<T>(op.dup, row) + first;
      each_vector<Compute<T>>(length, [&](int64_t i, int n) {
        const auto g = load_n(gate + i, n), u = load_n(up + i, n), dy = load_n(dout + i, n);
        Vec<Compute<T>> value;
        store_n(dgate + i, dy * u * derivative<Activation::silu>(g, &value), n);
        store_n(dup + i, dy * value, n);
      });
    });
  });
  return Status::ok;
}

PYKERN_END_ISA

// Activations and their derivatives, chosen at run time.
#pragma once
#include "cpu/math.h"

PYKERN_BEGIN_ISA
namespace {

template <class C>
[[gnu::noinline]] static Vec<C> activate_any(Activation kind, Vec<C> x) {
  switch (kind) {
    case Activation::none: return x;
    case Activation::relu: return activate<Activation::relu>(x);
    case Activation::gelu: return activate<Activation::gelu>(x);
    case Activation::gelu_tanh: return activate<Activation::gelu_tanh>(x);
    case Activation::silu: return activate<Activation::silu>(x);
    case Activation::sigmoid: return activate<Activation::sigmoid>(x);
  }
  return x;
}

// The derivative and, in *value, the activation itself.
template <class C>
[[gnu::noinline]] static Vec<C> derivative_any(Activation kind, Vec<C> x, Vec<C>* value) {
  switch (kind) {
    case Activation::none: return derivative<Activation::none>(x, value);
    case Activation::relu: return derivative<Activation::relu>(x, value);
    case Activation::gelu: return derivative<Activation::gelu>(x, value);
    case Activation::gelu_tanh: return derivative<Activation::gelu_tanh>(x, value);
    case Activation::silu: return derivative<Activation::silu>(x, value);
    case Activation::sigmoid: return derivative<Activation::sigmoid>(x, value);
  }
  return x;
}

}  // namespace
PYKERN_END_ISA

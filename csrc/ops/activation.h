// activation: out = f(x), elementwise;  swiglu: out = silu(gate) up.
//   relu max(x, 0)   sigmoid 1 / (1 + exp(-x))   silu x sigmoid(x)   gelu x Phi(x)
//   gelu_tanh x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3)), GPT-2's form
#pragma once
#include "core/tensor.h"

namespace pykern {

enum class Activation : uint8_t { none, relu, gelu, gelu_tanh, silu, sigmoid };

struct ActivationForward {
  Tensor x, out;
  Activation kind;
};

struct ActivationBackward {
  Tensor x, dout, dx;
  Activation kind;
};

struct SwigluForward {
  Tensor gate, up, out;
};

struct SwigluBackward {
  Tensor gate, up, dout, dgate, dup;
};

// "none", "relu", ... ; an unknown name is a ValueError that lists the known ones
Activation activation_named(const char* op, const char* name);
// The public function that a message names: "gelu" for gelu_tanh, "activation" for none
const char* public_name(Activation kind);

void check(const ActivationForward& op);
void check(const ActivationBackward& op);
void check(const SwigluForward& op);
void check(const SwigluBackward& op);

}  // namespace pykern

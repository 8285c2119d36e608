#include "ops/activation.h"

#include <cstring>

#include "ops/check.h"

namespace pykern {

// The public name of each activation, in the order of the enumeration.
static constexpr const char* kNames[] = {"activation", "relu", "gelu", "gelu", "silu", "sigmoid"};

Activation activation_named(const char* op, const char* name) {
  constexpr const char* names[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid"};
  for (int i = 0; i < 6; ++i)
    if (std::strcmp(name, names[i]) == 0) return static_cast<Activation>(i);
  fail(Kind::value, op, ": activation '", name,
       "' is not one of none, relu, gelu, gelu_tanh, silu, sigmoid");
}

const char* public_name(Activation kind) { return kNames[static_cast<int>(kind)]; }

// Every argument has the dtype, device and shape of the first one.
static void check_elementwise(const Checker& c, std::initializer_list<Arg> outputs,
                              std::initializer_list<Arg> inputs) {
  const Arg first = *inputs.begin();
  c.floating(first);
  for (const auto& args : {inputs, outputs})
    for (const Arg& a : args) {
      c.same_dtype(a, first);
      c.same_shape(a, first);
      c.unit_last(a);
    }
  for (const Arg& a : outputs) c.output(a);
  c.disjoint(outputs, inputs);
}

void check(const ActivationForward& op) {
  check_elementwise({public_name(op.kind)}, {{"out", op.out}}, {{"x", op.x}});
}

void check(const ActivationBackward& op) {
  check_elementwise({public_name(op.kind)}, {{"dx", op.dx}}, {{"x", op.x}, {"dout", op.dout}});
}

void check(const SwigluForward& op) {
  check_elementwise({"swiglu"}, {{"out", op.out}}, {{"gate", op.gate}, {"up", op.up}});
}

void check(const SwigluBackward& op) {
  check_elementwise({"swiglu"}, {{"dgate", op.dgate}, {"dup", op.dup}},
                    {{"gate", op.gate}, {"up", op.up}, {"dout", op.dout}});
}

}  // namespace pykern

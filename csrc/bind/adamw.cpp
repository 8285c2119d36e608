#include <vector>

#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

// One step of many parameters; nothing is written unless all arguments pass.
static void adamw(const py::list& states, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t step, double grad_scale, py::handle scale) {
  struct State {
    Borrowed param, grad, exp_avg, exp_avg_sq;
    Optional master;
    explicit State(const py::tuple& t)
        : param(t[0], "adamw", "param"),
          grad(t[1], "adamw", "grad"),
          exp_avg(t[2], "adamw", "exp_avg"),
          exp_avg_sq(t[3], "adamw", "exp_avg_sq"),
          master(t[4], "adamw", "master") {}
  };
  if (states.empty()) return;
  std::vector<State> borrowed;
  borrowed.reserve(states.size());
  std::vector<AdamWState> all;
  all.reserve(states.size());
  for (const py::handle tensors : states) {
    const State& s = borrowed.emplace_back(tensors.cast<py::tuple>());
    all.push_back({s.param, s.grad, s.exp_avg, s.exp_avg_sq, s.master});
  }
  const Optional scale_(scale, "adamw", "scale");
  const AdamW op{all.data(), static_cast<int64_t>(all.size()),
                 scale_,     lr,
                 beta1,      beta2,
                 eps,        weight_decay,
                 step,       grad_scale};
  PYKERN_RUN(adamw, op, op.states[0].param);
}

static void square_sum(const py::list& x, py::handle out) {
  if (x.empty()) return;
  std::vector<Borrowed> borrowed;
  borrowed.reserve(x.size());
  std::vector<Tensor> all;
  all.reserve(x.size());
  for (const py::handle tensor : x) all.push_back(borrowed.emplace_back(tensor, "square_sum", "x"));
  const Borrowed out_(out, "square_sum", "out");
  const SquareSum op{all.data(), static_cast<int64_t>(all.size()), out_};
  PYKERN_RUN(square_sum, op, op.x[0]);
}

void bind_adamw(py::module_& m) {
  using py::arg;
  m.def("adamw", adamw, arg("states"), py::kw_only(), arg("lr"), arg("beta1"), arg("beta2"),
        arg("eps"), arg("weight_decay"), arg("step"), arg("grad_scale"), arg("scale") = py::none());
  m.def("square_sum", square_sum, arg("x"), arg("out"));
}

}  // namespace pykern

#include <vector>

#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

// One step of many parameters; nothing is written unless all arguments pass.
static void adamw(const py::list& states, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t step, double grad_scale) {
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
  std::vector<State> borrowed;
  borrowed.reserve(states.size());
  std::vector<AdamW> ops;
  ops.reserve(states.size());
  for (const py::handle tensors : states) {
    const State& s = borrowed.emplace_back(tensors.cast<py::tuple>());
    ops.push_back({s.param, s.grad, s.exp_avg, s.exp_avg_sq, s.master, lr, beta1, beta2, eps,
                   weight_decay, step, grad_scale});
    check(ops.back());
  }
  for (const AdamW& op : ops) PYKERN_RUN(adamw, op, op.param);
}

static void square_sum(py::handle x, py::handle out) {
  const Borrowed x_(x, "square_sum", "x"), out_(out, "square_sum", "out");
  const SquareSum op{x_, out_};
  PYKERN_RUN(square_sum, op, op.x);
}

void bind_adamw(py::module_& m) {
  using py::arg;
  m.def("adamw", adamw, arg("states"), py::kw_only(), arg("lr"), arg("beta1"), arg("beta2"),
        arg("eps"), arg("weight_decay"), arg("step"), arg("grad_scale"));
  m.def("square_sum", square_sum, arg("x"), arg("out"));
}

}  // namespace pykern

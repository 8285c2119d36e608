#include "bind/borrow.h"
#include "ops/all.h"

namespace pykern {

static void adamw(py::handle param, py::handle grad, py::handle exp_avg, py::handle exp_avg_sq,
                  py::handle master, double lr, double beta1, double beta2, double eps,
                  double weight_decay, int64_t step, double grad_scale) {
  const Borrowed param_(param, "adamw", "param"), grad_(grad, "adamw", "grad"),
      exp_avg_(exp_avg, "adamw", "exp_avg"), exp_avg_sq_(exp_avg_sq, "adamw", "exp_avg_sq");
  const Optional master_(master, "adamw", "master");
  const AdamW op{param_, grad_, exp_avg_, exp_avg_sq_,  master_, lr,
                 beta1,  beta2, eps,      weight_decay, step,    grad_scale};
  PYKERN_RUN(adamw, op, op.param);
}

void bind_adamw(py::module_& m) {
  using py::arg;
  m.def("adamw", adamw, arg("param"), arg("grad"), arg("exp_avg"), arg("exp_avg_sq"), arg("master"),
        py::kw_only(), arg("lr"), arg("beta1"), arg("beta2"), arg("eps"), arg("weight_decay"),
        arg("step"), arg("grad_scale"));
}

}  // namespace pykern

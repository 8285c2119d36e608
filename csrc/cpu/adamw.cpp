// AdamW in one pass: every number of param, grad and the two moments is read once and written once.
#include "ops/adamw.h"

#include <math.h>

#include "cpu/pieces.h"

PYKERN_BEGIN_ISA

static bool is_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.size[i] != 1 && t.stride[i] != expected) return false;
    expected *= t.size[i];
  }
  return true;
}

// Contiguous tensors as one long row: no tail in every row of a narrow matrix.
static AdamW flattened(AdamW op) {
  Tensor* const tensors[] = {&op.param, &op.grad, &op.exp_avg, &op.exp_avg_sq, &op.master};
  for (const Tensor* t : tensors)
    if (t->given && !is_contiguous(*t)) return op;
  for (Tensor* t : tensors) {
    t->size[0] = row_count(*t) * row_length(*t);
    t->stride[0] = 1;
    t->rank = 1;
  }
  return op;
}

namespace {

// The scalars of the formula, computed in double and rounded once.
template <class C>
struct Factors {
  using V = Vec<C>;
  V grad_scale, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps, decay, rate;

  explicit Factors(const AdamW& op)
      : grad_scale(splat(op.grad_scale)),
        one_minus_beta1(splat(1.0 - op.beta1)),
        beta2(splat(op.beta2)),
        one_minus_beta2(splat(1.0 - op.beta2)),
        inverse_sqrt_correction2(
            splat(1.0 / ::sqrt(1.0 - ::pow(op.beta2, static_cast<double>(op.step))))),
        eps(splat(op.eps)),
        decay(splat(1.0 - op.lr * op.weight_decay)),
        rate(splat(-op.lr / (1.0 - ::pow(op.beta1, static_cast<double>(op.step))))) {}

  static V splat(double x) { return V::splat(static_cast<C>(x)); }
};

}  // namespace

Status adamw(const AdamW& given, int threads) {
  const AdamW op = flattened(given);
  with_type(op.param.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    using V = Vec<C>;
    const Factors<C> f(op);
    each_piece(op.param, threads, [&](int64_t row, int64_t first, int64_t length) {
      T* param = row_of<T>(op.param, row) + first;
      const T* grad = row_of<T>(op.grad, row) + first;
      C* exp_avg = row_of<C>(op.exp_avg, row) + first;
      C* exp_avg_sq = row_of<C>(op.exp_avg_sq, row) + first;
      C* master = op.master.given ? row_of<C>(op.master, row) + first : nullptr;
      each_vector<C>(length, [&](int64_t i, int n) {
        const V g = load_n(grad + i, n) * f.grad_scale;
        const V m0 = load_n(exp_avg + i, n), v0 = load_n(exp_avg_sq + i, n);
        const V m = fma(g - m0, f.one_minus_beta1, m0);
        const V v = fma(g * g, f.one_minus_beta2, v0 * f.beta2);
        const V step = m / fma(sqrt(v), f.inverse_sqrt_correction2, f.eps);
        const V w = master ? load_n(master + i, n) : load_n(param + i, n);
        const V moved = fma(step, f.rate, w * f.decay);
        store_n(exp_avg + i, m, n);
        store_n(exp_avg_sq + i, v, n);
        if (master) store_n(master + i, moved, n);
        store_n(param + i, moved, n);
      });
    });
  });
  return Status::ok;
}

PYKERN_END_ISA

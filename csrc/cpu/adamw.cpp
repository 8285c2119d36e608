// AdamW in one pass: every number of param, grad and the two moments is read once and written once.
// And the sum of squares that gradient clipping needs.
#include "ops/adamw.h"

#include <math.h>

#include "cpu/pieces.h"
#include "cpu/reduce.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA

static bool is_contiguous(const Tensor& t) {
  int64_t expected = 1;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.size[i] != 1 && t.stride[i] != expected) return false;
    expected *= t.size[i];
  }
  return true;
}

// A contiguous tensor as one long row: no tail in every row of a narrow matrix.
static void flatten(Tensor& t) {
  t.size[0] = row_count(t) * row_length(t);
  t.stride[0] = 1;
  t.rank = 1;
}

static Tensor flattened(Tensor t) {
  if (is_contiguous(t)) flatten(t);
  return t;
}

static AdamWState flattened(AdamWState s) {
  Tensor* const tensors[] = {&s.param, &s.grad, &s.exp_avg, &s.exp_avg_sq, &s.master};
  for (const Tensor* t : tensors)
    if (t->given && !is_contiguous(*t)) return s;
  for (Tensor* t : tensors) flatten(*t);
  return s;
}

namespace {

// The scalars of the formula, computed in double and rounded once.
template <class C>
struct Factors {
  using V = Vec<C>;
  V grad_scale, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps, decay, rate;

  Factors(const AdamW& op, double scale)
      : grad_scale(splat(scale)),
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

// Numbers of a task of the update: long ones, as the four streams that it reads start anew in each.
constexpr int64_t kUpdate = 32768;

template <class T>
static void update(const AdamWState& s, const AdamW& op, double scale, int threads) {
  using C = Compute<T>;
  using V = Vec<C>;
  const Factors<C> f(op, scale);
  each_piece(
      s.param, threads,
      [&](int64_t row, int64_t first, int64_t length) {
        T* param = row_of<T>(s.param, row) + first;
        const T* grad = row_of<T>(s.grad, row) + first;
        C* exp_avg = row_of<C>(s.exp_avg, row) + first;
        C* exp_avg_sq = row_of<C>(s.exp_avg_sq, row) + first;
        C* master = s.master.given ? row_of<C>(s.master, row) + first : nullptr;
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
      },
      kUpdate);
}

// Pieces of all rows.
static int64_t pieces_of(const Tensor& x) {
  return row_count(x) * ((row_length(x) + kPiece - 1) / kPiece);
}

// sums: memory for one number of each piece
static double square_sum_of(const Tensor& x, double* sums, int threads) {
  const int64_t pieces = (row_length(x) + kPiece - 1) / kPiece;  // of a row
  with_type(x.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    each_piece(x, threads, [&](int64_t row, int64_t first, int64_t length) {
      const T* numbers = row_of<T>(x, row) + first;
      C sum[1];
      sum_row(length, sum, [&](int64_t i, int n, Vec<C>(&t)[1]) {
        t[0] = load_n(numbers + i, n);
        t[0] = t[0] * t[0];
      });
      sums[row * pieces + first / kPiece] = static_cast<double>(sum[0]);
    });
  });
  const int64_t count = pieces_of(x);
  double total = 0.0;
  for (int64_t i = 0; i < count; ++i) total += sums[i];
  return total;
}

}  // namespace

Status adamw(const AdamW& op, int threads) {
  const double given = op.scale.given ? *static_cast<const double*>(op.scale.data) : 1.0;
  const double scale = op.grad_scale * given;
  if (!__builtin_isfinite(scale)) return Status::ok;
  for (int64_t i = 0; i < op.count; ++i) {
    const AdamWState state = flattened(op.states[i]);
    with_type(state.param.dtype, [&]<class T>(T) { update<T>(state, op, scale, threads); });
  }
  return Status::ok;
}

Status square_sum(const SquareSum& op, int threads) {
  int64_t most = 0;
  for (int64_t i = 0; i < op.count; ++i) {
    const int64_t pieces = pieces_of(flattened(op.x[i]));
    if (pieces > most) most = pieces;
  }
  const Scratch memory(most * static_cast<int64_t>(sizeof(double)));
  if (!memory.ok()) return Status::out_of_memory;
  for (int64_t i = 0; i < op.count; ++i)
    static_cast<double*>(op.out.data)[i] =
        square_sum_of(flattened(op.x[i]), memory.at<double>(), threads);
  return Status::ok;
}

PYKERN_END_ISA

// AdamW in one pass: every number of param, grad and the two moments is read once and written once.
// And the sum of squares that gradient clipping needs, in pieces that are added in their order.
#include <math.h>

#include "cuda/elementwise.cuh"
#include "cuda/math.cuh"
#include "cuda/reduce.cuh"
#include "ops/adamw.h"

namespace pykern::cuda {
namespace {

// The scalars of the formula, computed in double and rounded once.
template <class C>
struct Factors {
  C grad_scale, one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps, decay, rate;

  explicit Factors(const AdamW& op)
      : grad_scale(static_cast<C>(op.grad_scale)),
        one_minus_beta1(static_cast<C>(1.0 - op.beta1)),
        beta2(static_cast<C>(op.beta2)),
        one_minus_beta2(static_cast<C>(1.0 - op.beta2)),
        inverse_sqrt_correction2(
            static_cast<C>(1.0 / sqrt(1.0 - pow(op.beta2, static_cast<double>(op.step))))),
        eps(static_cast<C>(op.eps)),
        decay(static_cast<C>(1.0 - op.lr * op.weight_decay)),
        rate(static_cast<C>(-op.lr / (1.0 - pow(op.beta1, static_cast<double>(op.step))))) {}
};

template <class C>
struct Update {
  Rows param, grad, exp_avg, exp_avg_sq, master;
  Extent extent;
  Factors<C> f;
};

template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kElementThreads) adamw_kernel(const Update<C> a) {
  constexpr int W = kPack<T>;
  const Factors<C>& f = a.f;
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    T* param = static_cast<T*>(a.param.data) + a.param.offset(row) + first;
    const T* grad = static_cast<const T*>(a.grad.data) + a.grad.offset(row) + first;
    C* exp_avg = static_cast<C*>(a.exp_avg.data) + a.exp_avg.offset(row) + first;
    C* exp_avg_sq = static_cast<C*>(a.exp_avg_sq.data) + a.exp_avg_sq.offset(row) + first;
    C* master =
        a.master.data ? static_cast<C*>(a.master.data) + a.master.offset(row) + first : nullptr;
    const bool vectors = a.extent.vectors;
    C g[W], m[W], v[W], w[W];
    load(grad, valid, vectors, g);
    load(exp_avg, valid, vectors, m);
    load(exp_avg_sq, valid, vectors, v);
    if (master)
      load(master, valid, vectors, w);
    else
      load(param, valid, vectors, w);
#pragma unroll
    for (int j = 0; j < W; ++j) {
      const C scaled = g[j] * f.grad_scale;
      m[j] = fma(scaled - m[j], f.one_minus_beta1, m[j]);
      v[j] = fma(scaled * scaled, f.one_minus_beta2, v[j] * f.beta2);
      const C step = m[j] / fma(root(v[j]), f.inverse_sqrt_correction2, f.eps);
      w[j] = fma(step, f.rate, w[j] * f.decay);
    }
    store(exp_avg, valid, vectors, m);
    store(exp_avg_sq, valid, vectors, v);
    if (master) store(master, valid, vectors, w);
    store(param, valid, vectors, w);
  });
}

// ---- square_sum

constexpr int64_t kPieces = 1024;  // partial sums, whatever the GPU

struct Squares {
  Rows x;
  Extent extent;
  double* partial;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads) square_sums(const Squares a) {
  using C = Compute<T>;
  AcrossRow across_row(shared_memory<RowScratch<double, 1>>());
  double sum[1] = {0};
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    C x[kPack<T>];
    load(static_cast<const T*>(a.x.data) + a.x.offset(row) + first, valid, a.extent.vectors, x);
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) x[j] *= x[j];
    sum[0] += added(x);
  });
  across_row(sum, Add());
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum[0];
}

__global__ void __launch_bounds__(kElementThreads)
    add_partial(const double* partial, int64_t count, double* out) {
  AcrossRow across_row(shared_memory<RowScratch<double, 1>>());
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) sum[0] += partial[i];
  across_row(sum, Add());
  if (threadIdx.x == 0) *out = sum[0];
}

}  // namespace

void adamw(const AdamW& op, Stream stream) {
  const OnDevice device(op.param);
  with_type(op.param.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    Tensor t[] = {op.param, op.grad, op.exp_avg, op.exp_avg_sq, op.master};
    const Extent extent = extent_of<T>(t, 5);
    if (extent.rows == 0 || extent.D == 0) return;
    const Update<C> a{rows_of(t[0]), rows_of(t[1]), rows_of(t[2]), rows_of(t[3]),
                      rows_of(t[4]), extent,        Factors<C>(op)};
    launch("adamw", adamw_kernel<T>, element_grid<T>(extent), stream, a);
  });
}

void square_sum(const SquareSum& op, Stream stream) {
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    Tensor x = op.x;
    const Extent extent = extent_of<T>(&x, 1);
    Grid grid = element_grid<T>(extent);
    if (grid.blocks.x > kPieces) grid.blocks.x = kPieces;
    const int64_t pieces = extent.rows == 0 || extent.D == 0 ? 0 : grid.blocks.x;
    const Workspace partial(pieces * sizeof(double), stream);
    grid.shared = sizeof(RowScratch<double, 1>);
    if (pieces > 0)
      launch("square_sum", square_sums<T>, grid, stream,
             Squares{rows_of(x), extent, partial.at<double>()});
    grid.blocks.x = 1;
    launch("add_partial", add_partial, grid, stream, partial.at<double>(), pieces,
           static_cast<double*>(op.out.data));
  });
}

}  // namespace pykern::cuda

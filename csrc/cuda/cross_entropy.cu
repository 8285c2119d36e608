// cross_entropy: one block per row. Forward reads the logits once, with a running maximum per
// thread; backward reads them once and writes their gradient, in place if asked. A label that is
// neither a class nor ignore_index, which no kernel can refuse: loss and gradient are NaN.
#include "cuda/math.cuh"
#include "cuda/pieces.cuh"
#include "ops/cross_entropy.h"

namespace pykern::cuda {
namespace {

// One double or float per row.
struct PerRow {
  Rows rows;
  bool wide;  // double

  __device__ __forceinline__ double get(int64_t row) const {
    const int64_t at = rows.offset(row);
    return wide ? static_cast<const double*>(rows.data)[at]
                : static_cast<const float*>(rows.data)[at];
  }
  __device__ __forceinline__ void set(int64_t row, double x) const {
    const int64_t at = rows.offset(row);
    if (wide)
      static_cast<double*>(rows.data)[at] = x;
    else
      static_cast<float*>(rows.data)[at] = static_cast<float>(x);
  }
};

PerRow per_row(const Tensor& t) { return {rows_of(column(t)), t.dtype == DType::f64}; }

template <class T>
struct Forward {
  Rows logits, target;
  PerRow loss, lse;
  CrossEntropyOptions options;
  int64_t rows;
  Pieces<T> pieces;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_forward_kernel(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  AcrossRow across_row(shared_memory<RowScratch<double, 2>>());
  const Pieces<T>& pieces = a.pieces;
  const int64_t chunks = pieces.chunks(), V = pieces.D;
  const CrossEntropyOptions& o = a.options;

  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.logits.data) + a.logits.offset(row);
    const int64_t y = static_cast<const int64_t*>(a.target.data)[a.target.offset(row)];
    if (y == o.ignore_index) {
      if (threadIdx.x == 0) a.loss.set(row, 0), a.lse.set(row, 0);
      continue;
    }
    C most = -INFINITY;
    double sum = 0, total = 0;  // of exp(x - most), and of x
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      pieces.each_pack(chunk, [&](int, int64_t first, int64_t valid) {
        C v[W], e[W];
        load(x + first, valid, pieces.vectors, v);
        C top = most;
#pragma unroll
        for (int j = 0; j < W; ++j) top = j < valid ? Larger()(top, v[j]) : top;
        if (top > most) {
          sum *= exp(static_cast<double>(most) - static_cast<double>(top));
          most = top;
        }
        const C shift = top == -INFINITY ? C(0) : top;  // -inf - -inf is NaN
#pragma unroll
        for (int j = 0; j < W; ++j) e[j] = j < valid ? exponential(v[j] - shift) : C(0);
        sum += added(e);
        if (o.label_smoothing > 0) {
#pragma unroll
          for (int j = 0; j < W; ++j) v[j] = j < valid ? v[j] : C(0);
          total += added(v);
        }
      });
    double top[2] = {most, -INFINITY};
    across_row(top, Larger());
    double sums[2] = {most == -INFINITY ? sum : sum * exp(most - top[0]), total};
    across_row(sums, Add());
    if (threadIdx.x > 0) continue;

    const double e = o.label_smoothing, lse = top[0] + log(sums[0]);
    double loss = 0;  // a factor of 0 must not meet an infinity
    if (lse == -INFINITY) {
      loss = INFINITY;
    } else {
      const double x_y = y >= 0 && y < V ? static_cast<double>(widen(x[y])) : NAN;
      if (e < 1) loss += (1 - e) * (lse - x_y);
      if (e > 0) loss += e * (lse - sums[1] / static_cast<double>(V));
      if (o.z_loss > 0) loss += o.z_loss * lse * lse;
    }
    a.loss.set(row, y >= 0 && y < V ? loss : NAN);
    a.lse.set(row, lse);
  }
}

template <class T>
struct Backward {
  Rows logits, target, dlogits;
  Numbers<T>
      gradients;  // those of dlogits: a half type beside float logits in linear_cross_entropy
  PerRow dloss, lse;
  CrossEntropyOptions options;
  int64_t rows;
  Pieces<T> pieces;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) cross_entropy_backward_kernel(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const Pieces<T>& pieces = a.pieces;
  const int64_t chunks = pieces.chunks(), V = pieces.D;
  const CrossEntropyOptions& o = a.options;

  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.logits.data) + a.logits.offset(row);
    const int64_t dx = a.dlogits.offset(row);
    const int64_t y = static_cast<const int64_t*>(a.target.data)[a.target.offset(row)];
    const bool ignored = y == o.ignore_index, known = y >= 0 && y < V;
    const double lse = a.lse.get(row), dloss = known ? a.dloss.get(row) : double(NAN);
    const bool nothing = ignored || (lse == -INFINITY && known);
    // lse in double: rounded to float, an lse of 1000 would be off by 3e-5, and so would all
    // probabilities
    const C center = static_cast<C>(lse);
    const double rate = dloss * (1 + 2 * o.z_loss * lse);
    const double everywhere = -dloss * o.label_smoothing / static_cast<double>(V);
    const C scale = static_cast<C>(rate * exp(static_cast<double>(center) - lse));
    const C offset = static_cast<C>(everywhere);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      pieces.each_pack(chunk, [&](int, int64_t first, int64_t valid) {
        C v[W], d[W];
        if (!nothing) load(x + first, valid, pieces.vectors, v);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          d[j] = nothing ? C(0) : fma(exponential(v[j] - center), scale, offset);
          if (first + j == y && !nothing)  // dx may be x: this thread read it and writes it
            d[j] = static_cast<C>(rate * exp(static_cast<double>(v[j]) - lse) -
                                  dloss * (1 - o.label_smoothing) + everywhere);
        }
        a.gradients.store(dx + first, valid, pieces.vectors, d);
      });
  }
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& op, Stream stream) {
  const int64_t V = op.logits.size[op.logits.rank - 1], rows = pykern::rows(op.logits);
  if (rows == 0) return;
  const OnDevice device(op.logits);
  with_type(op.logits.dtype, [&]<class T>(T) {
    const Forward<T> a{.logits = rows_of(op.logits),
                       .target = rows_of(column(op.target)),
                       .loss = per_row(op.loss),
                       .lse = per_row(op.lse),
                       .options = op.options,
                       .rows = rows,
                       .pieces = {V, takes_packs<T>(op.logits)}};
    launch("cross_entropy_forward", cross_entropy_forward_kernel<T>,
           row_grid<double, 2>(T{}, rows, V, 1), stream, a);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& op, Stream stream) {
  const int64_t V = op.logits.size[op.logits.rank - 1], rows = pykern::rows(op.logits);
  if (rows == 0 || V == 0) return;
  const OnDevice device(op.logits);
  with_type(op.logits.dtype, [&]<class T>(T) {
    const Backward<T> a{.logits = rows_of(op.logits),
                        .target = rows_of(column(op.target)),
                        .dlogits = rows_of(op.dlogits),
                        .gradients = numbers_of<T>(op.dlogits),
                        .dloss = per_row(op.dloss),
                        .lse = per_row(op.lse),
                        .options = op.options,
                        .rows = rows,
                        .pieces = {V, take_packs<T>({&op.logits, &op.dlogits})}};
    launch("cross_entropy_backward", cross_entropy_backward_kernel<T>,
           row_grid<double, 2>(T{}, rows, V, 1), stream, a);
  });
}

}  // namespace pykern::cuda

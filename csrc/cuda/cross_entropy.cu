// cross_entropy: one row of a block's threads for each row, which walks through a ring. Forward
// reads the logits once, with a running maximum per thread; backward reads them once and writes
// their gradient, in place if asked. A label that is neither a class nor ignore_index, which no
// kernel can refuse: loss and gradient are NaN.
#include "cuda/exp_sum.cuh"
#include "cuda/ring.cuh"
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
struct LogitRows {
  Rows logits, target;
  CrossEntropyOptions options;
  int64_t rows;
  Pieces<T> pieces;

  __device__ __forceinline__ int64_t label(int64_t row) const {
    return static_cast<const int64_t*>(target.data)[target.offset(row)];
  }
};

template <class T>
struct Forward {
  LogitRows<T> logits;
  PerRow loss, lse;
};

template <class T>
struct ForwardShared {
  ExpSumScratch<T, double> sums;
  alignas(16) T ring[];
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kHalf<T> ? 2 : 1)
    cross_entropy_forward_kernel(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const LogitRows<T>& w = a.logits;
  auto& shared = shared_memory<ForwardShared<T>>();
  ExpSumAcrossRow<T, double> across_row(shared.sums);
  const Ring<T> ring(shared.ring, Ring<T>::plan_of_one());
  const CrossEntropyOptions& o = w.options;
  const int chunks = static_cast<int>(w.pieces.chunks());
  const int64_t V = w.pieces.D, together = blockDim.y;
  const bool smooth = o.label_smoothing > 0;
  const auto counts = [&](int64_t row) { return w.label(row) != o.ignore_index; };
  Chunks coming(ring, w.logits, w.rows, w.pieces, 1, counts);

  for (int64_t begin = blockIdx.x * together; begin < w.rows; begin += gridDim.x * together) {
    const int64_t row = begin + threadIdx.y;
    const bool there = row < w.rows;
    const int64_t y = there ? w.label(row) : o.ignore_index;
    const bool seen = y != o.ignore_index, known = y >= 0 && y < V;
    double x_y = NAN;
    if (threadIdx.x == 0 && seen && known)
      x_y = widen(static_cast<const T*>(w.logits.data)[w.logits.offset(row) + y]);

    ExpSum<T> own;
    double total = 0;  // of x
    if (seen) {
      int64_t from = w.pieces.begin();
      for (int chunk = 0; chunk < chunks; ++chunk, from += w.pieces.width()) {
        coming.next();
        w.pieces.each_pack_from(from, [&](int p, int64_t, int64_t valid, bool) {
          C x[W];
          coming.get(p, x);
          if (smooth) total += added(x);
          own.add(x, valid);
        });
      }
    }
    C shift;
    double sum;
    across_row(own, &shift, &sum);
    if (smooth) total = across_row.added_up(total);
    if (threadIdx.x > 0 || !there) continue;

    const double e = o.label_smoothing, lse = shift + log(sum);
    double loss = 0;  // a factor of 0 must not meet an infinity
    if (lse == -INFINITY) {
      loss = INFINITY;
    } else {
      if (e < 1) loss += (1 - e) * (lse - x_y);
      if (e > 0) loss += e * (lse - total / static_cast<double>(V));
      if (o.z_loss > 0) loss += o.z_loss * lse * lse;
    }
    a.loss.set(row, !seen ? 0 : known ? loss : NAN);
    a.lse.set(row, seen ? lse : 0);
  }
  cp_async_wait<0>();
}

template <class T>
struct Backward {
  LogitRows<T> logits;
  Rows dlogits;
  Numbers<T> gradients;  // a half type beside float logits in linear_cross_entropy
  PerRow dloss, lse;

  // dx[j] = rate exp(x[j] - lse) + everywhere - [j == y] label
  struct Terms {
    double lse, rate, everywhere, label;
  };
  __device__ __forceinline__ Terms terms(int64_t row, int64_t y) const {
    const CrossEntropyOptions& o = logits.options;
    const double own = lse.get(row);
    const bool known = y >= 0 && y < logits.pieces.D;
    if (own == -INFINITY) return {0, 0, known ? 0 : double(NAN), 0};  // nothing but -inf
    const double d = known ? dloss.get(row) : double(NAN);
    return {own, d * (1 + 2 * o.z_loss * own),
            -d * o.label_smoothing / static_cast<double>(logits.pieces.D),
            d * (1 - o.label_smoothing)};
  }
};

// A place is asked for, read and written by one thread, in this order: the gradient may stand where
// the logits are.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kHalf<T> ? 2 : 1)
    cross_entropy_backward_kernel(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const LogitRows<T>& w = a.logits;
  const Ring<T> ring(reinterpret_cast<T*>(&shared_memory<uint4>()), Ring<T>::plan_of_one());
  const Pieces<T>& pieces = w.pieces;
  const int chunks = static_cast<int>(pieces.chunks());
  const int64_t together = blockDim.y;
  const auto counts = [&](int64_t row) { return w.label(row) != w.options.ignore_index; };
  Chunks coming(ring, w.logits, w.rows, pieces, 1, counts);

  for (int64_t row = blockIdx.x * together + threadIdx.y; row < w.rows;
       row += gridDim.x * together) {
    const int64_t dx = a.dlogits.offset(row), y = w.label(row);
    if (y == w.options.ignore_index) {
      const C zeros[W] = {};
      for (int chunk = 0; chunk < chunks; ++chunk)
        pieces.each_pack(chunk, [&](int, int64_t first, int64_t valid) {
          a.gradients.store(dx + first, valid, pieces.vectors, zeros);
        });
      continue;
    }
    const auto row_terms = a.terms(row, y);
    // lse in double: rounded to float, an lse of 1000 would be off by 3e-5, and so would all
    // probabilities
    const C center = static_cast<C>(row_terms.lse);
    const C scale = static_cast<C>(row_terms.rate * exp(center - row_terms.lse));
    const C offset = static_cast<C>(row_terms.everywhere);
    bool owner = false;  // of the label's place
    C x_y = 0;
    int64_t from = pieces.begin();
    for (int chunk = 0; chunk < chunks; ++chunk, from += pieces.width()) {
      coming.next();
      pieces.each_pack_from(from, [&](int p, int64_t first, int64_t valid, bool vectors) {
        C x[W], d[W];
        coming.get(p, x);
        if (static_cast<uint64_t>(y - first) < W) {
          owner = true;
#pragma unroll
          for (int j = 0; j < W; ++j) x_y = first + j == y ? x[j] : x_y;
        }
#pragma unroll
        for (int j = 0; j < W; ++j) d[j] = fma(exponential_for<T>(x[j] - center), scale, offset);
        a.gradients.store(dx + first, valid, vectors, d);
      });
    }
    if (owner) {  // in double: two terms may cancel
      const auto t = a.terms(row, y);
      const C d[1] = {static_cast<C>(t.rate * exp(x_y - t.lse) - t.label + t.everywhere)};
      a.gradients.store(dx + y, 1, false, d);
    }
  }
  cp_async_wait<0>();
}

template <class T>
LogitRows<T> rows_of_logits(const Tensor& logits, const Tensor& target,
                            const CrossEntropyOptions& options, bool vectors) {
  const int64_t V = logits.size[logits.rank - 1];
  return {.logits = rows_of(logits),
          .target = rows_of(column(target)),
          .options = options,
          .rows = pykern::rows(logits),
          .pieces = {V, vectors}};
}

template <class T>
Grid logits_grid(const LogitRows<T>& logits) {
  const int threads = row_threads<T>(logits.pieces.D), together = rows_together<T>(logits.pieces.D);
  return {.blocks = dim3(walking_blocks(ceil_div(logits.rows, together), threads * together)),
          .threads = dim3(threads, together),
          .shared = Ring<T>::plan(threads * together, 1).bytes};
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& op, Stream stream) {
  if (pykern::rows(op.logits) == 0) return;
  const OnDevice device(op.logits);
  with_type(op.logits.dtype, [&]<class T>(T) {
    const Forward<T> a{
        .logits = rows_of_logits<T>(op.logits, op.target, op.options, takes_packs<T>(op.logits)),
        .loss = per_row(op.loss),
        .lse = per_row(op.lse)};
    Grid grid = logits_grid(a.logits);
    grid.shared += sizeof(ForwardShared<T>);
    launch("cross_entropy_forward", cross_entropy_forward_kernel<T>, grid, stream, a);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& op, Stream stream) {
  if (pykern::rows(op.logits) == 0 || op.logits.size[op.logits.rank - 1] == 0) return;
  const OnDevice device(op.logits);
  with_type(op.logits.dtype, [&]<class T>(T) {
    const bool vectors = take_packs<T>({&op.logits, &op.dlogits});
    const Backward<T> a{.logits = rows_of_logits<T>(op.logits, op.target, op.options, vectors),
                        .dlogits = rows_of(op.dlogits),
                        .gradients = numbers_of<T>(op.dlogits),
                        .dloss = per_row(op.dloss),
                        .lse = per_row(op.lse)};
    launch("cross_entropy_backward", cross_entropy_backward_kernel<T>, logits_grid(a.logits),
           stream, a);
  });
}

}  // namespace pykern::cuda

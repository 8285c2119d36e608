// layer_norm and rms_norm, one row at a time: the row stays in cache between the passes.
//   forward   out = xhat weight + bias,  xhat = (h - mean) rstd     (rms: mean = 0, no bias)
//   backward  g = dout weight,  dh = rstd (g - mean g - xhat mean(g xhat)) + dsum
//             dweight = sum over rows of dout xhat,  dbias = sum over rows of dout
#include "ops/norm.h"

#include "cpu/norm_rows.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kGrain = 16384;  // numbers per task: tens of kilobytes

template <bool centred>
static Status forward(const NormForward& op, int threads) {
  const int64_t D = row_length(op.x), rows = row_count(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const Numbers<C> weight(op.weight), bias(op.bias), out(op.out);
    parallel_rows(rows, kGrain / (D + 1) + 1, threads, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row) {
        const T* h = row_of<T>(op.x, row);
        if (op.residual.given) {
          T* sum = row_of<T>(op.sum, row);
          add_row(h, row_of<const T>(op.residual, row), sum, D);
          h = sum;
        }
        C mean, rstd;
        normalise_row<centred>(h, D, weight, bias, op.eps, out, row_offset(op.out, row), &mean,
                               &rstd);
        if constexpr (centred) static_cast<C*>(op.mean.data)[row] = mean;
        static_cast<C*>(op.rstd.data)[row] = rstd;
      }
    });
  });
  return Status::ok;
}

// The sums over rows for dweight and dbias. Rows are dealt to tasks by their number alone, so the
// result does not depend on the thread count. A few rows are added in C, the rest in double: the
// error does not grow with the number of rows.
template <class C>
class ColumnSums {
 public:
  ColumnSums(int64_t rows, int64_t D, int threads)
      : D_(D),
        rows_(rows),
        per_task_(rows > kTasks * kLeast ? (rows + kTasks - 1) / kTasks : kLeast),
        few_(2 * D * sizeof(C), threads),
        total_(2 * D * sizeof(double) * tasks()) {}

  bool ok() const { return few_.ok() && total_.ok(); }
  int64_t tasks() const { return (rows_ + per_task_ - 1) / per_task_; }

  // body(row, dweight, dbias) adds one row into its two sums.
  template <class Body>
  void run(int threads, const Body& body) {
    parallel_for(tasks(), threads, [&](int64_t task, int thread) {
      C* few = few_.template at<C>(thread);
      double* total = total_.template at<double>() + task * 2 * D_;
      for (int64_t i = 0; i < 2 * D_; ++i) few[i] = 0, total[i] = 0;
      const int64_t last = (task + 1) * per_task_ < rows_ ? (task + 1) * per_task_ : rows_;
      for (int64_t row = task * per_task_; row < last; ++row) {
        body(row, few, few + D_);
        if ((row + 1) % kFew != 0 && row + 1 != last) continue;
        for (int64_t i = 0; i < 2 * D_; ++i) total[i] += few[i], few[i] = 0;
      }
    });
  }

  // out[i] = the sum of column i: which = 0 for dweight, 1 for dbias
  void finish(int which, Numbers<C> out, int threads) const {
    parallel_rows(D_, kColumns, threads, [&](int64_t first, int64_t last, int) {
      double sum[kColumns] = {};
      for (int64_t task = 0; task < tasks(); ++task) {
        const double* total = total_.template at<double>() + (2 * task + which) * D_;
        for (int64_t i = first; i < last; ++i) sum[i - first] += total[i];
      }
      C numbers[kColumns];
      for (int64_t i = first; i < last; ++i) numbers[i - first] = static_cast<C>(sum[i - first]);
      each_vector<C>(last - first,
                     [&](int64_t i, int n) { out.store(first + i, load_n(numbers + i, n), n); });
    });
  }

 private:
  static constexpr int64_t kTasks = 128;  // more than there are cores, mostly
  static constexpr int64_t kLeast = 32;   // rows of a task: the totals stay small beside the input
  static constexpr int64_t kFew = 16;     // rows added in C, as in a pairwise sum
  static constexpr int64_t kColumns = 128;
  int64_t D_, rows_, per_task_;
  Scratch few_, total_;
};

// The arguments of one row of the backward pass.
template <class T>
struct RowBackward {
  using C = Compute<T>;
  const T *h, *dsum;
  Numbers<C> weight, dout;  // weight without data: 1 everywhere
  int64_t dout_row;
  T* dh;
  C *dweight, *dbias;  // null when not wanted
  C mean, rstd;
};

// g of n numbers
template <class C>
[[gnu::always_inline]] static inline Vec<C> scaled(Vec<C> dout, Numbers<C> weight, int64_t i,
                                                   int n) {
  return weight.data ? dout * weight.load(i, n) : dout;
}

template <bool centred, class T, class C = Compute<T>>
static void backward_row(RowBackward<T> row, int64_t D) {
  using V = Vec<C>;
  // not a structured binding: the loops below capture these, and Clang 16 refuses that under OpenMP
  const auto x = row.h, dsum = row.dsum;
  const auto weight = row.weight, dout = row.dout;
  const int64_t first = row.dout_row;
  const auto dh = row.dh;
  const auto dweight = row.dweight, dbias = row.dbias;
  const V mean = V::splat(row.mean), rstd = V::splat(row.rstd);

  C sum[2];  // of g and g xhat
  sum_row(D, sum, [&](int64_t i, int n, V* t) {
    const V xhat = (load_n(x + i, n) - mean) * rstd;
    t[0] = scaled(dout.load(first + i, n), weight, i, n);
    t[1] = t[0] * xhat;
  });
  const V mean_g = V::splat(centred ? sum[0] / static_cast<C>(D) : C(0));
  const V mean_gx = V::splat(sum[1] / static_cast<C>(D));

  each_vector<C>(D, [&](int64_t i, int n) {
    const V xhat = (load_n(x + i, n) - mean) * rstd, dy = dout.load(first + i, n);
    V dx = fma(-xhat, mean_gx, scaled(dy, weight, i, n) - mean_g) * rstd;
    if (dsum) dx = dx + load_n(dsum + i, n);
    store_n(dh + i, dx, n);
    if (dweight) store_n(dweight + i, fma(dy, xhat, load_n(dweight + i, n)), n);
    if (dbias) store_n(dbias + i, load_n(dbias + i, n) + dy, n);
  });
}

template <bool centred>
static Status backward(const NormBackward& op, int threads) {
  const int64_t D = row_length(op.h), rows = row_count(op.h);
  Status status = Status::ok;
  with_type(op.h.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const auto one_row = [&](int64_t row, C* dweight, C* dbias) {
      const RowBackward<T> arguments{
          .h = row_of<const T>(op.h, row),
          .dsum = op.dsum.given ? row_of<const T>(op.dsum, row) : nullptr,
          .weight = Numbers<C>(op.weight),
          .dout = Numbers<C>(op.dout),
          .dout_row = row_offset(op.dout, row),
          .dh = row_of<T>(op.dh, row),
          .dweight = op.dweight.given ? dweight : nullptr,
          .dbias = op.dbias.given ? dbias : nullptr,
          .mean = centred ? static_cast<const C*>(op.mean.data)[row] : C(0),
          .rstd = static_cast<const C*>(op.rstd.data)[row]};
      backward_row<centred>(arguments, D);
    };
    if (!op.dweight.given && !op.dbias.given) {
      parallel_rows(rows, kGrain / (D + 1) + 1, threads, [&](int64_t first, int64_t last, int) {
        for (int64_t row = first; row < last; ++row) one_row(row, nullptr, nullptr);
      });
      return;
    }
    ColumnSums<C> sums(rows, D, threads);
    if (!sums.ok()) {
      status = Status::out_of_memory;
      return;
    }
    sums.run(threads, one_row);
    if (op.dweight.given) sums.finish(0, Numbers<C>(op.dweight), threads);
    if (op.dbias.given) sums.finish(1, Numbers<C>(op.dbias), threads);
  });
  return status;
}

}  // namespace

Status layer_norm_forward(const LayerNormForward& op, int threads) {
  return forward<true>(op, threads);
}
Status rms_norm_forward(const RmsNormForward& op, int threads) {
  return forward<false>(op, threads);
}
Status layer_norm_backward(const LayerNormBackward& op, int threads) {
  return backward<true>(op, threads);
}
Status rms_norm_backward(const RmsNormBackward& op, int threads) {
  return backward<false>(op, threads);
}

PYKERN_END_ISA

// linear_cross_entropy: the logits x weight^T + bias exist for kColumns classes at a time. Forward
// carries the running maximum and sum of every row from one block of classes to the next; backward
// computes each block again and turns it into its gradient, which two products consume at once.
#include "cpu/cross_entropy_rows.h"
#include "cpu/gemm.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kColumns =
    1024;  // classes of a block: a multiple of what a row's sums take at once
static_assert(kColumns % kBlock == 0);

template <class T>
struct Problem {
  using C = Compute<T>;
  int64_t M, K, V;
  Matrix<T> x, weight;  // weight [V, K]
  const T* bias;        // null: none
  const int64_t* target;
  int64_t target_step;
  CrossEntropyOptions options;

  template <class Op>
  explicit Problem(const Op& op)
      : M(op.x.size[0]),
        K(op.x.size[1]),
        V(op.weight.size[0]),
        x{static_cast<const T*>(op.x.data), op.x.stride[0], 1},
        weight{static_cast<const T*>(op.weight.data), op.weight.stride[0], 1},
        bias(op.bias.given ? static_cast<const T*>(op.bias.data) : nullptr),
        target(static_cast<const int64_t*>(op.target.data)),
        target_step(op.target.stride[0]),
        options(op.options) {}

  int64_t label(int64_t row) const { return target[row * target_step]; }
  bool ignored(int64_t row) const { return label(row) == options.ignore_index; }

  // logits [M, n] of the classes first .. first + n - 1
  Status logits(int64_t first, int64_t n, C* out, int threads) const {
    return gemm<T>(M, n, K, x, {weight.data + first * weight.row, 1, weight.row}, threads,
                   [&](int64_t row, int64_t column, Vec<C> y, int lanes) {
                     if (bias) y = y + load_n(bias + first + column, lanes);
                     store_n(out + row * n + column, y, lanes);
                   });
  }
};

// body(first, n) over the blocks of classes
template <class Body>
static Status each_block(int64_t V, const Body& body) {
  Status status = Status::ok;
  for (int64_t first = 0; first < V && status == Status::ok; first += kColumns)
    status = body(first, V - first < kColumns ? V - first : kColumns);
  return status;
}

static double stat(const Tensor& t, int64_t row) {
  return t.dtype == DType::f64 ? static_cast<const double*>(t.data)[row * t.stride[0]]
                               : static_cast<const float*>(t.data)[row * t.stride[0]];
}

static void set_stat(const Tensor& t, int64_t row, double value) {
  if (t.dtype == DType::f64)
    static_cast<double*>(t.data)[row * t.stride[0]] = value;
  else
    static_cast<float*>(t.data)[row * t.stride[0]] = static_cast<float>(value);
}

constexpr int64_t kRows = 16;  // of a task: 16 K exponentials

template <class T>
static Status forward(const LinearCrossEntropyForward& op, int threads) {
  using C = Compute<T>;
  const Problem<T> p(op);
  const Scratch logits(p.M * kColumns * sizeof(C));
  const Scratch all_sums(p.M * sizeof(RowSums<C>)), at_label(p.M * sizeof(C));
  if (!logits.ok() || !all_sums.ok() || !at_label.ok()) return Status::out_of_memory;
  RowSums<C>* sums = all_sums.template at<RowSums<C>>();
  for (int64_t row = 0; row < p.M; ++row) sums[row] = {};

  const Status status = each_block(p.V, [&](int64_t first, int64_t n) {
    const C* x = logits.template at<C>();
    const Status done = p.logits(first, n, logits.template at<C>(), threads);
    if (done != Status::ok) return done;
    parallel_rows(p.M, kRows, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        if (p.ignored(row)) continue;
        const int64_t y = p.label(row) - first;
        if (y >= 0 && y < n) at_label.template at<C>()[row] = x[row * n + y];
        if (p.options.label_smoothing > 0)
          add_numbers<true>(&sums[row], x + row * n, n);
        else
          add_numbers<false>(&sums[row], x + row * n, n);
      }
    });
    return Status::ok;
  });
  if (status != Status::ok) return status;
  for (int64_t row = 0; row < p.M; ++row) {
    RowLoss result = {0, 0};
    if (!p.ignored(row))
      result = loss_of(sums[row], p.V, at_label.template at<C>()[row], p.options);
    set_stat(op.loss, row, result.loss);
    set_stat(op.lse, row, result.lse);
  }
  return Status::ok;
}

// x with the ignored rows replaced by zeros, when one of them would turn 0 * x into NaN: in memory
// of its own, else x itself.
template <class T>
static Matrix<T> without_ignored(const Problem<T>& p, const Scratch& memory) {
  using V = Vec<Compute<T>>;
  T* rows = memory.template at<T>();
  V probe = V::zero();
  for (int64_t row = 0; row < p.M; ++row) {
    if (!p.ignored(row)) continue;
    each_vector<Compute<T>>(p.K, [&](int64_t i, int n) {
      probe = fma(load_n(p.x.data + row * p.x.row + i, n), V::zero(), probe);
    });
  }
  if (bits_of(probe != probe) == 0) return p.x;
  for (int64_t row = 0; row < p.M; ++row) {
    if (p.ignored(row))
      memset(static_cast<void*>(rows + row * p.K), 0, p.K * sizeof(T));
    else
      memcpy(rows + row * p.K, p.x.data + row * p.x.row, p.K * sizeof(T));
  }
  return {rows, p.K, 1};
}

template <class T>
static Status backward(const LinearCrossEntropyBackward& op, int threads) {
  using C = Compute<T>;
  const Problem<T> p(op);
  const int64_t K = p.K;
  const Scratch logits(p.M * kColumns * sizeof(C)), gradients(p.M * kColumns * sizeof(T));
  const Scratch dx(op.dx.given ? p.M * K * sizeof(C) : 0);
  const Scratch read(op.dweight.given ? p.M * K * sizeof(T) : 0);
  if (!logits.ok() || !gradients.ok() || !dx.ok() || !read.ok()) return Status::out_of_memory;
  const Matrix<T> x_read = op.dweight.given ? without_ignored(p, read) : p.x;

  const Status status = each_block(p.V, [&](int64_t first, int64_t n) {
    C* x = logits.template at<C>();
    T* dlogits = gradients.template at<T>();
    Status done = p.logits(first, n, x, threads);
    if (done != Status::ok) return done;
    parallel_rows(p.M, kRows, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        if (p.ignored(row))
          memset(dlogits + row * n, 0, n * sizeof(T));
        else
          row_gradient(x + row * n, n, p.V, p.label(row) - first, stat(op.lse, row),
                       stat(op.dloss, row), p.options, dlogits + row * n);
      }
    });
    if (op.dx.given)
      done = gemm<T>(p.M, K, n, {dlogits, n, 1},
                     {p.weight.data + first * p.weight.row, p.weight.row, 1}, threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int lanes) {
                       C* sum = dx.template at<C>() + row * K + column;
                       if (first > 0) y = load_n(sum, lanes) + y;
                       store_n(sum, y, lanes);
                     });
    if (op.dweight.given && done == Status::ok)
      done = gemm<T>(n, K, p.M, {dlogits, 1, n}, x_read, threads,
                     [&](int64_t row, int64_t column, Vec<C> y, int lanes) {
                       store_n(row_of<T>(op.dweight, first + row) + column, y, lanes);
                     });
    if (op.dbias.given)
      column_sums<T>(p.M, n, {dlogits, n, 1}, static_cast<T*>(op.dbias.data) + first, threads);
    return done;
  });
  if (status != Status::ok) return status;
  if (op.dx.given)
    parallel_rows(p.M, kRows, threads, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row)
        each_vector<C>(K, [&](int64_t i, int lanes) {
          const bool none = p.V == 0 || p.ignored(row);  // 0 even where weight is not finite
          store_n(row_of<T>(op.dx, row) + i,
                  none ? Vec<C>::zero() : load_n(dx.template at<C>() + row * K + i, lanes), lanes);
        });
    });
  return Status::ok;
}

}  // namespace

Status linear_cross_entropy_forward(const LinearCrossEntropyForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

Status linear_cross_entropy_backward(const LinearCrossEntropyBackward& op, int threads) {
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = backward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

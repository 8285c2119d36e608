// linear_cross_entropy: the logits x weight^T + bias exist for some rows at a time. As soon as a
// row has its loss it becomes its own gradient, in place, which two more products consume.
#include "cpu/cross_entropy_rows.h"
#include "cpu/gemm.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kLogitBytes = 40 << 20;  // of all rows at a time
constexpr int64_t kRowStep = 64;           // their number is a multiple of this
constexpr int64_t kTaskNumbers = 32768;    // exponentials of a task

// The arguments, and the part that does not change from one set of rows to the next.
template <class T>
struct Head {
  using C = Compute<T>;
  const LinearCrossEntropy& op;
  const int64_t M, K, V;
  const int64_t rows_at_once;

  explicit Head(const LinearCrossEntropy& op)
      : op(op), M(op.x.size[0]), K(op.x.size[1]), V(op.weight.size[0]), rows_at_once(at_once()) {}

  // A function of V alone, so that the order of the sums of dweight is one, too.
  int64_t at_once() const {
    const int64_t fit =
        kLogitBytes / (V * static_cast<int64_t>(sizeof(C)) + 1) / kRowStep * kRowStep;
    const int64_t rows = fit < kRowStep ? kRowStep : fit;
    return rows < M ? rows : M;
  }
  int64_t label(int64_t row) const {
    return static_cast<const int64_t*>(op.target.data)[row * op.target.stride[0]];
  }
  bool ignored(int64_t row) const { return label(row) == op.options.ignore_index; }
  bool wants_gradients() const { return op.dx.given || op.dweight.given || op.dbias.given; }
};

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

// logits [n, V] of the rows first .. first + n - 1
template <class T>
static Status make_logits(const Head<T>& h, int64_t first, int64_t n, Compute<T>* logits,
                          int threads) {
  using C = Compute<T>;
  const Numbers<C> bias(h.op.bias);
  return gemm<T>(n, h.V, h.K, Matrix<T>(h.op.x).from(first, 0), Matrix<T>(h.op.weight).transposed(),
                 threads, [&](int64_t row, int64_t column, Vec<C> y, int lanes) {
                   if (h.op.bias.given) y = y + bias.load(column, lanes);
                   store_n(logits + row * h.V + column, y, lanes);
                 });
}

// The loss of every row, and its logits replaced by their gradient of type T, from the row's start.
template <class T>
static void take_losses(const Head<T>& h, int64_t first, int64_t n, Compute<T>* logits,
                        int threads) {
  const int64_t grain = kTaskNumbers / (h.V + 1) + 1;
  parallel_rows(n, grain, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = first + i, y = h.label(row);
      Compute<T>* x = logits + i * h.V;
      T* gradient = reinterpret_cast<T*>(x);
      RowLoss result = {0, 0};
      if (!h.ignored(row)) result = row_loss(x, h.V, y, h.op.options);
      if (h.op.loss.given) set_stat(h.op.loss, row, result.loss);
      if (!h.wants_gradients()) continue;
      if (h.ignored(row))
        memset(static_cast<void*>(gradient), 0, h.V * sizeof(T));
      else
        row_gradient(x, h.V, h.V, y, result.lse, stat(h.op.dloss, row), h.op.options, gradient);
    }
  });
}

// The rows first .. of x for dweight, with those that are ignored replaced by zeros when one of
// them would turn 0 * x into NaN: in memory of its own, else x itself.
template <class T>
static Matrix<T> without_ignored(const Head<T>& h, int64_t first, int64_t n,
                                 const Scratch& memory) {
  using V = Vec<Compute<T>>;
  const Matrix<T> x = Matrix<T>(h.op.x).from(first, 0);
  const T* from = static_cast<const T*>(x.data);
  V probe = V::zero();
  for (int64_t i = 0; i < n; ++i)
    if (h.ignored(first + i))
      each_vector<Compute<T>>(h.K, [&](int64_t j, int lanes) {
        probe = fma(load_n(from + i * x.row + j, lanes), V::zero(), probe);
      });
  if (bits_of(probe != probe) == 0) return x;
  T* rows = memory.template at<T>();
  for (int64_t i = 0; i < n; ++i) {
    if (h.ignored(first + i))
      memset(static_cast<void*>(rows + i * h.K), 0, h.K * sizeof(T));
    else
      memcpy(static_cast<void*>(rows + i * h.K), from + i * x.row, h.K * sizeof(T));
  }
  return {rows, h.K, 1};
}

template <class T>
static Status run(const LinearCrossEntropy& op, int threads) {
  using C = Compute<T>;
  const Head<T> h(op);
  const int64_t K = h.K, V = h.V;
  const bool several = h.M > h.rows_at_once;
  const auto needs_memory = [&](const Tensor& t) {
    return t.given && several && t.dtype == op.x.dtype && sizeof(T) < sizeof(C);
  };
  const bool own_dweight = needs_memory(op.dweight), own_dbias = op.dbias.given && several;
  const Scratch logits(h.rows_at_once * V * sizeof(C));
  const Scratch read(op.dweight.given ? h.rows_at_once * K * sizeof(T) : 0);
  const Scratch dweight_sum(own_dweight ? V * K * sizeof(C) : 0);
  const Scratch dbias_sum(own_dbias ? 2 * V * sizeof(C) : 0);
  if (!logits.ok() || !read.ok() || !dweight_sum.ok() || !dbias_sum.ok())
    return Status::out_of_memory;
  const DType compute = sizeof(C) == 8 ? DType::f64 : DType::f32;
  // sums so far: in dweight itself where that has the accuracy of a sum
  const Numbers<C> dweight(op.dweight),
      sums = own_dweight ? Numbers<C>(dweight_sum.template at<C>(), compute) : dweight;
  C* x = logits.template at<C>();
  const T* dlogits = logits.template at<T>();
  const int64_t step = V * static_cast<int64_t>(sizeof(C) / sizeof(T));  // between rows of dlogits

  for (int64_t first = 0; first < h.M; first += h.rows_at_once) {
    const int64_t n = h.M - first < h.rows_at_once ? h.M - first : h.rows_at_once;
    const bool last = first + n == h.M;
    Status status = make_logits(h, first, n, x, threads);
    if (status != Status::ok) return status;
    take_losses(h, first, n, x, threads);
    if (op.dx.given)
      status = gemm<T>(n, K, V, {dlogits, step, 1}, Matrix<T>(op.weight), threads,
                       [&](int64_t row, int64_t column, Vec<C> y, int lanes) {
                         // 0 even where weight is not finite
                         if (h.ignored(first + row)) y = Vec<C>::zero();
                         store_n(row_of<T>(op.dx, first + row) + column, y, lanes);
                       });
    if (op.dweight.given && status == Status::ok)
      status = gemm<T>(V, K, n, {dlogits, 1, step}, without_ignored(h, first, n, read), threads,
                       [&](int64_t row, int64_t column, Vec<C> y, int lanes) {
                         const int64_t i = row_offset(op.dweight, row) + column;
                         const int64_t sum = own_dweight ? row * K + column : i;
                         if (first > 0) y = sums.load(sum, lanes) + y;
                         if (last)
                           dweight.store(i, y, lanes);
                         else
                           sums.store(sum, y, lanes);
                       });
    if (status != Status::ok) return status;
    if (op.dbias.given) {
      const Numbers<C> gradients(const_cast<T*>(dlogits), op.x.dtype);
      if (!several) {
        column_sums<C>(n, V, gradients, step, Numbers<C>(op.dbias), threads);
        continue;
      }
      C* sum = dbias_sum.template at<C>();
      C* part = first > 0 ? sum + V : sum;
      column_sums<C>(n, V, gradients, step, Numbers<C>(part, compute), threads);
      const Numbers<C> dbias(op.dbias);
      each_vector<C>(first > 0 ? V : 0, [&](int64_t i, int lanes) {
        const Vec<C> y = load_n(sum + i, lanes) + load_n(part + i, lanes);
        if (last)
          dbias.store(i, y, lanes);
        else
          store_n(sum + i, y, lanes);
      });
    }
  }
  return Status::ok;
}

// Gradients of no rows, or of no classes: zeros.
static void clear(const Tensor& t) {
  if (!t.given || t.size[t.rank - 1] == 0) return;
  const int64_t bytes = row_length(t) * (t.dtype == DType::f64 ? 8 : t.dtype == DType::f32 ? 4 : 2);
  for (int64_t row = 0; row < row_count(t); ++row)
    memset(static_cast<char*>(t.data) + row_offset(t, row) * (bytes / row_length(t)), 0, bytes);
}

}  // namespace

Status linear_cross_entropy(const LinearCrossEntropy& op, int threads) {
  if (op.x.size[0] == 0 || op.weight.size[0] == 0) {
    clear(op.dx);
    clear(op.dweight);
    clear(op.dbias);
  }
  Status status = Status::ok;
  with_type(op.x.dtype, [&]<class T>(T) { status = run<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

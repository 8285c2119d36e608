// softmax, one row at a time: the maximum, then the exponentials and their sum, then the quotients.
// The row stays in cache between the passes. Hidden places (mask false) count as -infinity.
//   backward  dx = out (dout - sum out dout),  0 where out is 0
#include "ops/softmax.h"

#include "cpu/math.h"
#include "cpu/parallel.h"
#include "cpu/reduce.h"
#include "cpu/rows.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kGrain = 16384;  // numbers per task: tens of kilobytes

// Sums in double where their error would show.
template <class T, class C, class Terms>
static C sum_terms(int64_t D, const Terms& terms) {
  C sum[1];
  if constexpr (sizeof(T) == sizeof(C))
    sum_row<Wide>(D, sum, terms);
  else
    sum_row(D, sum, terms);
  return sum[0];
}

// mask is null when all places take part. e is room for D numbers; it may be out itself.
template <class T, class C = Compute<T>>
static void softmax_row(const T* x, const uint8_t* mask, int64_t D, C* e, T* out) {
  using V = Vec<C>;
  const V hidden = V::splat(-INFINITY);
  const auto visible = [&](int64_t i, int n) {
    return lanes_of<C>(mask ? nonzero_bytes(mask + i, n) : (uint64_t{1} << n) - 1, 0);
  };
  V most = hidden;
  each_vector<C>(D, [&](int64_t i, int n) {
    V v = load_n(x + i, n);
    if (mask || n < V::lanes) v = select(visible(i, n), v, hidden);
    if (mask) store_n(e + i, v, n);
    most = max(most, v);
  });
  const C top = most.max();
  const V shift = V::splat(top == -INFINITY ? C(0) : top);  // all hidden, -infinity or NaN

  C sum = sum_terms<T, C>(D, [&](int64_t i, int n, V* t) {
    t[0] = exp((mask ? load_n(e + i, n) : load_n(x + i, n)) - shift);
    store_n(e + i, t[0], n);
  });
  if (sum == 0) sum = 1;  // nothing visible: 0 / 1

  const V total = V::splat(sum);
  const bool clear = mask && sum != sum;  // 0 / NaN: hidden places stay 0 all the same
  each_vector<C>(D, [&](int64_t i, int n) {
    V y = load_n(e + i, n) / total;
    if (clear) y = select(visible(i, n), y, V::zero());
    store_n(out + i, y, n);
  });
}

template <class T>
static void zero_row(T* out, int64_t D) {
  memset(out, 0, D * sizeof(T));
}

// A place where out is 0 was hidden, or as good as hidden: its dout must not be looked at.
template <class T, class C = Compute<T>>
static void softmax_backward_row(const T* out, const T* dout, T* dx, int64_t D) {
  using V = Vec<C>;
  const auto where_positive = [](V y, V v) { return select(y == V::zero(), V::zero(), v); };
  const V mean = V::splat(sum_terms<T, C>(D, [&](int64_t i, int n, V* t) {
    const V y = load_n(out + i, n);
    t[0] = where_positive(y, y * load_n(dout + i, n));
  }));
  each_vector<C>(D, [&](int64_t i, int n) {
    const V y = load_n(out + i, n);
    store_n(dx + i, where_positive(y, y * (load_n(dout + i, n) - mean)), n);
  });
}

}  // namespace

Status softmax_forward(const SoftmaxForward& op, int threads) {
  const int64_t D = row_length(op.x), rows = row_count(op.x);
  const bool half_wide = op.x.dtype == DType::bf16 || op.x.dtype == DType::f16;
  const Scratch exponentials(half_wide ? D * sizeof(float) : 0, threads);
  if (!exponentials.ok()) return Status::out_of_memory;
  const bool whole_rows = op.mask.given && op.mask.stride[op.mask.rank - 1] == 0;
  with_type(op.x.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const int64_t grain = kGrain / (D + 1) + 1;
    parallel_rows(rows, grain, threads, [&](int64_t first, int64_t last, int thread) {
      for (int64_t row = first; row < last; ++row) {
        const uint8_t* mask = op.mask.given ? row_of<const uint8_t>(op.mask, row) : nullptr;
        T* out = row_of<T>(op.out, row);
        if (whole_rows && D > 0) {
          if (!*mask) {
            zero_row(out, D);
            continue;
          }
          mask = nullptr;
        }
        const T* x = row_of<const T>(op.x, row);
        if constexpr (sizeof(T) == sizeof(C))
          softmax_row(x, mask, D, out, out);
        else
          softmax_row(x, mask, D, exponentials.at<C>(thread), out);
      }
    });
  });
  return Status::ok;
}

Status softmax_backward(const SoftmaxBackward& op, int threads) {
  const int64_t D = row_length(op.out);
  with_type(op.out.dtype, [&]<class T>(T) {
    const int64_t grain = kGrain / (D + 1) + 1;
    parallel_rows(row_count(op.out), grain, threads, [&](int64_t first, int64_t last, int) {
      for (int64_t row = first; row < last; ++row)
        softmax_backward_row(row_of<const T>(op.out, row), row_of<const T>(op.dout, row),
                             row_of<T>(op.dx, row), D);
    });
  });
  return Status::ok;
}

PYKERN_END_ISA

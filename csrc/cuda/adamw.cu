// AdamW in one pass: every number of param, grad and the two moments is read once and written once.
// And the sum of squares that gradient clipping needs, in pieces that are added in their order.
// Contiguous tensors go many to a launch, cut into chunks, a block per chunk; others one by one.
#include <math.h>

#include <vector>

#include "cuda/elementwise.cuh"
#include "cuda/many.cuh"
#include "cuda/math.cuh"
#include "cuda/reduce.cuh"
#include "ops/adamw.h"

namespace pykern::cuda {
namespace {

// The scalars of the formula, computed in double and rounded once.
template <class C>
struct Factors {
  C one_minus_beta1, beta2, one_minus_beta2, inverse_sqrt_correction2, eps, decay, rate;
  double grad_scale;
  const double* scale;  // on the device, which multiplies grad_scale; null: 1

  explicit Factors(const AdamW& op)
      : one_minus_beta1(static_cast<C>(1.0 - op.beta1)),
        beta2(static_cast<C>(op.beta2)),
        one_minus_beta2(static_cast<C>(1.0 - op.beta2)),
        inverse_sqrt_correction2(
            static_cast<C>(1.0 / sqrt(1.0 - pow(op.beta2, static_cast<double>(op.step))))),
        eps(static_cast<C>(op.eps)),
        decay(static_cast<C>(1.0 - op.lr * op.weight_decay)),
        rate(static_cast<C>(-op.lr / (1.0 - pow(op.beta1, static_cast<double>(op.step))))),
        grad_scale(op.grad_scale),
        scale(static_cast<const double*>(op.scale.data)) {}

  __device__ __forceinline__ double whole_scale() const {
    return scale ? grad_scale * *scale : grad_scale;
  }
};

// One pack of each tensor; w reads and writes the master where there is one.
template <class T, class C>
__device__ __forceinline__ void update(const Factors<C>& f, C scale, T* param, const T* grad,
                                       C* exp_avg, C* exp_avg_sq, C* master, int64_t valid,
                                       bool vectors) {
  constexpr int W = kPack<T>;
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
    const C scaled = product(g[j], scale);
    m[j] = fma(scaled - m[j], f.one_minus_beta1, m[j]);
    v[j] = fma(scaled * scaled, f.one_minus_beta2, v[j] * f.beta2);
    const C step = m[j] / fma(root(v[j]), f.inverse_sqrt_correction2, f.eps);
    w[j] = fma(step, f.rate, w[j] * f.decay);
  }
  store(exp_avg, valid, vectors, m);
  store(exp_avg_sq, valid, vectors, v);
  if (master) store(master, valid, vectors, w);
  store(param, valid, vectors, w);
}

struct FlatState {
  void *param, *grad, *exp_avg, *exp_avg_sq, *master;
  int64_t size;
};

constexpr int64_t kUpdateChunk = 8192;  // numbers: some packs for every thread, enough blocks
constexpr int kStates = most_in_parameters<FlatState, Factors<double>>();

template <class C>
struct ManyUpdates {
  Many<FlatState, kStates> states;
  Factors<C> f;
};
static_assert(sizeof(ManyUpdates<double>) <= kParameterBytes);

template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kElementThreads) adamw_many(const ManyUpdates<C> a) {
  constexpr int W = kPack<T>;
  const double scale = a.f.whole_scale();
  if (!isfinite(scale)) return;
  const Chunk chunk = a.states.chunk(blockIdx.x);
  const FlatState& s = a.states.of[chunk.tensor];
  const bool vectors = aligned(s.param, s.grad, s.exp_avg, s.exp_avg_sq, s.master);
  const int64_t begin = chunk.number * kUpdateChunk, left = s.size - begin;
  const int numbers = left < kUpdateChunk ? left : kUpdateChunk;
#pragma unroll 1
  for (int i = threadIdx.x * W; i < numbers; i += kElementThreads * W) {
    const int64_t at = begin + i;
    update(a.f, static_cast<C>(scale), static_cast<T*>(s.param) + at,
           static_cast<const T*>(s.grad) + at, static_cast<C*>(s.exp_avg) + at,
           static_cast<C*>(s.exp_avg_sq) + at, s.master ? static_cast<C*>(s.master) + at : nullptr,
           numbers - i, vectors);
  }
}

template <class T>
__device__ __forceinline__ T* pack_of(const Rows& rows, int64_t row, int64_t first) {
  return static_cast<T*>(rows.data) + rows.offset(row) + first;
}

template <class C>
struct RowsUpdate {
  Rows param, grad, exp_avg, exp_avg_sq, master;
  Extent extent;
  Factors<C> f;
};

template <class T, class C = Compute<T>>
__global__ void __launch_bounds__(kElementThreads) adamw_rows(const RowsUpdate<C> a) {
  const double scale = a.f.whole_scale();
  if (!isfinite(scale)) return;
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    update<T, C>(
        a.f, static_cast<C>(scale), pack_of<T>(a.param, row, first), pack_of<T>(a.grad, row, first),
        pack_of<C>(a.exp_avg, row, first), pack_of<C>(a.exp_avg_sq, row, first),
        a.master.data ? pack_of<C>(a.master, row, first) : nullptr, valid, a.extent.vectors);
  });
}

// ---- square_sum

constexpr int64_t kPieces = 1024;  // partial sums of a tensor that is not flat, whatever the GPU
constexpr int64_t kSquaresChunk = 16384;  // numbers of a flat one that make one partial sum

template <class T>
__device__ __forceinline__ double squares(const T* x, int64_t valid, bool vectors) {
  constexpr int W = kPack<T>;
  Compute<T> v[W], pair[W / 2];
  load(x, valid, vectors, v);
#pragma unroll
  for (int j = 0; j < W / 2; ++j) pair[j] = fma(v[j], v[j], product(v[j + W / 2], v[j + W / 2]));
  return added(pair);
}

__device__ __forceinline__ void store_sum(double own, double* to) {
  AcrossRow across_row(shared_memory<RowScratch<double, 1>>());
  double sum[1] = {own};
  across_row(sum, Add());
  if (threadIdx.x == 0) *to = sum[0];
}

struct FlatNumbers {
  const void* x;
  int64_t size;
  double* partial;  // one for each chunk
};

constexpr int kTensors = most_in_parameters<FlatNumbers, int>();
using ManySquares = Many<FlatNumbers, kTensors>;

template <class T>
__global__ void __launch_bounds__(kElementThreads) square_sums_many(const ManySquares a) {
  constexpr int W = kPack<T>, kStep = kElementThreads * W;
  const Chunk chunk = a.chunk(blockIdx.x);
  const FlatNumbers& t = a.of[chunk.tensor];
  const bool vectors = aligned(t.x);
  const int64_t begin = chunk.number * kSquaresChunk + threadIdx.x * W;
  const T* x = static_cast<const T*>(t.x) + begin;
  double sum = 0.0;
  if (vectors && chunk.number * kSquaresChunk + kSquaresChunk <= t.size) {
#pragma unroll 4  // loads under way
    for (int i = 0; i < kSquaresChunk; i += kStep) sum += squares(x + i, W, true);
  } else {
#pragma unroll 1
    for (int i = 0; i < kSquaresChunk && begin + i < t.size; i += kStep)
      sum += squares(x + i, t.size - begin - i, vectors);
  }
  store_sum(sum, t.partial + chunk.number);
}

struct RowsSquares {
  Rows x;
  Extent extent;
  double* partial;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads) square_sums_rows(const RowsSquares a) {
  double sum = 0.0;
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    sum += squares<T>(pack_of<T>(a.x, row, first), valid, a.extent.vectors);
  });
  store_sum(sum, a.partial + blockIdx.x);
}

constexpr int kSums = 900;  // of a launch: where their partial sums begin is in its parameters

struct Totals {
  const double* partial;
  double* out;
  int begin[kSums + 1];
};
static_assert(sizeof(Totals) <= kParameterBytes);

__global__ void __launch_bounds__(kElementThreads) add_partial(const Totals a) {
  const int end = a.begin[blockIdx.x + 1];
  double sum = 0.0;
  for (int i = a.begin[blockIdx.x] + threadIdx.x; i < end; i += blockDim.x) sum += a.partial[i];
  store_sum(sum, a.out + blockIdx.x);
}

// What is the same for all launches of one call.
struct Squares {
  const SquareSum& op;
  Stream stream;
  std::vector<int> begin;  // of the partial sums of each tensor

  Squares(const SquareSum& op, Stream stream) : op(op), stream(stream), begin{0} {
    for (int64_t i = 0; i < op.count; ++i)
      with_type(op.x[i].dtype, [&]<class T>(T) {
        const Tensor& x = op.x[i];
        const int64_t pieces =
            is_contiguous(x) ? ceil_div(count(x), kSquaresChunk) : rows_grid<T>(x).blocks.x;
        begin.push_back(begin.back() + static_cast<int>(pieces));
      });
  }

  template <class T>
  static Grid rows_grid(Tensor x) {
    Grid grid = element_grid<T>(extent_of<T>(&x, 1));
    if (grid.blocks.x > kPieces) grid.blocks.x = kPieces;
    grid.shared = sizeof(RowScratch<double, 1>);
    return grid;
  }

  template <class T>
  void add(DType dtype, double* partial) const {
    Batch<FlatNumbers, kTensors> batch;
    const auto launch_batch = [&](const ManySquares& many, int blocks) {
      launch("square_sum", square_sums_many<T>,
             {dim3(blocks), dim3(kElementThreads), sizeof(RowScratch<double, 1>)}, stream, many);
    };
    for (int64_t i = 0; i < op.count; ++i) {
      Tensor x = op.x[i];
      if (x.dtype != dtype) continue;
      if (is_contiguous(x))
        batch.add({x.data, count(x), partial + begin[i]}, begin[i + 1] - begin[i], launch_batch);
      else
        launch("square_sum", square_sums_rows<T>, rows_grid<T>(x), stream,
               RowsSquares{rows_of(x), extent_of<T>(&x, 1), partial + begin[i]});
    }
    batch.finish(launch_batch);
  }
};

}  // namespace

void adamw(const AdamW& op, Stream stream) {
  const OnDevice device(op.states[0].param);
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    with_type(dtype, [&]<class T>(T) {
      using C = Compute<T>;
      const Factors<C> f(op);
      Batch<FlatState, kStates> batch;
      const auto launch_batch = [&](const Many<FlatState, kStates>& states, int blocks) {
        launch("adamw", adamw_many<T>, {dim3(blocks), dim3(kElementThreads)}, stream,
               ManyUpdates<C>{states, f});
      };
      for (int64_t i = 0; i < op.count; ++i) {
        const AdamWState& s = op.states[i];
        if (s.param.dtype != dtype || count(s.param) == 0) continue;
        Tensor t[] = {s.param, s.grad, s.exp_avg, s.exp_avg_sq, s.master};
        bool flat = true;
        for (const Tensor& tensor : t) flat = flat && (!tensor.given || is_contiguous(tensor));
        if (flat) {
          const int64_t size = count(s.param);
          batch.add({t[0].data, t[1].data, t[2].data, t[3].data, t[4].data, size},
                    ceil_div(size, kUpdateChunk), launch_batch);
        } else {
          const Extent extent = extent_of<T>(t, 5);
          launch("adamw", adamw_rows<T>, element_grid<T>(extent), stream,
                 RowsUpdate<C>{rows_of(t[0]), rows_of(t[1]), rows_of(t[2]), rows_of(t[3]),
                               rows_of(t[4]), extent, f});
        }
      }
      batch.finish(launch_batch);
    });
}

void square_sum(const SquareSum& op, Stream stream) {
  const OnDevice device(op.x[0]);
  const Squares squares(op, stream);
  const Workspace partial(squares.begin.back() * sizeof(double), stream);
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16})
    with_type(dtype, [&]<class T>(T) { squares.add<T>(dtype, partial.at<double>()); });
  for (int64_t first = 0; first < op.count; first += kSums) {
    const int64_t sums = op.count - first < kSums ? op.count - first : kSums;
    Totals totals{partial.at<double>(), static_cast<double*>(op.out.data) + first, {}};
    for (int64_t i = 0; i <= sums; ++i) totals.begin[i] = squares.begin[first + i];
    launch("square_sum", add_partial,
           {dim3(sums), dim3(kElementThreads), sizeof(RowScratch<double, 1>)}, stream, totals);
  }
}

}  // namespace pykern::cuda

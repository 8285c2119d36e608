// linear: one product forward with everything else in its epilogue; backward two, of dz = dout
// activation'(pre), which is written once where it is not dout itself.
//   dx = dz weight    dweight = dz^T x    dbias = sum of the rows of dz
// A float32 weight beside a half x is rounded to a copy first.
#include "cuda/columns.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/gemm.cuh"
#include "ops/linear.h"

namespace pykern::cuda {
namespace {

// t as [rows, columns]: rows at one constant stride
Tensor as_matrix(const Tensor& t) {
  Tensor m = t;
  const int64_t columns = t.size[t.rank - 1], step = row_stride(t);
  m.rank = 2;
  m.size[0] = pykern::rows(t), m.size[1] = columns;
  m.stride[0] = step, m.stride[1] = 1;
  return m;
}

// ---- copies in T

struct Copy {
  Rows from, pre, to;
  DType dtype, pre_dtype;
  Extent extent;
  Activation activation;
};

// to = from activation'(pre), rounded to T
template <class T>
__global__ void __launch_bounds__(kElementThreads) round_rows(const Copy a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const Numbers<T> from{a.from.data, a.dtype}, pre{a.pre.data, a.pre_dtype};
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    C v[W], z[W];
    from.load(a.from.offset(row) + first, valid, a.extent.vectors, v);
    if (a.activation != Activation::none) {
      pre.load(a.pre.offset(row) + first, valid, a.extent.vectors, z);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        C value;
        v[j] *= derivative(a.activation, z[j], &value);
      }
    }
    store(static_cast<T*>(a.to.data) + a.to.offset(row) + first, valid, a.extent.vectors, v);
  });
}

// A matrix [rows, columns] in T: t itself where it is that already, else a copy in scratch memory.
template <class T>
class Rounded {
 public:
  Rounded(const Tensor& t, DType dtype, const Tensor& pre, Activation activation, Stream stream)
      : copied_(t.dtype != dtype || activation != Activation::none),
        matrix_(copied_ ? t : as_matrix(t)),
        memory_(copied_ ? count(t) * sizeof(T) : 0, stream) {
    if (!copied_) return;
    Tensor to = t;
    to.data = memory_.template at<T>(), to.dtype = dtype;
    int64_t packed = 1;
    for (int i = t.rank - 1; i >= 0; --i) to.stride[i] = packed, packed *= t.size[i];
    Tensor all[] = {t, activation == Activation::none ? Tensor{} : pre, to};
    const Extent extent = extent_of<T>(all, 3);
    if (count(t) > 0)
      launch("round_rows", round_rows<T>, element_grid<T>(extent), stream,
             Copy{rows_of(all[0]), rows_of(all[1]), rows_of(all[2]), t.dtype, pre.dtype, extent,
                  activation});
    matrix_ = as_matrix(to);
  }
  const Tensor& matrix() const { return matrix_; }
  // rows by k, or, with the k of the product along its rows, columns by k
  Factor by_k() const { return factor_of<T>(matrix_.data, matrix_.size[0], matrix_.stride[0]); }
  Factor across() const { return factor_of<T>(matrix_.data, matrix_.size[1], matrix_.stride[0]); }

 private:
  bool copied_;
  Tensor matrix_;
  Workspace memory_;
};

template <class T>
Rounded<T> rounded(const Tensor& t, DType dtype, Stream stream) {
  return Rounded<T>(t, dtype, Tensor{}, Activation::none, stream);
}

// The epilogue that writes out, and what else is given.
template <class T>
Epilogue<T> writes(const Tensor& out, const Tensor& bias = {}, const Tensor& residual = {},
                   const Tensor& pre = {}, Activation activation = Activation::none) {
  constexpr int kNeighbours = sizeof(T) == 2 ? kChunk : kPlainEach;
  bool vectors = true;
  for (const Tensor* t : {&out, &bias, &residual, &pre})
    vectors = vectors && takes_words(*t, kNeighbours);
  return {.bias = numbers_of<T>(bias),
          .residual = numbers_of<T>(residual),
          .out = numbers_of<T>(out),
          .pre = numbers_of<T>(pre),
          .residual_rows = rows_of(residual),
          .out_rows = rows_of(out),
          .pre_rows = rows_of(pre),
          .activation = activation,
          .vectors = vectors};
}

// ---- sums of columns

constexpr int kSumThreads = 128;
constexpr int64_t kSumRows = 16;  // of a share: few, so that a sum in float rounds little

template <class T>
struct Shares {
  const T* rows;
  int64_t count, stride, columns;
  bool vectors;
  Compute<T>* shares;  // [blocks in y, columns]
};

template <class T>
__global__ void __launch_bounds__(kSumThreads) share_sums(const Shares<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const int64_t first = (blockIdx.x * int64_t(kSumThreads) + threadIdx.x) * W;
  if (first >= a.columns) return;
  const int64_t shares = (a.count + kSumRows - 1) / kSumRows;
  for (int64_t share = blockIdx.y; share < shares; share += gridDim.y) {
    C sum[W] = {}, v[W];
    for (int64_t row = share * kSumRows; row < (share + 1) * kSumRows && row < a.count; ++row) {
      load(a.rows + row * a.stride + first, a.columns - first, a.vectors, v);
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += v[j];
    }
    store(a.shares + share * a.columns + first, a.columns - first, a.columns % W == 0, sum);
  }
}

template <class T>
void sum_rows(const Tensor& m, const Tensor& out, Stream stream) {
  const int64_t shares = ceil_div(m.size[0], kSumRows), columns = m.size[1];
  const Workspace memory(shares * columns * sizeof(Compute<T>), stream);
  if (shares > 0 && columns > 0) {
    const Shares<T> a{
        static_cast<const T*>(m.data), m.size[0], m.stride[0], columns, takes_packs<T>(m),
        memory.at<Compute<T>>()};
    const Grid grid{
        .blocks = dim3(ceil_div(columns, kSumThreads * kPack<T>), shares < 65535 ? shares : 65535),
        .threads = dim3(kSumThreads)};
    launch("share_sums", share_sums<T>, grid, stream, a);
  }
  add_columns<T>(memory.at<Compute<T>>(), shares, columns, out, stream);
}

}  // namespace

void linear_forward(const LinearForward& op, Stream stream) {
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    const auto x = rounded<T>(op.x, op.x.dtype, stream);
    const auto weight = rounded<T>(op.weight, op.x.dtype, stream);
    gemm<T, true, true>("linear_forward", x.by_k(), weight.by_k(), x.matrix().size[1],
                        writes<T>(op.out, op.bias, op.residual, op.pre, op.activation), stream);
  });
}

void linear_backward(const LinearBackward& op, Stream stream) {
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    const Rounded<T> dz(op.dout, op.x.dtype, op.pre, op.activation, stream);
    const int64_t M = dz.matrix().size[0], N = dz.matrix().size[1];
    if (op.dx.given) {
      const auto weight = rounded<T>(op.weight, op.x.dtype, stream);
      gemm<T, true, false>("linear_backward", dz.by_k(), weight.across(), N, writes<T>(op.dx),
                           stream);
    }
    if (op.dweight.given) {
      const auto x = rounded<T>(op.x, op.x.dtype, stream);
      gemm<T, false, false>("linear_backward", dz.across(), x.across(), M, writes<T>(op.dweight),
                            stream);
    }
    if (op.dbias.given) sum_rows<T>(dz.matrix(), op.dbias, stream);
  });
}

}  // namespace pykern::cuda

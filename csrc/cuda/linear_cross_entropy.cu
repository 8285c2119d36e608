// linear_cross_entropy: the logits exist for some rows at a time, in the accuracy of sums; their
// losses and gradients are those of cross_entropy, and two products consume the gradients.
#include "cuda/columns.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/gemm.h"
#include "ops/all.h"

namespace pykern::cuda {
namespace {

constexpr int64_t kLogitBytes = 32 << 20;  // of all rows at a time
constexpr int64_t kLeastRows = 1024;       // so that the products with them fill a GPU
constexpr int64_t kRowStep = 128;  // their number is a multiple of this, a tile of a product

// A function of V alone, so that the order of the sums of dweight is one, too.
int64_t rows_at_once(int64_t M, int64_t V, int64_t item) {
  const int64_t fit = kLogitBytes / (V * item + 1) / kRowStep * kRowStep;
  const int64_t rows = fit < kLeastRows ? kLeastRows : fit;
  return rows < M ? rows : M;
}

struct Marked {
  Rows from, to, target;
  int64_t ignore_index;
  Extent extent;
};

// to = from, rows whose label is ignored 0: their numbers may be NaN
template <class T>
__global__ void __launch_bounds__(kElementThreads) without_ignored(const Marked a) {
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    Compute<T> v[kPack<T>] = {};
    const int64_t label = static_cast<const int64_t*>(a.target.data)[a.target.offset(row)];
    if (label != a.ignore_index)
      load(static_cast<const T*>(a.from.data) + a.from.offset(row) + first, valid, a.extent.vectors,
           v);
    store(static_cast<T*>(a.to.data) + a.to.offset(row) + first, valid, a.extent.vectors, v);
  });
}

// n rows of t from `first` on
Tensor part(const Tensor& t, int64_t first, int64_t n) {
  if (!t.given) return t;
  Tensor p = t;
  p.data = static_cast<char*>(t.data) + first * t.stride[0] * item_size(t.dtype);
  p.size[0] = n;
  return p;
}

Tensor packed(const Workspace& memory, int64_t rows, int64_t columns, DType dtype,
              const Tensor& like) {
  return tensor_of(matrix_at(memory.at<void>(), rows, columns, dtype), like);
}

Tensor vector(const Workspace& memory, int64_t n, DType dtype, const Tensor& like) {
  Tensor t = packed(memory, 1, n, dtype, like);
  t.rank = 1, t.size[0] = n, t.stride[0] = 1;
  return t;
}

void copy_without_ignored(const Tensor& from, const Tensor& to, const Tensor& target,
                          int64_t ignore_index, Stream stream) {
  with_type(from.dtype, [&]<class T>(T) {
    const Extent extent{from.size[0], from.size[1], take_packs<T>({&from, &to})};
    if (extent.rows == 0 || extent.D == 0) return;
    const Marked a{rows_of(from), rows_of(to), rows_of(column(target)), ignore_index, extent};
    launch("without_ignored", without_ignored<T>, element_grid<T>(extent), stream, a);
  });
}

}  // namespace

void linear_cross_entropy(const LinearCrossEntropy& op, Stream stream) {
  constexpr const char* kName = "linear_cross_entropy";
  const OnDevice device(op.x);
  const int64_t M = op.x.size[0], K = op.x.size[1], V = op.weight.size[0];
  const DType dtype = op.x.dtype, wide = stat_dtype(dtype);
  if (M == 0 || V == 0) {  // gradients of nothing: sums of no rows
    const Matrix none{nullptr, 0, V, V, dtype};
    if (op.dweight.given)
      gemm(kName, Layout::tn, none, {nullptr, 0, K, K, dtype}, {.out = op.dweight}, stream);
    if (op.dx.given)
      gemm(kName, Layout::nn, {nullptr, M, 0, 0, dtype}, {nullptr, 0, K, K, dtype}, {.out = op.dx},
           stream);
    sum_rows(none, op.dbias, stream);
    if (M > 0 && op.loss.given) {  // every row is ignored
      const Workspace memory(M * sizeof(double), stream);
      const Tensor logits = tensor_of(matrix_at(nullptr, M, 0, wide), op.x);
      const Tensor lse = vector(memory, M, DType::f64, op.x);
      cross_entropy_forward({logits, op.target, op.loss, lse, op.options}, stream);
    }
    return;
  }
  const int64_t at_once = rows_at_once(M, V, item_size(wide)), sets = ceil_div(M, at_once);
  const bool gradients = op.dx.given || op.dweight.given || op.dbias.given;
  const bool half = dtype != wide;
  // sums so far: in dweight itself where that has the accuracy of a sum
  const bool own_sums = op.dweight.given && sets > 1 && op.dweight.dtype != wide;
  const Rounded weight(op.weight, dtype, stream);
  const Workspace logits_memory(at_once * V * item_size(wide), stream),
      dlogits_memory(gradients && half ? at_once * V * item_size(dtype) : 0, stream),
      loss_memory(op.loss.given ? 0 : at_once * item_size(wide), stream),
      lse_memory(at_once * sizeof(double), stream),
      x_memory(op.dweight.given ? at_once * K * item_size(dtype) : 0, stream),
      dweight_memory(own_sums ? V * K * item_size(wide) : 0, stream),
      dbias_memory(op.dbias.given ? sets * V * item_size(wide) : 0, stream);

  for (int64_t set = 0; set < sets; ++set) {
    const int64_t first = set * at_once, n = M - first < at_once ? M - first : at_once;
    const Tensor x = part(op.x, first, n), target = part(op.target, first, n);
    const Tensor logits = packed(logits_memory, n, V, wide, op.x);
    const Tensor lse = vector(lse_memory, n, DType::f64, op.x);
    const Tensor loss =
        op.loss.given ? part(op.loss, first, n) : vector(loss_memory, n, wide, op.x);
    gemm(kName, Layout::nt, matrix_of(x), weight, {.out = logits, .bias = op.bias, .tf32 = op.tf32},
         stream);
    cross_entropy_forward({logits, target, loss, lse, op.options}, stream);
    if (!gradients) continue;

    const Tensor dlogits = half ? packed(dlogits_memory, n, V, dtype, op.x) : logits;
    cross_entropy_backward({logits, target, lse, part(op.dloss, first, n), dlogits, op.options},
                           stream);
    if (op.dx.given) {
      const Tensor dx = part(op.dx, first, n);
      gemm(kName, Layout::nn, matrix_of(dlogits), weight, {.out = dx, .tf32 = op.tf32}, stream);
      // 0 even where weight is not finite
      copy_without_ignored(dx, dx, target, op.options.ignore_index, stream);
    }
    if (op.dweight.given) {
      const Tensor seen = packed(x_memory, n, K, dtype, op.x);
      copy_without_ignored(x, seen, target, op.options.ignore_index, stream);
      const Tensor sums = own_sums ? packed(dweight_memory, V, K, wide, op.x) : op.dweight;
      gemm(kName, Layout::tn, matrix_of(dlogits), matrix_of(seen),
           {.out = set + 1 == sets ? op.dweight : sums,
            .residual = set > 0 ? sums : Tensor{},
            .tf32 = op.tf32},
           stream);
    }
    if (op.dbias.given) {
      Tensor share = vector(dbias_memory, V, wide, op.x);
      share.data = static_cast<char*>(share.data) + set * V * item_size(wide);
      sum_rows(matrix_of(dlogits), share, stream);
    }
  }
  if (op.dbias.given)
    with_type(dtype, [&]<class T>(T) {
      add_columns<T>(dbias_memory.at<Compute<T>>(), sets, V, op.dbias, nullptr, stream);
    });
}

}  // namespace pykern::cuda

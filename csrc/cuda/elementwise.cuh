// Kernels that compute each number of their outputs from those of the inputs at the same place: a
// thread takes a pack of neighbours at a time.
#pragma once
#include "cuda/rows.cuh"

namespace pykern::cuda {

// Where the packs are: rows of D numbers; tensors that are all contiguous are one long row.
struct Extent {
  int64_t rows, D;
  bool vectors;

  template <class T>
  __host__ __device__ int64_t packs_per_row() const {
    return (D + kPack<T> - 1) / kPack<T>;
  }
};

inline Tensor flattened(Tensor t) {
  if (!t.given) return t;
  t.size[0] = count(t);
  t.stride[0] = 1;
  t.rank = 1;
  return t;
}

// Of n tensors of one shape. They are replaced by flat ones if all are contiguous.
template <class T>
Extent extent_of(Tensor* t, int n) {
  bool flat = true, vectors = true;
  for (int i = 0; i < n; ++i) flat = flat && (!t[i].given || is_contiguous(t[i]));
  for (int i = 0; i < n; ++i) {
    if (flat) t[i] = flattened(t[i]);
    vectors = vectors && takes_packs<T>(t[i]);
  }
  const int64_t D = t[0].rank > 0 ? t[0].size[t[0].rank - 1] : 1;
  return {D > 0 ? count(t[0]) / D : 0, D, vectors};
}

constexpr int kElementThreads = 256;
constexpr int64_t kElementBlocks = 132 * 8 * 4;  // enough to fill any GPU some times over

// body(row, first, valid) for every pack
template <class T, class Body>
__device__ __forceinline__ void each_pack_of(const Extent& e, const Body& body) {
  const int64_t per_row = e.packs_per_row<T>(), packs = e.rows * per_row;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < packs; i += step) {
    const int64_t row = e.rows == 1 ? 0 : quotient(i, per_row),
                  first = (i - row * per_row) * kPack<T>;
    body(row, first, e.D - first);
  }
}

template <class T>
Grid element_grid(const Extent& e) {
  const int64_t blocks = ceil_div(e.rows * e.packs_per_row<T>(), kElementThreads);
  return {.blocks = dim3(blocks < kElementBlocks ? blocks : kElementBlocks),
          .threads = dim3(kElementThreads)};
}

// ---- f.apply<T>(x, y): packs y[outputs] from packs x[inputs]

template <int inputs, int outputs>
struct Map {
  Rows in[inputs], out[outputs];
  Extent extent;
};

constexpr int kPacks = 2;  // of a tensor that a thread asks for before it computes

template <class T, int inputs, int outputs, class Function>
__global__ void __launch_bounds__(kElementThreads, sizeof(T) == 8 ? 1
                                                   : inputs < 3   ? 4
                                                                  : 3)
    elementwise_kernel(const Map<inputs, outputs> a, const Function f) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const Extent& e = a.extent;
  const int64_t per_row = e.packs_per_row<T>(), packs = e.rows * per_row;
  const int64_t first_pack = blockIdx.x * int64_t(kPacks * kElementThreads) + threadIdx.x;
  const auto each_pack = [&](const auto& body) {  // body(p, row, first, valid)
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int64_t i = first_pack + p * kElementThreads;
      const int64_t row = e.rows == 1 ? 0 : quotient(i, per_row),
                    first = (i - row * per_row) * kPack<T>;
      if (i < packs) body(p, row, first, e.D - first);
    }
  };
  Pack<T, W> read_ahead[kPacks][inputs];
  each_pack([&](int p, int64_t row, int64_t first, int64_t valid) {
#pragma unroll
    for (int i = 0; i < inputs; ++i)
      read(static_cast<const T*>(a.in[i].data) + a.in[i].offset(row) + first, valid, e.vectors,
           read_ahead[p][i]);
  });
  each_pack([&](int p, int64_t row, int64_t first, int64_t valid) {
    C x[inputs][W], y[outputs][W];
#pragma unroll
    for (int i = 0; i < inputs; ++i) widen(read_ahead[p][i], x[i]);
    f.template apply<T>(x, y);
#pragma unroll
    for (int i = 0; i < outputs; ++i)
      store(static_cast<T*>(a.out[i].data) + a.out[i].offset(row) + first, valid, e.vectors, y[i]);
  });
}

template <int inputs, int outputs, class Function>
void elementwise(const char* what, const Tensor (&in)[inputs], const Tensor (&out)[outputs],
                 const Function& f, Stream stream) {
  const OnDevice device(in[0]);
  with_type(in[0].dtype, [&]<class T>(T) {
    Tensor all[inputs + outputs];
    for (int i = 0; i < inputs; ++i) all[i] = in[i];
    for (int i = 0; i < outputs; ++i) all[inputs + i] = out[i];
    Map<inputs, outputs> a;
    a.extent = extent_of<T>(all, inputs + outputs);
    for (int i = 0; i < inputs; ++i) a.in[i] = rows_of(all[i]);
    for (int i = 0; i < outputs; ++i) a.out[i] = rows_of(all[inputs + i]);
    const int64_t packs = a.extent.rows * a.extent.template packs_per_row<T>();
    if (packs == 0) return;
    const Grid grid{.blocks = dim3(ceil_div(packs, kPacks * kElementThreads)),
                    .threads = dim3(kElementThreads)};
    launch(what, elementwise_kernel<T, inputs, outputs, Function>, grid, stream, a, f);
  });
}

}  // namespace pykern::cuda

// embedding: forward copies rows. backward sorts the places by token, keeping their order, and one
// block adds the rows of each token in that order: no atomic additions, the same bits every time.
// An id outside of the table, which no kernel can refuse: a row of NaN, and no gradient.
#include "cuda/elementwise.cuh"
#include "cuda/sort.cuh"
#include "ops/embedding.h"

namespace pykern::cuda {
namespace {

struct Ids {
  Rows rows;
  bool wide;  // int64
  int64_t V;

  __device__ __forceinline__ int64_t at(int64_t place) const {
    const int64_t i = rows.offset(place);
    return wide ? static_cast<const int64_t*>(rows.data)[i]
                : static_cast<const int32_t*>(rows.data)[i];
  }
  __device__ __forceinline__ bool knows(int64_t id) const { return id >= 0 && id < V; }
};

Ids ids_of(const Tensor& ids, int64_t V) {
  return {rows_of(column(ids)), ids.dtype == DType::i64, V};
}

struct Lookup {
  Rows weight, out;
  Ids ids;
  Extent extent;
};

template <class T>
__global__ void __launch_bounds__(kElementThreads) embedding_forward_kernel(const Lookup a) {
  using C = Compute<T>;
  each_pack_of<T>(a.extent, [&](int64_t row, int64_t first, int64_t valid) {
    const int64_t id = a.ids.at(row);
    T* out = static_cast<T*>(a.out.data) + a.out.offset(row) + first;
    C v[kPack<T>];
#pragma unroll
    for (int j = 0; j < kPack<T>; ++j) v[j] = static_cast<C>(NAN);
    if (a.ids.knows(id))
      load(static_cast<const T*>(a.weight.data) + a.weight.offset(id) + first, valid,
           a.extent.vectors, v);
    store(out, valid, a.extent.vectors, v);
  });
}

// key = id, or V for an id that is not in the table
__global__ void __launch_bounds__(kElementThreads)
    take_keys(const Ids ids, int64_t count, Keyed* keyed) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; i < count; i += step) {
    const int64_t id = ids.at(i);
    keyed[i] = {ids.knows(id) ? static_cast<uint32_t>(id) : static_cast<uint32_t>(ids.V),
                static_cast<uint32_t>(i)};
  }
}

template <class T>
__global__ void __launch_bounds__(kElementThreads) zero_rows(const Rows rows, const Extent extent) {
  each_pack_of<T>(extent, [&](int64_t row, int64_t first, int64_t valid) {
    const Compute<T> zero[kPack<T>] = {};
    store(static_cast<T*>(rows.data) + rows.offset(row) + first, valid, extent.vectors, zero);
  });
}

struct Additions {
  Rows dout, dweight;
  const Keyed* sorted;
  int64_t count, V, D;
  bool vectors;
};

constexpr int kAddThreads = 128;

// The block of the first place of a token adds its rows; the others have nothing to do.
template <class T>
__global__ void __launch_bounds__(kAddThreads) add_places(const Additions a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  for (int64_t begin = blockIdx.x; begin < a.count; begin += gridDim.x) {
    const int64_t token = a.sorted[begin].key;
    if (token >= a.V || (begin > 0 && a.sorted[begin - 1].key == token)) continue;
    T* dweight = static_cast<T*>(a.dweight.data) + a.dweight.offset(token);
    for (int64_t first = threadIdx.x * int64_t(W); first < a.D; first += int64_t(blockDim.x) * W) {
      const auto read = [&](int64_t i, C(&v)[W]) {
        const T* dout = static_cast<const T*>(a.dout.data) + a.dout.offset(a.sorted[i].place);
        load(dout + first, a.D - first, a.vectors, v);
      };
      C sum[W], v[W];
      read(begin, sum);
      for (int64_t i = begin + 1; i < a.count && a.sorted[i].key == token; ++i) {
        read(i, v);
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] += v[j];
      }
      store(dweight + first, a.D - first, a.vectors, sum);
    }
  }
}

}  // namespace

void embedding_forward(const EmbeddingForward& op, Stream stream) {
  const int64_t D = op.weight.size[1], places = count(op.ids);
  if (places == 0 || D == 0) return;
  const OnDevice device(op.weight);
  with_type(op.weight.dtype, [&]<class T>(T) {
    const Extent extent{places, D, take_packs<T>({&op.weight, &op.out})};
    const Lookup a{rows_of(op.weight), rows_of(op.out), ids_of(op.ids, op.weight.size[0]), extent};
    launch("embedding_forward", embedding_forward_kernel<T>, element_grid<T>(extent), stream, a);
  });
}

void embedding_backward(const EmbeddingBackward& op, Stream stream) {
  const int64_t V = op.dweight.size[0], D = op.dweight.size[1], places = count(op.ids);
  if (V == 0 || D == 0) return;
  PYKERN_CHECK(value, V < (int64_t{1} << 31) && places < (int64_t{1} << 31), "embedding: ", V,
               " rows and ", places, " ids, the gradient on CUDA takes less than 2^31 of each");
  const OnDevice device(op.dweight);
  with_type(op.dweight.dtype, [&]<class T>(T) {
    const Extent extent{V, D, takes_packs<T>(op.dweight)};
    launch("zero_rows", zero_rows<T>, element_grid<T>(extent), stream, rows_of(op.dweight), extent);
    if (places == 0) return;
    const Sorted sorted(places, stream);
    const int64_t blocks = ceil_div(places, kElementThreads);
    const Grid grid{.blocks = dim3(blocks < kElementBlocks ? blocks : kElementBlocks),
                    .threads = dim3(kElementThreads)};
    launch("take_keys", take_keys, grid, stream, ids_of(op.ids, V), places, sorted.input());
    const Additions a{.dout = rows_of(op.dout),
                      .dweight = rows_of(op.dweight),
                      .sorted = sorted.by_key(V + 1, stream),
                      .count = places,
                      .V = V,
                      .D = D,
                      .vectors = take_packs<T>({&op.dout, &op.dweight})};
    const Grid adding{.blocks = dim3(places < kMaxBlocks ? places : kMaxBlocks),
                      .threads = dim3(kAddThreads)};
    launch("add_places", add_places<T>, adding, stream, a);
  });
}

}  // namespace pykern::cuda

#include "cuda/columns.cuh"
#include "cuda/elementwise.cuh"
#include "cuda/gemm_few_rows.cuh"
#include "cuda/gemm_halves.cuh"
#include "cuda/gemm_plain.cuh"
#include "cuda/ring.cuh"

namespace pykern::cuda {
namespace {

bool aligned(const Matrix& m) {  // rows can be read 16 bytes at a time
  return reinterpret_cast<uintptr_t>(m.data) % 16 == 0 && m.stride * item_size(m.dtype) % 16 == 0;
}

template <class T>
Epilogue<T> epilogue_of(const After& after) {
  constexpr int kNeighbours = kPack<T>;
  bool vectors = true;
  for (const Tensor* t : {&after.out, &after.bias, &after.residual, &after.pre})
    vectors = vectors && takes_words(*t, kNeighbours);
  return {.bias = numbers_of<T>(after.bias),
          .residual = numbers_of<T>(after.residual),
          .out = numbers_of<T>(after.out),
          .pre = numbers_of<T>(after.pre),
          .residual_rows = rows_of(after.residual),
          .out_rows = rows_of(after.out),
          .pre_rows = rows_of(after.pre),
          .activation = after.activation,
          .vectors = vectors};
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
        v[j] *= derivative<C, T>(a.activation, z[j], &value);
      }
    }
    store(static_cast<T*>(a.to.data) + a.to.offset(row) + first, valid, a.extent.vectors, v);
  });
}

// to = from as T, times activation'(pre) if there is an activation
template <class T>
void copy_rows(Tensor from, Tensor pre, Tensor to, Activation activation, Stream stream) {
  Tensor all[] = {from, activation == Activation::none ? Tensor{} : pre, to};
  const Extent extent = extent_of<T>(all, 3);
  if (extent.rows > 0 && extent.D > 0)
    launch("round_rows", round_rows<T>, element_grid<T>(extent), stream,
           Copy{rows_of(all[0]), rows_of(all[1]), rows_of(all[2]), from.dtype, pre.dtype, extent,
                activation});
}

// ---- transposed copies

struct Transposition {
  const float* from;
  float* to;
  int64_t rows, columns, from_stride, to_stride;  // of `from`
};

constexpr int kTurned = 32;  // rows and columns of a tile

// to[j][i] = from[i][j]: a block takes a tile through shared memory, both sides in whole lines.
__global__ void __launch_bounds__(kTurned * 8) transpose_rows(const Transposition a) {
  struct Tile {
    float of[kTurned][kTurned + 1];
  };
  auto& tile = shared_memory<Tile>().of;
  const int64_t tiles = (a.columns + kTurned - 1) / kTurned, row = quotient(blockIdx.x, tiles);
  const int64_t i0 = row * kTurned, j0 = (blockIdx.x - row * tiles) * kTurned;
  const int across = threadIdx.x % kTurned, down = threadIdx.x / kTurned;
#pragma unroll
  for (int k = down; k < kTurned; k += 8)
    if (i0 + k < a.rows && j0 + across < a.columns)
      tile[k][across] = a.from[(i0 + k) * a.from_stride + j0 + across];
  __syncthreads();
#pragma unroll
  for (int k = down; k < kTurned; k += 8)
    if (j0 + k < a.columns && i0 + across < a.rows)
      a.to[(j0 + k) * a.to_stride + i0 + across] = tile[across][k];
}

// A factor whose rows can be read 16 bytes at a time: itself, or a copy of it, or its transpose.
class Aligned {
 public:
  Aligned(const Matrix& m, bool turned, Stream stream)
      : matrix_(m),
        stride_(ceil_div(turned ? m.rows : m.columns, 8) * 8),
        memory_(turned || !aligned(m) ? (turned ? m.columns : m.rows) * stride_ * item_size(m.dtype)
                                      : 0,
                stream) {
    if (!memory_.at<void>()) return;
    const Tensor from = tensor_of(m, {});
    matrix_.data = memory_.at<void>(), matrix_.stride = stride_;
    if (turned) {
      const Grid grid{.blocks = dim3(ceil_div(m.columns, kTurned) * ceil_div(m.rows, kTurned)),
                      .threads = dim3(kTurned * 8),
                      .shared = sizeof(float) * kTurned * (kTurned + 1)};
      launch("transpose_rows", transpose_rows, grid, stream,
             Transposition{static_cast<const float*>(m.data), memory_.at<float>(), m.rows,
                           m.columns, m.stride, stride_});
      return;
    }
    with_type(m.dtype, [&]<class T>(T) {
      copy_rows<T>(from, {}, tensor_of(matrix_, {}), Activation::none, stream);
    });
  }
  const Matrix& matrix() const { return matrix_; }

 private:
  Matrix matrix_;
  int64_t stride_;
  Workspace memory_;
};

// ---- the sums of parts of k, added in order

template <class T>
__global__ void __launch_bounds__(kElementThreads) add_parts(const Product<T> p, int64_t parts) {
  constexpr int W = kPack<T>;
  const int64_t M = p.a.rows, N = p.b.rows;
  each_pack_of<T>(Extent{M, N, true}, [&](int64_t m, int64_t n, int64_t valid) {
    Compute<T> sum[W] = {}, part[W];
    for (int64_t i = 0; i < parts; ++i) {
      load(p.partial + (i * M + m) * N + n, valid, N % W == 0, part);
#pragma unroll
      for (int j = 0; j < W; ++j) sum[j] += part[j];
    }
    p.epilogue(m, n, valid, sum);
  });
}

// How long the parts are in which k is summed. They begin at fixed places, so that rows of zeros at
// the end of k change no bit. The rows of C must not matter where they are those of x: forward and
// for dx, parts are for a long k beside few columns (the gradient of a vocabulary). For dweight
// they fill a GPU of about kFilled tiles at a time where k is kUsualDepth.
constexpr int64_t kFilled = 264, kUsualDepth = 8192;
constexpr int64_t kLeastPart = 1024;
constexpr int64_t kLongPart = 8192;
constexpr int64_t kMostParts = 32;

int64_t length_of_parts(Layout layout, int64_t M, int64_t N, int64_t K) {
  int64_t length = K;
  if (layout == Layout::tn) {
    const int64_t tiles = ceil_div(M, 128) * ceil_div(N, 128);
    length = ceil_div(kUsualDepth * tiles, kFilled * 128) * 128;
    length = length < kLeastPart ? kLeastPart : length;
    while (length * kMostParts < K) length *= 2;
  } else if (N <= 2048) {
    length = kLongPart;
  }
  return length < K ? length : K;
}

// From so many columns on a warp takes 32 of a product of few rows: there are enough for every GPU,
// and A is read less often.
constexpr int64_t kFewManyColumns = 8192;

// 256 columns a block read less per product, 128 leave less of the GPU idle in the end.
bool takes_wide_tiles(int64_t rows, int64_t columns, int64_t parts) {
  const auto filled = [&](int64_t tile, int64_t at_once) {
    const int64_t tiles = ceil_div(rows, kTileRows) * ceil_div(columns, tile) * parts;
    return static_cast<double>(rows * columns * parts) /
           static_cast<double>(ceil_div(tiles, at_once) * at_once * kTileRows * tile);
  };
  if (columns <= 128) return false;
  const int64_t processors = walking_blocks(int64_t{1} << 30) / 2;
  return filled(256, processors) > 0.85 * filled(128, 2 * processors);
}

template <class T, Layout layout>
void run(const char* what, const Matrix& a, const Matrix& b, const After& after, Stream stream) {
  constexpr bool a_by_k = layout != Layout::tn, b_by_k = layout == Layout::nt;
  const int64_t M = a_by_k ? a.rows : a.columns, N = b_by_k ? b.rows : b.columns;
  const int64_t K = a_by_k ? a.columns : a.rows;
  if (M == 0 || N == 0) return;
  const bool tf32 = sizeof(T) == sizeof(float) && after.tf32;
  const Aligned left(a, tf32 && !a_by_k, stream), right(b, tf32 && !b_by_k, stream);
  const int64_t length = length_of_parts(layout, M, N, K), parts = K > 0 ? ceil_div(K, length) : 1;
  const Workspace partial(parts > 1 ? parts * M * N * sizeof(Compute<T>) : 0, stream);
  Product<T> product{.a = {left.matrix().data, M, left.matrix().stride},
                     .b = {right.matrix().data, N, right.matrix().stride},
                     .K = K,
                     .order = {},
                     .epilogue = epilogue_of<T>(after),
                     .k_of_part = length,
                     .partial = partial.at<Compute<T>>()};
  const auto start = [&](auto kernel, int rows, int columns, int threads, size_t shared) {
    product.order = {ceil_div(M, rows), ceil_div(N, columns)};
    const Grid grid{.blocks = dim3(product.order.rows * product.order.columns, 1, parts),
                    .threads = dim3(threads),
                    .shared = shared};
    launch(what, kernel, grid, stream, product);
  };
  const auto add = [&] {
    if (parts > 1)
      launch("add_parts", add_parts<T>, element_grid<T>(Extent{M, N, true}), stream, product,
             parts);
  };
  if constexpr (sizeof(T) == 2 && layout == Layout::nt) {
    if (M <= kFewRows) {
      if (N < kFewManyColumns)
        start(gemm_few_rows<T, kFewColumns>, kFewRows, kFewColumns, kWarp,
              sizeof(FewShared<T, kFewColumns>));
      else
        start(gemm_few_rows<T, kFewWideColumns>, kFewRows, kFewWideColumns, kWarp,
              sizeof(FewShared<T, kFewWideColumns>));
      return add();
    }
  }
  const auto start_tensor_cores = [&](auto wide, auto narrow) {
    if (takes_wide_tiles(M, N, parts))
      start(wide, kTileRows, 256, 256, sizeof(Stages<T, 256>));
    else
      start(narrow, kTileRows, 128, 128, sizeof(Stages<T, 128>));
  };
  if constexpr (sizeof(T) == 2) {
    start_tensor_cores(gemm_halves<T, a_by_k, b_by_k, 256>, gemm_halves<T, a_by_k, b_by_k, 128>);
  } else if (tf32) {
    if constexpr (sizeof(T) == sizeof(float))
      start_tensor_cores(gemm_halves<T, true, true, 256>, gemm_halves<T, true, true, 128>);
  } else {
    start(gemm_plain<T, a_by_k, b_by_k>, kPlainTile<T>, kPlainTile<T>, kPlainThreads,
          sizeof(PlainShared<T>));
  }
  add();
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

}  // namespace

Matrix matrix_of(const Tensor& t) {
  return {t.data, rows(t), t.size[t.rank - 1], row_stride(t), t.dtype};
}

Matrix matrix_at(const void* data, int64_t rows, int64_t columns, DType dtype) {
  return {data, rows, columns, columns, dtype};
}

Tensor tensor_of(const Matrix& m, const Tensor& like) {
  Tensor t;
  t.data = const_cast<void*>(m.data);
  t.size[0] = m.rows, t.size[1] = m.columns;
  t.stride[0] = m.stride, t.stride[1] = 1;
  t.rank = 2, t.dtype = m.dtype, t.given = true;
  t.device = like.device, t.device_index = like.device_index, t.stream = like.stream;
  return t;
}

void gemm(const char* what, Layout layout, const Matrix& a, const Matrix& b, const After& after,
          Stream stream) {
  with_type(a.dtype, [&]<class T>(T) {
    switch (layout) {
      case Layout::nt: return run<T, Layout::nt>(what, a, b, after, stream);
      case Layout::nn: return run<T, Layout::nn>(what, a, b, after, stream);
      case Layout::tn: return run<T, Layout::tn>(what, a, b, after, stream);
    }
  });
}

Rounded::Rounded(const Tensor& t, DType dtype, const Tensor& pre, Activation activation,
                 Stream stream)
    : copied_(t.dtype != dtype || activation != Activation::none),
      memory_(copied_ ? count(t) * item_size(dtype) : 0, stream) {
  if (!copied_) {
    matrix_ = matrix_of(t);
    return;
  }
  Tensor to = t;
  to.data = memory_.at<void>(), to.dtype = dtype;
  int64_t packed = 1;
  for (int i = t.rank - 1; i >= 0; --i) to.stride[i] = packed, packed *= t.size[i];
  matrix_ = matrix_of(to);
  with_type(dtype, [&]<class T>(T) { copy_rows<T>(t, pre, to, activation, stream); });
}

void sum_rows(const Matrix& m, const Tensor& out, Stream stream) {
  if (!out.given) return;
  with_type(m.dtype, [&]<class T>(T) {
    const int64_t shares = ceil_div(m.rows, kSumRows);
    const Workspace memory(shares * m.columns * sizeof(Compute<T>), stream);
    if (shares > 0 && m.columns > 0) {
      const bool vectors = aligned(m);
      const Shares<T> a{static_cast<const T*>(m.data), m.rows, m.stride, m.columns, vectors,
                        memory.at<Compute<T>>()};
      const Grid grid{.blocks = dim3(ceil_div(m.columns, kSumThreads * kPack<T>),
                                     shares < 65535 ? shares : 65535),
                      .threads = dim3(kSumThreads)};
      launch("share_sums", share_sums<T>, grid, stream, a);
    }
    add_columns<T>(memory.at<Compute<T>>(), shares, m.columns, out, nullptr, stream);
  });
}

}  // namespace pykern::cuda

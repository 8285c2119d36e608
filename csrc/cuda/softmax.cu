// softmax over rows, one row of a block's threads each, which holds it in registers while it fits.
// Hidden places (mask false) count as -infinity and are 0 in the result, whatever stands there.
//   backward  dx = out (dout - sum out dout),  0 where out is 0
#include "cuda/math.cuh"
#include "cuda/pieces.cuh"
#include "ops/softmax.h"

namespace pykern::cuda {
namespace {

template <class T>
struct Forward {
  Rows x, mask, out;
  int64_t mask_step;  // between neighbours of a row of the mask: 1, or 0 for all alike
  int64_t rows;
  Pieces<T> pieces;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) softmax_forward_kernel(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  AcrossRow across_row(shared_memory<RowScratch<Sum<T>, 1>>());
  const int64_t chunks = a.pieces.chunks(), together = blockDim.y;
  C v[kHeld][W];
  unsigned visible[kHeld];  // a bit per number

  for (int64_t begin = blockIdx.x * together; begin < a.rows; begin += gridDim.x * together) {
    const bool there = begin + threadIdx.y < a.rows;
    const Pieces<T> pieces = a.pieces.where(there);
    const int64_t row = there ? begin + threadIdx.y : begin;
    const T* x = static_cast<const T*>(a.x.data) + a.x.offset(row);
    T* out = static_cast<T*>(a.out.data) + a.out.offset(row);
    const uint8_t* mask =
        a.mask.data ? static_cast<const uint8_t*>(a.mask.data) + a.mask.offset(row) : nullptr;
    const auto read = [&](int64_t chunk) {
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        load(x + first, valid, pieces.vectors, v[p]);
        visible[p] = 0;
#pragma unroll
        for (int j = 0; j < W; ++j)
          visible[p] |=
              static_cast<unsigned>(j < valid && (!mask || mask[(first + j) * a.mask_step])) << j;
      });
    };
    Sum<T> top[1] = {-INFINITY};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      read(chunk);
      pieces.each_pack(chunk, [&](int p, int64_t, int64_t) {
#pragma unroll
        for (int j = 0; j < W; ++j)
          if (visible[p] >> j & 1) top[0] = Larger()(top[0], Sum<T>(v[p][j]));
      });
    }
    across_row(top, Larger());
    const C shift = top[0] == -INFINITY ? C(0) : C(top[0]);  // all hidden, or as good as hidden

    Sum<T> sum[1] = {0};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) read(chunk);
      pieces.each_pack(chunk, [&](int p, int64_t, int64_t) {
#pragma unroll
        for (int j = 0; j < W; ++j)
          v[p][j] = visible[p] >> j & 1 ? exponential(v[p][j] - shift) : C(0);
        sum[0] += added(v[p]);
      });
    }
    across_row(sum, Add());
    const C total = sum[0] == 0 ? C(1) : C(sum[0]);

    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) read(chunk);
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        C y[W];
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const C e = chunks > 1 ? exponential(v[p][j] - shift) : v[p][j];
          y[j] = visible[p] >> j & 1 ? e / total : C(0);
        }
        store(out + first, valid, pieces.vectors, y);
      });
    }
  }
}

template <class T>
struct Backward {
  Rows out, dout, dx;
  int64_t rows;
  Pieces<T> pieces;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads) softmax_backward_kernel(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  AcrossRow across_row(shared_memory<RowScratch<Sum<T>, 1>>());
  const int64_t chunks = a.pieces.chunks(), together = blockDim.y;
  C y[kHeld][W], dy[kHeld][W];

  for (int64_t begin = blockIdx.x * together; begin < a.rows; begin += gridDim.x * together) {
    const bool there = begin + threadIdx.y < a.rows;
    const Pieces<T> pieces = a.pieces.where(there);
    const int64_t row = there ? begin + threadIdx.y : begin;
    const T* out = static_cast<const T*>(a.out.data) + a.out.offset(row);
    const T* dout = static_cast<const T*>(a.dout.data) + a.dout.offset(row);
    T* dx = static_cast<T*>(a.dx.data) + a.dx.offset(row);
    const auto read = [&](int64_t chunk) {
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        load(out + first, valid, pieces.vectors, y[p]);
        load(dout + first, valid, pieces.vectors, dy[p]);
      });
    };

    // where out is 0 the place was hidden, or as good as hidden: its dout is not looked at
    Sum<T> sum[1] = {0};
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      read(chunk);
      pieces.each_pack(chunk, [&](int p, int64_t, int64_t) {
        C term[W];
#pragma unroll
        for (int j = 0; j < W; ++j) term[j] = y[p][j] == 0 ? C(0) : y[p][j] * dy[p][j];
        sum[0] += added(term);
      });
    }
    across_row(sum, Add());
    const C mean = static_cast<C>(sum[0]);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) read(chunk);
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        C d[W];
#pragma unroll
        for (int j = 0; j < W; ++j) d[j] = y[p][j] == 0 ? C(0) : y[p][j] * (dy[p][j] - mean);
        store(dx + first, valid, pieces.vectors, d);
      });
    }
  }
}

}  // namespace

void softmax_forward(const SoftmaxForward& op, Stream stream) {
  const int last = op.x.rank - 1;
  const int64_t D = op.x.size[last], rows = pykern::rows(op.x);
  if (rows == 0 || D == 0) return;
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    const Forward<T> a{.x = rows_of(op.x),
                       .mask = rows_of(op.mask),
                       .out = rows_of(op.out),
                       .mask_step = op.mask.given ? op.mask.stride[last] : 0,
                       .rows = rows,
                       .pieces = {D, take_packs<T>({&op.x, &op.out})}};
    launch("softmax_forward", softmax_forward_kernel<T>,
           row_grid<Sum<T>, 1>(T{}, rows, D, rows_together<T>(D)), stream, a);
  });
}

void softmax_backward(const SoftmaxBackward& op, Stream stream) {
  const int64_t D = op.out.size[op.out.rank - 1], rows = pykern::rows(op.out);
  if (rows == 0 || D == 0) return;
  const OnDevice device(op.out);
  with_type(op.out.dtype, [&]<class T>(T) {
    const Backward<T> a{.out = rows_of(op.out),
                        .dout = rows_of(op.dout),
                        .dx = rows_of(op.dx),
                        .rows = rows,
                        .pieces = {D, take_packs<T>({&op.out, &op.dout, &op.dx})}};
    launch("softmax_backward", softmax_backward_kernel<T>,
           row_grid<Sum<T>, 1>(T{}, rows, D, rows_together<T>(D)), stream, a);
  });
}

}  // namespace pykern::cuda

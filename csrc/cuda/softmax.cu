// softmax over rows, one row of a block's threads each. Hidden places (mask false) count as
// -infinity and are 0 in the result, whatever stands there.
//   forward   out = exp(x - shift) / sum exp(x - shift)
//   backward  dx = out (dout - sum out dout),  0 where out is 0
// Forward rows walk through a ring, those of several chunks twice; backward a row is held in
// registers while it fits.
#include "cuda/exp_sum.cuh"
#include "cuda/ring.cuh"
#include "ops/softmax.h"

namespace pykern::cuda {
namespace {

// Which places are visible: a byte each.
struct Mask {
  Rows rows;
  int64_t step;  // between neighbours of a row: 1, or 0 for all alike
  bool words;    // the bytes of a pack are read together
};

template <class T>
struct Forward {
  Rows x, out;
  Mask mask;
  int64_t rows;
  Pieces<T> pieces;
};

template <class T>
struct ForwardShared {
  ExpSumScratch<T, Sum<T>> sums;
  alignas(16) T ring[];
};

// The mask of a pack, from byte p on.
template <int n>
__device__ __forceinline__ void read_mask(const uint8_t* p, int64_t valid, const Mask& mask,
                                          Pack<uint8_t, n>& visible) {
  if constexpr (n >= 4)
    if (mask.words) return read(p, valid, true, visible);
#pragma unroll
  for (int j = 0; j < n; ++j) visible.of[j] = j < valid ? p[j * mask.step] : uint8_t(0);
}

template <class T>
__global__ void __launch_bounds__(kRowThreads, kHalf<T> ? 2 : 1)
    softmax_forward_kernel(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& shared = shared_memory<ForwardShared<T>>();
  ExpSumAcrossRow<T, Sum<T>> across_row(shared.sums);
  const Ring<T> ring(shared.ring, Ring<T>::plan_of_one());
  const int chunks = static_cast<int>(a.pieces.chunks());
  const int64_t together = blockDim.y;
  const bool masked = a.mask.rows.data != nullptr;
  const auto all = [](int64_t) { return true; };
  Chunks coming(ring, a.x, a.rows, a.pieces, chunks > 1 ? 2 : 1, all);
  Pack<uint8_t, W> visible[kHeld];

  for (int64_t begin = blockIdx.x * together; begin < a.rows; begin += gridDim.x * together) {
    const bool there = begin + threadIdx.y < a.rows;
    const Pieces<T> pieces = a.pieces.where(there);
    const int64_t row = there ? begin + threadIdx.y : begin;
    const uint8_t* mask = static_cast<const uint8_t*>(a.mask.rows.data) + a.mask.rows.offset(row);
    T* out = static_cast<T*>(a.out.data) + a.out.offset(row);
    const auto next = [&](int64_t from) {
      if (masked)
        pieces.each_pack_from(from, [&](int p, int64_t first, int64_t valid, bool) {
          read_mask(mask + first * a.mask.step, valid, a.mask, visible[p]);
        });
      coming.next();
    };

    ExpSum<T> own;
    int64_t from = pieces.begin();
    for (int chunk = 0; chunk < chunks; ++chunk, from += pieces.width()) {
      next(from);
      pieces.each_pack_from(from, [&](int p, int64_t, int64_t valid, bool) {
        C x[W];
        coming.get(p, x);
        if (masked) {
#pragma unroll
          for (int j = 0; j < W; ++j) x[j] = visible[p].of[j] ? x[j] : C(-INFINITY);
        }
        own.add(x, valid);
      });
    }
    C shift;
    Sum<T> sum;
    across_row(own, &shift, &sum);
    const C scale = sum == 0 ? C(0) : C(1 / sum);  // all hidden, or as good as hidden

    from = pieces.begin();
    for (int chunk = 0; chunk < chunks; ++chunk, from += pieces.width()) {
      if (chunks > 1) next(from);
      pieces.each_pack_from(from, [&](int p, int64_t first, int64_t valid, bool vectors) {
        C y[W];
        coming.get(p, y);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          y[j] = exponential_for<T>(y[j] - shift) * scale;
          if (masked) y[j] = visible[p].of[j] ? y[j] : C(0);
        }
        store(out + first, valid, vectors, y);
      });
    }
  }
  cp_async_wait<0>();
}

template <class T>
struct Backward {
  Rows out, dout, dx;
  int64_t rows;
  Pieces<T> pieces;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kHalf<T> ? 2 : 1)
    softmax_backward_kernel(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  AcrossRow across_row(shared_memory<RowScratch<Sum<T>, 1>>());
  const int chunks = static_cast<int>(a.pieces.chunks());
  const int64_t together = blockDim.y;
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
    for (int chunk = 0; chunk < chunks; ++chunk) {
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
    for (int chunk = 0; chunk < chunks; ++chunk) {
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
  const int64_t mask_step = op.mask.given ? op.mask.stride[last] : 0;
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    const int threads = row_threads<T>(D), together = rows_together<T>(D);
    const Mask mask{.rows = rows_of(op.mask),
                    .step = mask_step,
                    .words = mask_step == 1 && takes_words(op.mask, kPack<T>)};
    const Forward<T> a{.x = rows_of(op.x),
                       .out = rows_of(op.out),
                       .mask = mask,
                       .rows = rows,
                       .pieces = {D, take_packs<T>({&op.x, &op.out})}};
    const Grid grid{
        .blocks = dim3(walking_blocks(ceil_div(rows, together), threads * together)),
        .threads = dim3(threads, together),
        .shared = sizeof(ExpSumScratch<T, Sum<T>>) + Ring<T>::plan(threads * together, 1).bytes};
    launch("softmax_forward", softmax_forward_kernel<T>, grid, stream, a);
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

// layer_norm and rms_norm: a row of a block's threads holds a row in registers while it fits.
//   out = xhat weight + bias,  xhat = (h - mean) rstd     (rms: mean = 0, no bias)
#include "cuda/math.cuh"
#include "cuda/ring.cuh"
#include "ops/norm.h"

namespace pykern::cuda {
namespace {

template <class T>
struct Forward {
  Rows x, residual, out, sum;
  Numbers<T> weight, bias, out_numbers;
  Compute<T>*mean, *rstd;
  Compute<T> eps;
  int64_t rows;
  Pieces<T> pieces;
  typename Ring<T>::Plan ring;
};

template <class T>
__device__ __forceinline__ T* at(const Rows& rows, int64_t row) {
  return static_cast<T*>(rows.data) + rows.offset(row);
}

// The statistics of n numbers. each(term): calls term(h, total) for all of this thread.
template <bool centred, class C, class Across, class Each>
__device__ __forceinline__ void statistics(C n, C eps, Across& across_row, const Each& each,
                                           C* mean, C* rstd) {
  C total[2] = {}, variance;
  if constexpr (centred) {  // the second pass corrects the rounding of the first mean
    each([&](C v) { total[0] += v; });
    across_row(total, Add());
    const C guess = total[0] / n;
    C rest[2] = {};
    each([&](C v) {
      rest[0] += v - guess;
      rest[1] += (v - guess) * (v - guess);
    });
    across_row(rest, Add());
    const C shift = rest[0] / n;
    *mean = guess + shift;
    variance = rest[1] / n - shift * shift;
    variance = variance < 0 ? C(0) : variance;
  } else {
    each([&](C v) { total[0] += v * v; });
    across_row(total, Add());
    *mean = 0;
    variance = total[0] / n;
  }
  *rstd = 1 / root(variance + eps);
}

// ---- rows that fit into registers

template <class T>
struct ForwardShared {
  RowScratch<Compute<T>, 2> sums;
  alignas(16) T ring[];  // of x and, if it is added, residual
};

template <class T, bool centred>
__global__ void __launch_bounds__(kRowThreads, 1) norm_forward(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& shared = shared_memory<ForwardShared<T>>();
  AcrossRow across_row(shared.sums);
  const Ring<T> ring(shared.ring, a.ring);
  const bool adds = a.residual.data != nullptr, vectors = a.pieces.vectors;
  const int64_t together = blockDim.y, stride = gridDim.x * together;
  const C n = static_cast<C>(a.pieces.D > 0 ? a.pieces.D : 1);

  const auto start = [&](unsigned step) {
    const int64_t row = blockIdx.x * together + threadIdx.y + step * stride;
    if (row < a.rows)
      a.pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
        ring.fetch(step, 0, p, at<const T>(a.x, row) + first, valid, vectors);
        if (adds) ring.fetch(step, 1, p, at<const T>(a.residual, row) + first, valid, vectors);
      });
    ring.commit();
  };
  C weight[kHeld][W], bias[kHeld][W];
  a.pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
#pragma unroll
    for (int j = 0; j < W; ++j) weight[p][j] = 1, bias[p][j] = 0;
    if (a.weight.data) a.weight.load(first, valid, vectors, weight[p]);
    if (a.bias.data) a.bias.load(first, valid, vectors, bias[p]);
  });
  for (int step = 0; step < ring.steps() - 1; ++step) start(step);

  unsigned step = 0;
  for (int64_t begin = blockIdx.x * together; begin < a.rows; begin += stride, ++step) {
    const int64_t row = begin + threadIdx.y;
    const bool there = row < a.rows;
    const Pieces<T> pieces = a.pieces.where(there);
    start(step + ring.steps() - 1);
    ring.wait();

    C h[kHeld][W], mean, rstd;
    pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
      ring.get(step, 0, p, h[p]);
      if (!adds) return;
      C more[W];
      ring.get(step, 1, p, more);
#pragma unroll
      for (int j = 0; j < W; ++j) h[p][j] = widen(narrow<T>(h[p][j] + more[j]));
      store(at<T>(a.sum, row) + first, valid, vectors, h[p]);
    });
    const auto each = [&](const auto& term) {
      pieces.each_pack(0, [&](int p, int64_t, int64_t valid) {
#pragma unroll
        for (int j = 0; j < W; ++j)
          if (j < valid) term(h[p][j]);
      });
    };
    statistics<centred>(n, a.eps, across_row, each, &mean, &rstd);
    if (threadIdx.x == 0 && there) {
      if constexpr (centred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
      C y[W];
#pragma unroll
      for (int j = 0; j < W; ++j) y[j] = (h[p][j] - mean) * rstd * weight[p][j] + bias[p][j];
      a.out_numbers.store(a.out.offset(row) + first, valid, vectors, y);
    });
  }
  cp_async_wait<0>();
}

// ---- longer rows, a block each: read again for each pass

template <class T, bool centred>
__global__ void __launch_bounds__(kRowThreads, 1) norm_forward_long(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  AcrossRow across_row(shared_memory<RowScratch<C, 2>>());
  const Pieces<T>& pieces = a.pieces;
  const int64_t chunks = pieces.chunks();

  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* h = a.residual.data ? at<const T>(a.sum, row) : at<const T>(a.x, row);
    const auto each_pack = [&](const auto& body) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        pieces.each_pack(chunk, [&](int, int64_t first, int64_t valid) { body(first, valid); });
    };
    if (a.residual.data)
      each_pack([&](int64_t first, int64_t valid) {
        C sum[W], more[W];
        load(at<const T>(a.x, row) + first, valid, pieces.vectors, sum);
        load(at<const T>(a.residual, row) + first, valid, pieces.vectors, more);
#pragma unroll
        for (int j = 0; j < W; ++j) sum[j] += more[j];
        store(at<T>(a.sum, row) + first, valid, pieces.vectors, sum);
      });
    const auto each = [&](const auto& term) {
      each_pack([&](int64_t first, int64_t valid) {
        C v[W];
        load(h + first, valid, pieces.vectors, v);
#pragma unroll
        for (int j = 0; j < W; ++j)
          if (j < valid) term(v[j]);
      });
    };
    C mean, rstd;
    statistics<centred>(static_cast<C>(pieces.D), a.eps, across_row, each, &mean, &rstd);
    if (threadIdx.x == 0) {
      if constexpr (centred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    each_pack([&](int64_t first, int64_t valid) {
      C y[W], weight[W], bias[W];
      load(h + first, valid, pieces.vectors, y);
      if (a.weight.data) a.weight.load(first, valid, pieces.vectors, weight);
      if (a.bias.data) a.bias.load(first, valid, pieces.vectors, bias);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        y[j] = (y[j] - mean) * rstd;
        if (a.weight.data) y[j] *= weight[j];
        if (a.bias.data) y[j] += bias[j];
      }
      a.out_numbers.store(a.out.offset(row) + first, valid, pieces.vectors, y);
    });
  }
}

template <bool centred>
void forward(const NormForward& op, Stream stream) {
  const int64_t D = op.x.size[op.x.rank - 1], rows = pykern::rows(op.x);
  if (rows == 0) return;
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    const bool vectors =
        take_packs<T>({&op.x, &op.weight, &op.bias, &op.residual, &op.out, &op.sum});
    const int threads = row_threads<T>(D), together = rows_together<T>(D);
    const bool held = threads * kHeld * kPack<T> >= D;
    const auto ring = Ring<T>::plan(threads * together, op.residual.given ? 2 : 1);
    const Forward<T> a{.x = rows_of(op.x),
                       .residual = rows_of(op.residual),
                       .out = rows_of(op.out),
                       .sum = rows_of(op.sum),
                       .weight = numbers_of<T>(op.weight),
                       .bias = numbers_of<T>(op.bias),
                       .out_numbers = numbers_of<T>(op.out),
                       .mean = static_cast<Compute<T>*>(op.mean.data),
                       .rstd = static_cast<Compute<T>*>(op.rstd.data),
                       .eps = static_cast<Compute<T>>(op.eps),
                       .rows = rows,
                       .pieces = {D, vectors},
                       .ring = ring};
    Grid grid{.blocks = {},
              .threads = dim3(threads, together),
              .shared = sizeof(RowScratch<Compute<T>, 2>)};
    if (held) {
      grid.blocks = dim3(walking_blocks(ceil_div(rows, together)));
      grid.shared += ring.bytes;
      launch("norm_forward", norm_forward<T, centred>, grid, stream, a);
    } else {
      grid.blocks = dim3(rows < kMaxBlocks ? rows : kMaxBlocks);
      launch("norm_forward", norm_forward_long<T, centred>, grid, stream, a);
    }
  });
}

}  // namespace

void layer_norm_forward(const LayerNormForward& op, Stream stream) { forward<true>(op, stream); }
void rms_norm_forward(const RmsNormForward& op, Stream stream) { forward<false>(op, stream); }

}  // namespace pykern::cuda

// Gradients of layer_norm and rms_norm.
//   g = dout weight,  dh = rstd (g - mean g - xhat mean(g xhat)) + dsum
//   dweight = sum over rows of dout xhat,  dbias = sum over rows of dout
// A block walks over rows, the next ones under way by cp.async, and keeps its share of dweight and
// dbias in registers; a second kernel adds the shares in their order. How many shares there are
// depends on the shape alone, so every GPU gives the same bits.
#include "cuda/columns.cuh"
#include "cuda/math.cuh"
#include "cuda/ring.cuh"
#include "ops/norm.h"

namespace pykern::cuda {
namespace {

constexpr int64_t kShares = 264;   // of dweight and dbias: two blocks for each of 132 processors
constexpr int64_t kLeastRows = 8;  // of a share: writing it stays cheap beside reading the rows

template <class T>
struct Backward {
  Rows h, dout, dsum, dh;
  Numbers<T> weight, dout_numbers;
  const Compute<T>*mean, *rstd;
  Compute<T>* shares;  // [blocks, 2, D], dweight's then dbias's; null: neither is wanted
  int64_t rows;
  Pieces<T> pieces;
  typename Ring<T>::Plan ring;
  bool dout_in_ring;  // it has h's type

  __device__ __forceinline__ Compute<T>* share() const {
    return shares ? shares + blockIdx.x * 2 * pieces.D : nullptr;
  }
};

// ---- rows that fit into registers

template <class T>
struct BackwardShared {
  RowScratch<Compute<T>, 2> sums;
  alignas(16) T ring[];  // of h and dout; in the end sums of columns
};

template <class T, bool centred>
__global__ void __launch_bounds__(kRowThreads, 1) norm_backward(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& shared = shared_memory<BackwardShared<T>>();
  AcrossRow across_row(shared.sums);
  const Ring<T> ring(shared.ring, a.ring);
  const bool vectors = a.pieces.vectors;
  const int together = blockDim.y;
  const int64_t D = a.pieces.D, stride = int64_t(gridDim.x) * together;
  const int64_t first_row = blockIdx.x * int64_t(together) + threadIdx.y;
  const C n = static_cast<C>(D);

  const auto start = [&](unsigned step) {
    const int64_t row = first_row + step * stride;
    if (row < a.rows)
      a.pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
        ring.fetch(step, 0, p, static_cast<const T*>(a.h.data) + a.h.offset(row) + first, valid,
                   vectors);
        if (a.dout_in_ring)
          ring.fetch(step, 1, p, static_cast<const T*>(a.dout.data) + a.dout.offset(row) + first,
                     valid, vectors);
      });
    ring.commit();
  };

  C weight[kHeld][W], dweight[kHeld][W] = {}, dbias[kHeld][W] = {};
  a.pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
#pragma unroll
    for (int j = 0; j < W; ++j) weight[p][j] = 1;
    if (a.weight.data) a.weight.load(first, valid, vectors, weight[p]);
  });
  C mean = 0, rstd = 0;  // of the next row
  const auto read_statistics = [&](int64_t row) {
    if (row >= a.rows) return;
    if constexpr (centred) mean = a.mean[row];
    rstd = a.rstd[row];
  };
  read_statistics(first_row);
  for (int step = 0; step < ring.steps() - 1; ++step) start(step);

  unsigned step = 0;
  for (int64_t row = first_row; row - threadIdx.y < a.rows; row += stride, ++step) {
    const bool there = row < a.rows;
    const Pieces<T> pieces = a.pieces.where(there);
    const C centre = mean, scale = rstd;
    start(step + ring.steps() - 1);
    ring.wait();
    read_statistics(row + stride);

    const auto get_dout = [&](int p, int64_t first, int64_t valid, C(&v)[W]) {  // 0 behind the row
      if (a.dout_in_ring)
        ring.get(step, 1, p, v);
      else
        a.dout_numbers.load(a.dout.offset(row) + first, valid, vectors, v);
    };
    C total[2] = {};  // of g and of g xhat
    Pack<T, W> dsum[kHeld] = {};
    pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
      C xhat[W], dy[W];
      ring.get(step, 0, p, xhat);
      get_dout(p, first, valid, dy);
      if (a.dsum.data)
        read(static_cast<const T*>(a.dsum.data) + a.dsum.offset(row) + first, valid, vectors,
             dsum[p]);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        xhat[j] = (xhat[j] - centre) * scale;
        const C g = dy[j] * weight[p][j];
        total[0] += g;
        total[1] += g * xhat[j];
        dweight[p][j] += dy[j] * xhat[j];
        dbias[p][j] += dy[j];
      }
    });
    across_row(total, Add());
    const C mean_g = centred ? total[0] / n : C(0), mean_gx = total[1] / n;
    pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
      C h[W], dx[W];
      ring.get(step, 0, p, h);  // again: cheaper than registers
      get_dout(p, first, valid, dx);
#pragma unroll
      for (int j = 0; j < W; ++j)
        dx[j] = (dx[j] * weight[p][j] - mean_g - (h[j] - centre) * scale * mean_gx) * scale +
                widen(dsum[p].of[j]);
      store(static_cast<T*>(a.dh.data) + a.dh.offset(row) + first, valid, vectors, dx);
    });
  }
  cp_async_wait<0>();
  if (!a.shares) return;

  // The rows of threads add their sums one after the other, the last one's go to memory.
  C* so_far = reinterpret_cast<C*>(shared.ring);
  for (int turn = 0; turn < together; ++turn) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) != turn) continue;
    a.pieces.each_pack(0, [&](int p, int64_t first, int64_t valid) {
      const auto add = [&](int64_t at, C(&sum)[W]) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          if (j >= valid) continue;
          if (turn > 0) sum[j] += so_far[at + j];
          if (turn + 1 < together) so_far[at + j] = sum[j];
        }
        if (turn + 1 == together) store(a.share() + at, valid, D % W == 0, sum);
      };
      add(first, dweight[p]);
      add(D + first, dbias[p]);
    });
  }
}

// ---- longer rows, a block each: read twice, shares in memory

template <class T, bool centred>
__global__ void __launch_bounds__(kRowThreads, 1) norm_backward_long(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  AcrossRow across_row(shared_memory<RowScratch<C, 2>>());
  const Pieces<T>& pieces = a.pieces;
  const int64_t chunks = pieces.chunks();
  const C n = static_cast<C>(pieces.D);
  C* share = a.share();

  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const C mean = centred ? a.mean[row] : C(0), rstd = a.rstd[row];
    // body(first, valid, xhat, dy, g) for every pack of the row
    const auto each = [&](const auto& body) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        pieces.each_pack(chunk, [&](int, int64_t first, int64_t valid) {
          C xhat[W], dy[W], g[W];
          load(static_cast<const T*>(a.h.data) + a.h.offset(row) + first, valid, pieces.vectors,
               xhat);
          a.dout_numbers.load(a.dout.offset(row) + first, valid, pieces.vectors, dy);
#pragma unroll
          for (int j = 0; j < W; ++j) g[j] = 1;
          if (a.weight.data) a.weight.load(first, valid, pieces.vectors, g);
#pragma unroll
          for (int j = 0; j < W; ++j) g[j] *= dy[j], xhat[j] = (xhat[j] - mean) * rstd;
          body(first, valid, xhat, dy, g);
        });
    };
    C total[2] = {};
    each([&](int64_t, int64_t valid, const C(&xhat)[W], const C(&)[W], const C(&g)[W]) {
#pragma unroll
      for (int j = 0; j < W; ++j)
        if (j < valid) total[0] += g[j], total[1] += g[j] * xhat[j];
    });
    across_row(total, Add());
    const C mean_g = centred ? total[0] / n : C(0), mean_gx = total[1] / n;
    each([&](int64_t first, int64_t valid, const C(&xhat)[W], const C(&dy)[W], const C(&g)[W]) {
      C dx[W] = {};
      if (a.dsum.data)
        load(static_cast<const T*>(a.dsum.data) + a.dsum.offset(row) + first, valid, pieces.vectors,
             dx);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        dx[j] += (g[j] - mean_g - xhat[j] * mean_gx) * rstd;
        if (!share || j >= valid) continue;
        const bool begins = row == blockIdx.x;
        C *dweight = share + first + j, *dbias = dweight + pieces.D;
        *dweight = (begins ? C(0) : *dweight) + dy[j] * xhat[j];
        *dbias = (begins ? C(0) : *dbias) + dy[j];
      }
      store(static_cast<T*>(a.dh.data) + a.dh.offset(row) + first, valid, pieces.vectors, dx);
    });
  }
}

template <bool centred>
void backward(const NormBackward& op, Stream stream) {
  const int64_t D = op.h.size[op.h.rank - 1], rows = pykern::rows(op.h);
  if (D == 0) return;
  const OnDevice device(op.h);
  with_type(op.h.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const bool wanted = op.dweight.given || op.dbias.given;
    const int threads = row_threads<T>(D), together = rows_together<T>(D);
    const bool held = threads * kHeld * kPack<T> >= D;
    const auto ring = Ring<T>::plan(threads * together, 2);
    const int64_t shares = ceil_div(rows, together > kLeastRows ? together : kLeastRows);
    const int64_t blocks = shares < kShares ? shares : kShares;
    const Workspace memory(wanted ? blocks * 2 * D * sizeof(C) : 0, stream);
    const bool vectors = take_packs<T>({&op.h, &op.weight, &op.dout, &op.dsum, &op.dh});
    const Backward<T> a{.h = rows_of(op.h),
                        .dout = rows_of(op.dout),
                        .dsum = rows_of(op.dsum),
                        .dh = rows_of(op.dh),
                        .weight = numbers_of<T>(op.weight),
                        .dout_numbers = numbers_of<T>(op.dout),
                        .mean = static_cast<const C*>(op.mean.data),
                        .rstd = static_cast<const C*>(op.rstd.data),
                        .shares = memory.at<C>(),
                        .rows = rows,
                        .pieces = {D, vectors},
                        .ring = ring,
                        .dout_in_ring = op.dout.dtype == op.h.dtype};
    Grid grid{.blocks = dim3(blocks),
              .threads = dim3(threads, held ? together : 1),
              .shared = sizeof(RowScratch<C, 2>)};
    if (blocks > 0 && held) {
      grid.shared += ring.bytes;
      launch("norm_backward", norm_backward<T, centred>, grid, stream, a);
    } else if (blocks > 0) {
      launch("norm_backward", norm_backward_long<T, centred>, grid, stream, a);
    }
    add_columns<T>(memory.at<C>(), blocks, D, op.dweight, &op.dbias, stream);
  });
}

}  // namespace

void layer_norm_backward(const LayerNormBackward& op, Stream stream) { backward<true>(op, stream); }
void rms_norm_backward(const RmsNormBackward& op, Stream stream) { backward<false>(op, stream); }

}  // namespace pykern::cuda

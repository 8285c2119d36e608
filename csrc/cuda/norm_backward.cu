// Gradients of layer_norm and rms_norm.
//   g = dout weight,  dh = rstd (g - mean g - xhat mean(g xhat)) + dsum
//   dweight = sum over rows of dout xhat,  dbias = sum over rows of dout
// A block walks over rows, the next ones under way by cp.async, and keeps its share of dweight and
// dbias in registers; a second kernel adds the shares in their order. How many shares there are
// depends on the shape alone, so every GPU gives the same bits.
#include "cuda/columns.cuh"
#include "cuda/norm.cuh"
#include "ops/norm.h"

namespace pykern::cuda {
namespace {

constexpr int64_t kShares = 396;   // of dweight and dbias: three blocks for each of 132 processors
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

constexpr int resident(int threads) { return threads <= kBlockThreads ? 3 : 1; }  // blocks

template <class T>
struct BackwardShared {
  RowScratch<Compute<T>, 2> sums;
  alignas(16) T ring[];  // of h, dout and, if it is added, dsum; in the end sums of columns
};

// whole: all packs are whole and aligned, and dout beside a half type is of that type.
template <class T, bool centred, bool whole, int threads>
__global__ void __launch_bounds__(threads, whole ? resident(threads) : 1)
    norm_backward(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& shared = shared_memory<BackwardShared<T>>();
  AcrossRow across_row(shared.sums);
  const Ring<T> ring(shared.ring, a.ring);
  const bool adds = a.dsum.data != nullptr, in_ring = (whole && kHalf<T>) || a.dout_in_ring;
  const int together = blockDim.y;
  const Walk walk;
  const C n = static_cast<C>(a.pieces.D), inverse_n = 1 / n;

  const auto start = [&](unsigned step) {
    const int64_t row = walk.row(step);
    if (row < a.rows) {
      const T* h = at<const T>(a.h, row);
      const T* dout = in_ring ? at<const T>(a.dout, row) : h;
      const T* dsum = adds ? at<const T>(a.dsum, row) : h;
      T *const h_to = ring.packs(step, 0), *const dout_to = ring.packs(step, 1);
      a.pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
        ring.fetch_to(h_to, p, h + first, valid, vectors);
        if (in_ring) ring.fetch_to(dout_to, p, dout + first, valid, vectors);
        if (adds) ring.fetch(step, 2, p, dsum + first, valid, vectors);
      });
    }
    ring.commit();
  };

  C dweight[kHeld][W] = {}, dbias[kHeld][W] = {};
  C mean = 0, rstd = 0;  // of the next row
  const auto read_statistics = [&](int64_t of) {
    if (of >= a.rows) return;
    if constexpr (centred) mean = a.mean[of];
    rstd = a.rstd[of];
  };
  read_statistics(walk.row(0));
  for (int step = 0; step < ring.steps() - 1; ++step) start(step);

  for (unsigned step = 0; walk.row(step) - threadIdx.y < a.rows; ++step) {
    const int64_t row = walk.row(step);
    const Pieces<T> pieces = a.pieces.where(row < a.rows);
    const C centre = mean, scale = rstd;
    start(step + ring.steps() - 1);
    ring.wait();
    read_statistics(walk.row(step + 1));

    const int64_t apart = in_ring ? 0 : a.dout.offset(row);
    const auto get = [&](int p, int first, int valid, bool vectors, C(&h)[W], C(&dy)[W], C(&w)[W]) {
      parameters(a.weight, C(1), first, valid, vectors, w);
      if (in_ring)
        ring.get(step, 1, p, dy);
      else
        a.dout_numbers.load(apart + first, valid, vectors, dy);
      ring.get(step, 0, p, h);
    };
    C total[centred ? 2 : 1] = {};  // of g xhat and of g
    pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
      C h[W], dy[W], w[W];  // dy is 0 behind the row
      get(p, first, valid, vectors, h, dy, w);
#pragma unroll
      for (int j = 0; j < W; ++j) {
        const C term = dy[j] * ((h[j] - centre) * scale);
        dweight[p][j] += term;
        dbias[p][j] += dy[j];
        total[0] = fma(term, w[j], total[0]);
        if constexpr (centred) total[1] = fma(dy[j], w[j], total[1]);
      }
    });
    across_row(total, Add());
    const C mean_gx = quotient_for<T>(total[0], n, inverse_n), slope = -mean_gx * scale;
    const C mean_g = centred ? quotient_for<T>(total[centred], n, inverse_n) : C(0);
    T* dh = at<T>(a.dh, row);
    pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
      C h[W], dx[W], w[W];  // again: cheaper than registers
      get(p, first, valid, vectors, h, dx, w);
#pragma unroll
      for (int j = 0; j < W; ++j)
        dx[j] = fma(h[j] - centre, slope, product(dx[j], w[j]) - mean_g) * scale;
      if (adds) {
        C more[W];
        ring.get(step, 2, p, more);
#pragma unroll
        for (int j = 0; j < W; ++j) dx[j] += more[j];
      }
      store(dh + first, valid, vectors, dx);
    });
  }
  cp_async_wait<0>();
  if (!a.shares) return;

  // The rows of threads add their sums one after the other, the last one's go to memory.
  C* so_far = reinterpret_cast<C*>(shared.ring);
  for (int turn = 0; turn < together; ++turn) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) != turn) continue;
    a.pieces.template each_held<whole>([&](int p, int first, int valid, bool) {
      const auto add = [&](int64_t at, C(&sum)[W]) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          if (j >= valid) continue;
          if (turn > 0) sum[j] += so_far[at + j];
          if (turn + 1 < together) so_far[at + j] = sum[j];
        }
        if (turn + 1 == together) store(a.share() + at, valid, whole, sum);
      };
      add(first, dweight[p]);
      add(a.pieces.D + first, dbias[p]);
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
    const auto ring =
        Ring<T>::plan(threads * together, op.dsum.given ? 3 : 2, resident(threads * together));
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
      const bool whole = vectors && D % kPack<T> == 0 && (!kHalf<T> || a.dout_in_ring);
      launch("norm_backward",
             !whole                    ? norm_backward<T, centred, false, kRowThreads>
             : threads > kBlockThreads ? norm_backward<T, centred, true, kRowThreads>
                                       : norm_backward<T, centred, true, kBlockThreads>,
             grid, stream, a);
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

// layer_norm and rms_norm: one block per row, which it holds in registers while it fits.
//   forward   out = xhat weight + bias,  xhat = (h - mean) rstd     (rms: mean = 0, no bias)
//   backward  g = dout weight,  dh = rstd (g - mean g - xhat mean(g xhat)) + dsum
//             dweight = sum over rows of dout xhat,  dbias = sum over rows of dout
// Backward takes a run of rows per block and keeps its share of dweight and dbias in registers; a
// second kernel adds the shares in their order. How many shares there are depends on the shape
// alone, so every GPU gives the same bits.
#include "cuda/columns.cuh"
#include "cuda/math.cuh"
#include "cuda/pieces.cuh"
#include "ops/norm.h"

namespace pykern::cuda {
namespace {

// ---- forward

template <class T>
struct Forward {
  Rows x, residual, out, sum;
  Numbers<T> weight, bias, out_numbers;
  Compute<T>*mean, *rstd;
  Compute<T> eps;
  int64_t rows;
  Pieces<T> pieces;
};

template <class T, bool centred>
__global__ void __launch_bounds__(kRowThreads) norm_forward(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& scratch = shared_memory<BlockScratch<C, 2>>();
  const Pieces<T>& pieces = a.pieces;
  const int64_t chunks = pieces.chunks();
  const C n = static_cast<C>(pieces.D > 0 ? pieces.D : 1);
  C h[kHeld][W];

  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* x = static_cast<const T*>(a.x.data) + a.x.offset(row);
    const bool adds = a.residual.data != nullptr;
    const T* residual = adds ? static_cast<const T*>(a.residual.data) + a.residual.offset(row) : x;
    T* sum = adds ? static_cast<T*>(a.sum.data) + a.sum.offset(row) : nullptr;
    const int64_t out = a.out.offset(row);

    // h of a chunk; the first time it is added, rounded and written
    const auto read = [&](int64_t chunk, bool first_time) {
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        const bool add = adds && first_time;
        load((adds && !first_time ? sum : x) + first, valid, pieces.vectors, h[p]);
        if (!add) return;
        C more[W];
        load(residual + first, valid, pieces.vectors, more);
#pragma unroll
        for (int j = 0; j < W; ++j) h[p][j] = widen(narrow<T>(h[p][j] + more[j]));
        store(sum + first, valid, pieces.vectors, h[p]);
      });
    };
    // total[i] += term(h, i) over the row
    const auto add_up = [&](bool first_time, C(&total)[2], const auto& terms) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        if (first_time || chunks > 1) read(chunk, first_time);
        pieces.each_pack(chunk, [&](int p, int64_t, int64_t valid) {
#pragma unroll
          for (int j = 0; j < W; ++j)
            if (j < valid) terms(h[p][j], total);
        });
      }
      across_block(total, scratch, Add());
    };

    C mean = 0, variance;
    C total[2] = {};
    if constexpr (centred) {  // the second pass corrects the rounding of the first mean
      add_up(true, total, [](C v, C(&t)[2]) { t[0] += v; });
      const C guess = total[0] / n;
      C rest[2] = {};
      add_up(false, rest, [guess](C v, C(&t)[2]) {
        t[0] += v - guess;
        t[1] += (v - guess) * (v - guess);
      });
      const C shift = rest[0] / n;
      mean = guess + shift;
      variance = rest[1] / n - shift * shift;
      variance = variance < 0 ? C(0) : variance;
    } else {
      add_up(true, total, [](C v, C(&t)[2]) { t[0] += v * v; });
      variance = total[0] / n;
    }
    const C rstd = 1 / root(variance + a.eps);
    if (threadIdx.x == 0) {
      if constexpr (centred) a.mean[row] = mean;
      a.rstd[row] = rstd;
    }
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) read(chunk, false);
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        C weight[W], bias[W];
        if (a.weight.data) a.weight.load(first, valid, pieces.vectors, weight);
        if (a.bias.data) a.bias.load(first, valid, pieces.vectors, bias);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          C y = (h[p][j] - mean) * rstd;
          if (a.weight.data) y *= weight[j];
          if (a.bias.data) y += bias[j];
          weight[j] = y;
        }
        a.out_numbers.store(out + first, valid, pieces.vectors, weight);
      });
    }
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
                       .pieces = {D, vectors}};
    launch("norm_forward", norm_forward<T, centred>, row_grid<T, Compute<T>, 2>(rows, D), stream,
           a);
  });
}

// ---- backward

constexpr int64_t kShares = 528;   // of dweight and dbias: four blocks for each of 132 processors
constexpr int64_t kLeastRows = 8;  // of a share: writing it stays cheap beside reading the rows

template <class T>
struct Backward {
  Rows h, dout, dsum, dh;
  Numbers<T> weight, dout_numbers;
  const Compute<T>*mean, *rstd;
  Compute<T>* shares;  // [blocks, 2, D], dweight's then dbias's; null: neither is wanted
  int64_t rows, rows_per_block;
  Pieces<T> pieces;
};

template <class T, bool centred>
__global__ void __launch_bounds__(kRowThreads) norm_backward(const Backward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& scratch = shared_memory<BlockScratch<C, 2>>();
  const Pieces<T>& pieces = a.pieces;
  const int64_t chunks = pieces.chunks();
  const C n = static_cast<C>(pieces.D > 0 ? pieces.D : 1);
  C xhat[kHeld][W], dy[kHeld][W], weight[kHeld][W], dweight[kHeld][W] = {}, dbias[kHeld][W] = {};
  C* share = a.shares ? a.shares + blockIdx.x * 2 * pieces.D : nullptr;

  const auto read_weight = [&](int64_t chunk) {
    pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
#pragma unroll
      for (int j = 0; j < W; ++j) weight[p][j] = 1;
      if (a.weight.data) a.weight.load(first, valid, pieces.vectors, weight[p]);
    });
  };
  // the share of a chunk lives in registers, or in memory when the row does not fit
  const auto move_share = [&](int64_t chunk, const auto& move) {
    pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
#pragma unroll
      for (int j = 0; j < W; ++j) {
        if (j >= valid) continue;
        move(share[first + j], dweight[p][j]);
        move(share[pieces.D + first + j], dbias[p][j]);
      }
    });
  };
  const auto write = [](C& memory, C& held) { memory = held; };
  const auto fetch = [](C& memory, C& held) { held = memory; };

  if (chunks == 1)
    read_weight(0);
  else if (share)
    for (int64_t chunk = 0; chunk < chunks; ++chunk) move_share(chunk, write);

  const int64_t begin = blockIdx.x * a.rows_per_block;
  const int64_t end = begin + a.rows_per_block < a.rows ? begin + a.rows_per_block : a.rows;
  for (int64_t row = begin; row < end; ++row) {
    const T* h = static_cast<const T*>(a.h.data) + a.h.offset(row);
    const T* dsum = a.dsum.data ? static_cast<const T*>(a.dsum.data) + a.dsum.offset(row) : nullptr;
    T* dh = static_cast<T*>(a.dh.data) + a.dh.offset(row);
    const int64_t dout = a.dout.offset(row);
    const C mean = centred ? a.mean[row] : C(0), rstd = a.rstd[row];

    const auto read = [&](int64_t chunk) {
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        load(h + first, valid, pieces.vectors, xhat[p]);
        a.dout_numbers.load(dout + first, valid, pieces.vectors, dy[p]);
#pragma unroll
        for (int j = 0; j < W; ++j) xhat[p][j] = (xhat[p][j] - mean) * rstd;
      });
      if (chunks > 1) read_weight(chunk);
    };

    C total[2] = {};  // of g and of g xhat
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      read(chunk);
      pieces.each_pack(chunk, [&](int p, int64_t, int64_t valid) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          if (j >= valid) continue;
          const C g = dy[p][j] * weight[p][j];
          total[0] += g;
          total[1] += g * xhat[p][j];
        }
      });
    }
    across_block(total, scratch, Add());
    const C mean_g = centred ? total[0] / n : C(0), mean_gx = total[1] / n;

    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunks > 1) read(chunk);
      if (chunks > 1 && share) move_share(chunk, fetch);
      pieces.each_pack(chunk, [&](int p, int64_t first, int64_t valid) {
        C dx[W], more[W] = {};
        if (dsum) load(dsum + first, valid, pieces.vectors, more);
#pragma unroll
        for (int j = 0; j < W; ++j) {
          const C g = dy[p][j] * weight[p][j];
          dx[j] = (g - mean_g - xhat[p][j] * mean_gx) * rstd + more[j];
          dweight[p][j] += dy[p][j] * xhat[p][j];
          dbias[p][j] += dy[p][j];
        }
        store(dh + first, valid, pieces.vectors, dx);
      });
      if (chunks > 1 && share) move_share(chunk, write);
    }
  }
  if (chunks == 1 && share) move_share(0, write);
}

template <bool centred>
void backward(const NormBackward& op, Stream stream) {
  const int64_t D = op.h.size[op.h.rank - 1], rows = pykern::rows(op.h);
  if (D == 0) return;
  const OnDevice device(op.h);
  with_type(op.h.dtype, [&]<class T>(T) {
    using C = Compute<T>;
    const bool wanted = op.dweight.given || op.dbias.given;
    int64_t rows_per_block = 1;
    if (wanted) {
      rows_per_block = ceil_div(rows, kShares);
      if (rows_per_block < kLeastRows) rows_per_block = kLeastRows;
    } else if (rows > kMaxBlocks) {
      rows_per_block = ceil_div(rows, kMaxBlocks);
    }
    const int64_t blocks = ceil_div(rows, rows_per_block);
    const Workspace shares(wanted ? blocks * 2 * D * sizeof(C) : 0, stream);
    const bool vectors = take_packs<T>({&op.h, &op.weight, &op.dout, &op.dsum, &op.dh});
    const Backward<T> a{.h = rows_of(op.h),
                        .dout = rows_of(op.dout),
                        .dsum = rows_of(op.dsum),
                        .dh = rows_of(op.dh),
                        .weight = numbers_of<T>(op.weight),
                        .dout_numbers = numbers_of<T>(op.dout),
                        .mean = static_cast<const C*>(op.mean.data),
                        .rstd = static_cast<const C*>(op.rstd.data),
                        .shares = shares.at<C>(),
                        .rows = rows,
                        .rows_per_block = rows_per_block,
                        .pieces = {D, vectors}};
    if (blocks > 0)
      launch("norm_backward", norm_backward<T, centred>, row_grid<T, C, 2>(blocks, D), stream, a);
    add_columns<T>(shares.at<C>(), blocks, 2 * D, op.dweight, stream);
    add_columns<T>(shares.at<C>() + D, blocks, 2 * D, op.dbias, stream);
  });
}

}  // namespace

void layer_norm_forward(const LayerNormForward& op, Stream stream) { forward<true>(op, stream); }
void rms_norm_forward(const RmsNormForward& op, Stream stream) { forward<false>(op, stream); }
void layer_norm_backward(const LayerNormBackward& op, Stream stream) { backward<true>(op, stream); }
void rms_norm_backward(const RmsNormBackward& op, Stream stream) { backward<false>(op, stream); }

}  // namespace pykern::cuda

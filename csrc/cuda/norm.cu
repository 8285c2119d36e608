// layer_norm and rms_norm: a row of a block's threads holds a row in registers while it fits.
//   out = xhat weight + bias,  xhat = (h - mean) rstd     (rms: mean = 0, no bias)
#include "cuda/norm.cuh"
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
  bool plain;  // weight and, if centred, bias are there, and of the type of x as out is
};

template <class C>
struct Statistics {
  C guess, shift, rstd;  // the mean is guess + shift
};

// Of n numbers. first(): this thread's sum of h, or of h^2 if rows are not centred; rest(guess,
// sums): its sums of h - guess and of (h - guess)^2, which correct the first rounding.
template <class T, bool centred, class C, class First, class Rest>
__device__ __forceinline__ Statistics<C> statistics(C n, C inverse_n, C eps,
                                                    AcrossRow<C, 2>& across_row, const First& first,
                                                    const Rest& rest) {
  C total[1] = {first()};
  across_row(total, Add());
  const C guess = quotient_for<T>(total[0], n, inverse_n);
  if constexpr (centred) {
    C sums[2] = {};
    rest(guess, sums);
    across_row(sums, Add());
    const C shift = sums[0] * inverse_n;
    const C variance = fma(-shift, shift, quotient_for<T>(sums[1], n, inverse_n));
    return {guess, shift, inverse_root((variance < 0 ? C(0) : variance) + eps)};
  } else {
    return {0, 0, inverse_root(guess + eps)};
  }
}

// ---- rows that fit into registers

template <class T>
struct ForwardShared {
  RowScratch<Compute<T>, 2> sums;
  alignas(16) T ring[];  // of x and, if it is added, residual
};

template <class T, bool centred, bool whole>
__global__ void __launch_bounds__(kRowThreads, whole ? 2 : 1) norm_forward(const Forward<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  auto& shared = shared_memory<ForwardShared<T>>();
  AcrossRow across_row(shared.sums);
  const Ring<T> ring(shared.ring, a.ring);
  const bool adds = a.residual.data != nullptr;
  const Walk walk;
  const C n = static_cast<C>(a.pieces.D > 0 ? a.pieces.D : 1), inverse_n = 1 / n;

  const auto start = [&](unsigned step) {
    const int64_t row = walk.row(step);
    if (row < a.rows) {
      const T *x = at<const T>(a.x, row), *more = adds ? at<const T>(a.residual, row) : x;
      T *const to = ring.packs(step, 0), *const more_to = ring.packs(step, 1);
      a.pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
        ring.fetch_to(to, p, x + first, valid, vectors);
        if (adds) ring.fetch_to(more_to, p, more + first, valid, vectors);
      });
    }
    ring.commit();
  };
  for (int step = 0; step < ring.steps() - 1; ++step) start(step);

  for (unsigned step = 0; walk.row(step) - threadIdx.y < a.rows; ++step) {
    const int64_t row = walk.row(step);
    const bool there = row < a.rows;
    const Pieces<T> pieces = a.pieces.where(there);
    start(step + ring.steps() - 1);
    ring.wait();

    C h[kHeld][W];
    const T *const packs = ring.packs(step, 0), *const more_packs = ring.packs(step, 1);
    const auto first_sum = [&] {
      C total = 0;
      pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
        ring.get_from(packs, p, h[p]);
        if (adds) {
          C more[W];
          ring.get_from(more_packs, p, more);
#pragma unroll
          for (int j = 0; j < W; ++j) h[p][j] = widen(narrow<T>(h[p][j] + more[j]));
          store(at<T>(a.sum, row) + first, valid, vectors, h[p]);
        }
        if constexpr (centred) {
          total += added(h[p]);
        } else {
#pragma unroll
          for (int j = 0; j < W; ++j) total = fma(h[p][j], h[p][j], total);
        }
      });
      return total;
    };
    const auto centre = [&](C guess, C(&sums)[2]) {
      pieces.template each_held<whole>([&](int p, int, int valid, bool) {
#pragma unroll
        for (int j = 0; j < W; ++j) {
          h[p][j] = j < valid ? h[p][j] - guess : C(0);
          sums[1] = fma(h[p][j], h[p][j], sums[1]);
        }
        sums[0] += added(h[p]);
      });
    };
    const auto found = statistics<T, centred>(n, inverse_n, a.eps, across_row, first_sum, centre);
    if (threadIdx.x == 0 && there) {
      if constexpr (centred) a.mean[row] = found.guess + found.shift;
      a.rstd[row] = found.rstd;
    }
    const C rstd = found.rstd, offset = -found.shift * rstd;
    const int64_t out = a.out.offset(row);
    const auto finish = [&](int p, const C(&w)[W], const C(&b)[W], C(&y)[W]) {
#pragma unroll
      for (int j = 0; j < W; ++j) y[j] = fma(fma(h[p][j], rstd, offset), w[j], b[j]);
    };
    if (whole && a.plain) {
      T* y_row = static_cast<T*>(a.out.data) + out;
      pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
        C y[W], w[W], b[W] = {};
        load(static_cast<const T*>(a.weight.data) + first, valid, vectors, w);
        if constexpr (centred) load(static_cast<const T*>(a.bias.data) + first, valid, vectors, b);
        finish(p, w, b, y);
        store(y_row + first, valid, vectors, y);
      });
    } else {
      pieces.template each_held<whole>([&](int p, int first, int valid, bool vectors) {
        C y[W], w[W], b[W];
        parameters(a.weight, C(1), first, valid, vectors, w);
        parameters(a.bias, C(0), first, valid, vectors, b);
        finish(p, w, b, y);
        a.out_numbers.store(out + first, valid, vectors, y);
      });
    }
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
    const auto first_sum = [&] {
      C total = 0;
      each([&](C v) { total += centred ? v : v * v; });
      return total;
    };
    const auto centre = [&](C guess, C(&sums)[2]) {
      each([&](C v) {
        sums[0] += v - guess;
        sums[1] += (v - guess) * (v - guess);
      });
    };
    const C n = static_cast<C>(pieces.D);
    const auto found = statistics<T, centred>(n, 1 / n, a.eps, across_row, first_sum, centre);
    const C mean = found.guess + found.shift, rstd = found.rstd;
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
    const int blocks = 2 * kRowThreads / (threads * together);  // of a processor
    const auto ring = Ring<T>::plan(threads * together, op.residual.given ? 2 : 1, blocks);
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
                       .ring = ring,
                       .plain = is_plain<T>(op.weight) && is_plain<T>(op.out) &&
                                (!centred || is_plain<T>(op.bias))};
    Grid grid{.blocks = {},
              .threads = dim3(threads, together),
              .shared = sizeof(RowScratch<Compute<T>, 2>)};
    if (held) {
      grid.blocks = dim3(walking_blocks(ceil_div(rows, together), threads * together));
      grid.shared += ring.bytes;
      launch("norm_forward",
             vectors && D % kPack<T> == 0 ? norm_forward<T, centred, true>
                                          : norm_forward<T, centred, false>,
             grid, stream, a);
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

// rope: a block turns all heads at one place of one text, whose angles stay in its cache; a thread
// turns one pack of pairs, or copies one pack of what is behind them. A position outside of the
// table, which no kernel can refuse: a row of NaN.
#include "cuda/rotate.cuh"
#include "ops/rope.h"

namespace pykern::cuda {
namespace {

constexpr int kRopeThreads = 256;
constexpr int64_t kMaxTexts = 65535;  // blocks in y

// A tensor [B, H, T, D]
struct Heads {
  void* data;
  int64_t b, h, t;  // strides

  template <class T>
  __device__ __forceinline__ T* at(int64_t text, int64_t head, int64_t place) const {
    return static_cast<T*>(data) + text * b + head * h + place * t;
  }
};

Heads heads_of(const Tensor& t) { return {t.data, t.stride[0], t.stride[1], t.stride[2]}; }

template <class T>
struct Rotation {
  Heads x, out;
  Numbers<T> cos, sin;
  int64_t cos_row, sin_row;  // strides
  const int64_t* positions;  // null: 0..T-1
  int64_t position_b, position_t;
  int64_t B, H, D, P, half;  // `half` pairs are turned
  int packs, pair_packs;     // of a head
  Compute<T> sign;
  bool vectors;
};

template <class T, bool interleaved>
__global__ void __launch_bounds__(kRopeThreads) rope_kernel(const Rotation<T> a) {
  using C = Compute<T>;
  constexpr int W = kPack<T>;
  const int64_t t = blockIdx.x;
  for (int64_t b = blockIdx.y; b < a.B; b += gridDim.y) {
    const int64_t position = a.positions ? a.positions[b * a.position_b + t * a.position_t] : t;
    const bool known = position >= 0 && position < a.P;
    for (unsigned i = threadIdx.x; i < a.H * a.packs; i += blockDim.x) {
      const unsigned h = i / a.packs;
      const int pack = i % a.packs;
      const T* x = a.x.template at<T>(b, h, t);
      T* out = a.out.template at<T>(b, h, t);
      if (pack >= a.pair_packs) {  // not turned
        const int64_t first = 2 * a.half + (pack - a.pair_packs) * W;
        for (int64_t j = first; j < first + W && j < a.D; ++j)
          out[j] = known ? x[j] : narrow<T>(static_cast<C>(NAN));
        continue;
      }
      const int64_t first = pack * W, valid = a.half - first;
      C c[W], s[W];
#pragma unroll
      for (int j = 0; j < W; ++j) c[j] = s[j] = static_cast<C>(NAN);
      if (known) {
        a.cos.load(position * a.cos_row + first, valid, a.vectors, c);
        a.sin.load(position * a.sin_row + first, valid, a.vectors, s);
      }
#pragma unroll
      for (int j = 0; j < W; ++j) s[j] *= a.sign;
      turn_pack<interleaved>(x, out, a.half, first, a.vectors, c, s);
    }
  }
}

}  // namespace

void rope(const Rope& op, Stream stream) {
  const int64_t B = op.x.size[0], H = op.x.size[1], steps = op.x.size[2], D = op.x.size[3];
  const int64_t half = op.cos.size[1];
  if (count(op.x) == 0) return;
  PYKERN_CHECK(value, H * D < (int64_t{1} << 31), "rope: x has ", H, " heads of ", D,
               " numbers, CUDA takes less than 2^31 numbers in all heads");
  const OnDevice device(op.x);
  with_type(op.x.dtype, [&]<class T>(T) {
    const Tensor& p = op.positions;
    const int64_t pair_packs = ceil_div(half, kPack<T>);
    const int64_t packs = pair_packs + ceil_div(D - 2 * half, kPack<T>);
    const bool vectors = take_packs<T>({&op.x, &op.cos, &op.sin, &op.out}) && half % kPack<T> == 0;
    const Rotation<T> a{.x = heads_of(op.x),
                        .out = heads_of(op.out),
                        .cos = numbers_of<T>(op.cos),
                        .sin = numbers_of<T>(op.sin),
                        .cos_row = op.cos.stride[0],
                        .sin_row = op.sin.stride[0],
                        .positions = static_cast<const int64_t*>(p.data),
                        .position_b = p.rank == 2 ? p.stride[0] : 0,
                        .position_t = p.given ? p.stride[p.rank - 1] : 0,
                        .B = B,
                        .H = H,
                        .D = D,
                        .P = op.cos.size[0],
                        .half = half,
                        .packs = static_cast<int>(packs),
                        .pair_packs = static_cast<int>(pair_packs),
                        .sign = static_cast<Compute<T>>(op.inverse ? -1 : 1),
                        .vectors = vectors};
    const int64_t threads = ceil_div(H * packs, kWarp) * kWarp;
    const Grid grid{.blocks = dim3(steps, B < kMaxTexts ? B : kMaxTexts),
                    .threads = dim3(threads < kRopeThreads ? threads : kRopeThreads)};
    launch("rope", op.interleaved ? rope_kernel<T, true> : rope_kernel<T, false>, grid, stream, a);
  });
}

}  // namespace pykern::cuda

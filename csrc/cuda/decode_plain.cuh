// Decode of float and double as they are: a block has a few rows of a key head and a part of its
// keys, a warp every fourth tile of 32 keys. For the scores lanes are keys, each reads a row; for
// the sums lanes are columns of the values. Numbers of an int8 cache are widened as they are read.
#pragma once
#include "cuda/decode.cuh"

namespace pykern::cuda {

constexpr int kPlainWarps = 4;
constexpr int kMostWidth = static_cast<int>(kMostHeadSize);

template <class T>
constexpr int kPlainRows = sizeof(T) == 4 ? 8 : 4;

template <class T>
struct PlainDecodeShared {
  static constexpr int R = kPlainRows<T>;
  alignas(16) T q[R][kMostWidth];  // behind D 0
  struct {
    alignas(16) T p[kWarp][R];  // weights of a tile; -1: the row does not see the key
    int64_t v[kWarp];           // where its values are
  } tile[kPlainWarps];
  WarpSums<T, R, kMostWidth> sums[kPlainWarps];
  BlockShared block;
};

// W numbers of an int8 row, as load()
template <int W, class T>
__device__ __forceinline__ void load_int8(const int8_t* p, int valid, bool vectors, T (&v)[W]) {
  Pack<int8_t, W> pack;
  if constexpr (W % 4 == 0) {
    read(p, valid, vectors, pack);
  } else {
#pragma unroll
    for (int j = 0; j < W; ++j) pack.of[j] = j < valid ? p[j] : int8_t{0};
  }
#pragma unroll
  for (int j = 0; j < W; ++j) v[j] = static_cast<T>(pack.of[j]);
}

template <class T, bool kInt8>
__global__ void __launch_bounds__(kPlainWarps* kWarp, 2) decode_plain(const Decode<T> a) {
  using S = std::conditional_t<kInt8, int8_t, T>;  // of the cache
  constexpr int W = kPack<T>, R = kPlainRows<T>, kColumns = kMostWidth / (kWarp * W);
  auto& shared = shared_memory<PlainDecodeShared<T>>();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int split = blockIdx.x / a.tasks;
  const Task task(a, blockIdx.x - split * a.tasks, R);
  if (split >= task.parts) return;
  const int padding = a.padding.at(task.b), D = a.scores.D, E = a.scores.E;
  auto& tile = shared.tile[warp];
  if (task.at.keys >= 0) {
    for (int i = threadIdx.x; i < R * kMostWidth; i += blockDim.x) {
      const int row = i / kMostWidth, d = i % kMostWidth;
      shared.q[row][d] = d < D ? a.q.at(task.b, task.h(a, row), task.t(a, row))[d] : T(0);
    }
    __syncthreads();
  }

  const auto sum = [&](int begin, int end) {
    constexpr int kStep = kPlainWarps * kWarp;
    const int number = begin / kWarp;  // tiles are dealt by their place
    const int start = (number + (warp + kPlainWarps - number % kPlainWarps) % kPlainWarps) * kWarp;
    const auto row_of = [&](const HeadRows<const T>& rows, const Slots::At& at) {
      if constexpr (kInt8)
        return int8_row(rows, at.batch, task.g, at.row);
      else
        return rows.at(at.batch, task.g, at.row);
    };
    const auto load_row = [&](const S* from, int valid, bool vectors, T(&to)[W]) {
      if constexpr (kInt8)
        load_int8(from, valid, vectors, to);
      else
        load(from, valid, vectors, to);
    };
    const S* const values = reinterpret_cast<const S*>(a.v.data);
    T m[R], l[R], o[R][kColumns][W] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) m[r] = -INFINITY, l[r] = 0;
    for (int first = start; first < end; first += kStep) {
      const int key = first + lane;
      const bool there = key >= begin && key < end;
      T s[R] = {}, v_scale = 1;
      if (there) {
        const Slots::At at = a.slots.at(task.b, padding + key);
        const S* k = row_of(a.k, at);
        tile.v[lane] = row_of(a.v, at) - values;
        T sums[R][W] = {};
#pragma unroll 2
        for (int d = 0; d < D; d += W) {
          T number[W];
          load_row(k + d, D - d, a.k_vectors, number);
#pragma unroll
          for (int r = 0; r < R; ++r) {
            T q[W];
            load(&shared.q[r][d], W, true, q);
#pragma unroll
            for (int j = 0; j < W; ++j) sums[r][j] = fma(q[j], number[j], sums[r][j]);
          }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) s[r] = added(sums[r]);
        if constexpr (kInt8) {
          const T k_scale = a.k_scale.at(at.batch, task.g, at.row);
          v_scale = a.v_scale.at(at.batch, task.g, at.row);
#pragma unroll
          for (int r = 0; r < R; ++r) s[r] *= k_scale;
        }
      }
      T rescale[R];
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int t = task.t(a, r);
        const bool seen =
            there && key >= a.scores.first_key(task.at, t) && key < a.scores.end_key(task.at, t);
        T y = -INFINITY;
        if (seen && a.scores.plain())
          y = s[r] * a.scores.scale;
        else if (seen)
          y = RowOptions<T>(a.scores, task.at, task.b, task.h(a, r), t).score(a.scores, s[r], key);
        const T top = larger(m[r], across_lanes<kWarp>(y, Larger{}));
        const T base = top == T(-INFINITY) ? T(0) : top;  // no key seen so far: all weights are 0
        rescale[r] = power2(m[r] - base);
        const T p = power2(y - base);
        l[r] = fma(l[r], rescale[r], p);
        m[r] = top;
        tile.p[lane][r] = seen ? p * v_scale : T(-1);
      }
#pragma unroll
      for (int r = 0; r < R; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int j = 0; j < W; ++j) o[r][c][j] *= rescale[r];
      __syncwarp();  // the weights are there
      const int last = end - first < kWarp ? end - first : kWarp;
#pragma unroll 2
      for (int i = begin > first ? begin - first : 0; i < last; ++i) {
        const S* v = values + tile.v[i];
        T p[R];
        load(tile.p[i], R, true, p);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = (c * kWarp + lane) * W;
          if (column >= E) break;
          T number[W];
          load_row(v + column, E - column, a.v_vectors, number);
#pragma unroll
          for (int r = 0; r < R; ++r)
            if (!(p[r] < 0))  // 0 times infinity would be NaN
#pragma unroll
              for (int j = 0; j < W; ++j) o[r][c][j] = fma(p[r], number[j], o[r][c][j]);
        }
      }
      __syncwarp();  // and have been read
    }
    auto& to = shared.sums[warp];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const T all = across_lanes<kWarp>(l[r], Add{});
      if (lane == 0) to.m[r] = m[r], to.l[r] = all;
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
#pragma unroll
        for (int j = 0; j < W; ++j) to.out[r][(c * kWarp + lane) * W + j] = o[r][c][j];
    }
  };
  const auto sums_of = [&](int w) -> const auto& { return shared.sums[w]; };
  take_parts<kPlainWarps>(a, task, split, shared.block, sum, sums_of);
}

}  // namespace pykern::cuda

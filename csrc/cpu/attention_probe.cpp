// What attention keeps to itself, made visible: the weights of chosen rows, and the dropout mask.
#include "cpu/attention_memory.h"
#include "cpu/parallel.h"

PYKERN_BEGIN_ISA
namespace {

template <class T>
static Status weights(const AttentionWeights& op, int threads) {
  using C = Compute<T>;
  using V = Vec<C>;
  constexpr int W = kTileColumns<T>, n = kKeys / V::lanes;
  const int64_t B = op.q.size[0], H = op.q.size[1], G = op.k.size[1], D = op.q.size[3];
  const int64_t S = op.k.size[2], rows = op.weights.size[2], heads = G == 0 ? 0 : H / G;
  const int64_t tiles = (S + kKeys - 1) / kKeys;
  const Scratch keys(units<T>(D) * kKeys * sizeof(C), threads);
  const Scratch query(units<T>(D) * sizeof(C), threads);
  if (!keys.ok() || !query.ok()) return Status::out_of_memory;

  parallel_for(B * G * tiles, threads, [&](int64_t task, int thread) {
    const int64_t b = task / tiles / G, g = task / tiles % G, first = task % tiles * kKeys;
    const Group<T> x = group_of<T>(op, b, g);
    const int count = static_cast<int>(S - first < kKeys ? S - first : kKeys);
    C* columns = keys.at<C>(thread);
    pack_keys<T>(columns, x.k + first * x.k_row, x.k_row, count, D);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t t =
            op.rows.given ? static_cast<const int64_t*>(op.rows.data)[i * op.rows.stride[0]] : i;
        const Operand<T> q = unit_rows<T>(x.q.at(h, t), x.q.row, 1, 1, D, query.at<C>(thread));
        C s[kKeys];
        for (int c = 0; c < kKeys / W; ++c) {
          V acc[1][kTileVectors] = {};
          multiply_tile<T, 1, kTileVectors>(units<T>(D), q.data, q.row, 1, columns + c * W, kKeys,
                                            acc);
          for (int j = 0; j < kTileVectors; ++j) store(s + c * W + j * V::lanes, acc[0][j]);
        }
        uint64_t word = visible(x, h, t, first);
        V y[n];
        finish_scores<T>(x, h, t, first, s, word, y);
        const double lse = stat_at(op.lse, b, g * heads + h, t) * kLog2E;
        const C rounded = lse == -INFINITY ? INFINITY : static_cast<C>(lse);
        const V shift = V::splat(rounded), factor = V::splat(rounding_factor(rounded, lse));
        T* out = row_at<T>(op.weights, b, g * heads + h, i) + first;
        for (int j = 0; j < n; ++j) {
          const V p =
              select(lanes_of<C>(word, j * V::lanes), power2(y[j] - shift) * factor, V::zero());
          const int left = count - j * V::lanes;
          if (left > 0) store_n(out + j * V::lanes, p, left < V::lanes ? left : V::lanes);
        }
      }
  });
  return Status::ok;
}

}  // namespace

Status attention_weights(const AttentionWeights& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = weights<T>(op, threads); });
  return status;
}

Status attention_dropout(const AttentionDropout& op, int threads) {
  const int64_t H = op.keep.size[1], T_ = op.keep.size[2], S = op.keep.size[3];
  const Dropout dropout = dropout_of(op.seed, op.dropout_p);
  parallel_rows(op.keep.size[0] * H * T_, 64, threads, [&](int64_t first, int64_t last, int) {
    for (int64_t row = first; row < last; ++row)
      for (int64_t s = 0; s < S; s += kKeys) {
        const uint64_t word = dropout.threshold == 0 ? ~uint64_t(0)
                                                     : keep_word(dropout, row / T_ / H,
                                                                 row / T_ % H, row % T_, s / kKeys);
        bool* keep = static_cast<bool*>(op.keep.data) + row * S + s;
        for (int64_t i = 0; i < kKeys && s + i < S; ++i) keep[i] = word >> i & 1;
      }
  });
  return Status::ok;
}

PYKERN_END_ISA

// rope: one read and one write per number; the rows of cos and sin stay in cache over the heads.
#include "ops/rope.h"

#include "cpu/parallel.h"
#include "cpu/rotate.h"
#include "cpu/rows.h"

PYKERN_BEGIN_ISA
namespace {

constexpr int64_t kGrain = 8192;  // numbers per task: tens of kilobytes

static int64_t position_of(const Tensor& positions, int64_t b, int64_t t) {
  if (!positions.given) return t;
  const int64_t* p = static_cast<const int64_t*>(positions.data);
  if (positions.rank == 1) return p[t * positions.stride[0]];
  return p[b * positions.stride[0] + t * positions.stride[1]];
}

template <bool interleaved, class Number, class Table>
static void rotate_rows(const Rope& op, int threads) {
  const int64_t B = op.x.size[0], H = op.x.size[1], T = op.x.size[2], D = op.x.size[3];
  const int64_t half = op.cos.size[1];
  const int sign = op.inverse ? -1 : 1;
  parallel_rows(B * H * T, kGrain / (D + 1) + 1, threads, [&](int64_t first, int64_t last, int) {
    int64_t t = first % T, h = first / T % H, b = first / (T * H);
    for (int64_t row = first; row < last; ++row) {
      const int64_t p = position_of(op.positions, b, t);
      const Table* cos = static_cast<const Table*>(op.cos.data) + p * op.cos.stride[0];
      const Table* sin = static_cast<const Table*>(op.sin.data) + p * op.sin.stride[0];
      rotate_row<interleaved>(row_at<const Number>(op.x, b, h, t), cos, sin, sign, half, D,
                              row_at<Number>(op.out, b, h, t));
      if (++t == T) t = 0, ++h;
      if (h == H) h = 0, ++b;
    }
  });
}

template <class Number, class Table>
static void rotate_pairs(const Rope& op, int threads) {
  if (op.interleaved)
    rotate_rows<true, Number, Table>(op, threads);
  else
    rotate_rows<false, Number, Table>(op, threads);
}

}  // namespace

Status rope(const Rope& op, int threads) {
  with_type(op.x.dtype, [&]<class Number>(Number) {
    if (op.cos.dtype == op.x.dtype)
      rotate_pairs<Number, Number>(op, threads);
    else
      rotate_pairs<Number, Compute<Number>>(op, threads);
  });
  return Status::ok;
}

PYKERN_END_ISA

// attention, forward: blocks of query rows in parallel, the longest first.
#include "ops/attention.h"

#include "cpu/attention_forward.h"
#include "cpu/parallel.h"

PYKERN_BEGIN_ISA

template <class T>
static Status forward(const AttentionForward& op, int threads) {
  const int64_t N = sequences_of(op), G = op.k.size[1], D = op.q.size[3], E = op.v.size[3];
  const int64_t heads = G == 0 ? 0 : op.q.size[1] / G;
  int64_t most = 0;  // queries of a sequence
  for (int64_t b = 0; b < N; ++b) {
    const int64_t queries = place_of(op, b).queries;
    most = queries > most ? queries : most;
  }
  const int64_t blocks = (heads * most + kBlockRows - 1) / kBlockRows;
  const Scratch scratch(forward_bytes<T>(D, E), threads);
  if (!scratch.ok()) return Status::out_of_memory;

  parallel_for(N * G * blocks, threads, [&](int64_t task, int thread) {
    const int64_t b = task % (N * G) / G, g = task % G;
    const int64_t block = blocks - 1 - task / (N * G);  // causal: later rows see more keys
    const Group<T> x = group_of<T>(op, b, g);
    const Place at = place_of(op, b);
    const int64_t first = block * kBlockRows, rows = x.rows();
    if (first >= rows) return;
    forward_block<T>(x, first, first + kBlockRows < rows ? first + kBlockRows : rows,
                     {op.out, op.lse, at.batch, g * heads, at.q_row}, scratch.at<char>(thread));
  });
  return Status::ok;
}

Status attention_forward(const AttentionForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

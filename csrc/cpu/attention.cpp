// attention, forward: blocks of query rows in parallel, the longest first.
#include "ops/attention.h"

#include "cpu/attention_rows.h"
#include "cpu/parallel.h"

PYKERN_BEGIN_ISA

template <class T>
static Status forward(const AttentionForward& op, int threads) {
  const int64_t B = op.q.size[0], G = op.k.size[1], D = op.q.size[3], E = op.v.size[3];
  const int64_t rows = G == 0 ? 0 : op.q.size[1] / G * op.q.size[2];
  const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  const Scratch scratch(ForwardMemory<T>::bytes(D, E), threads);
  if (!scratch.ok()) return Status::out_of_memory;

  parallel_for(B * G * blocks, threads, [&](int64_t task, int thread) {
    const int64_t b = task % (B * G) / G, g = task % G;
    const int64_t block = blocks - 1 - task / (B * G);  // causal: later rows see more keys
    ForwardMemory<T> memory(D, E, scratch.at<char>(thread));
    const Group<T> x = group_of<T>(op, b, g);
    const Results results = {op.out, op.lse, b, g * x.heads};
    const int64_t first = block * kBlockRows;
    forward_rows<T>(x, first, first + kBlockRows < rows ? first + kBlockRows : rows, results,
                    memory);
  });
  return Status::ok;
}

Status attention_forward(const AttentionForward& op, int threads) {
  Status status = Status::ok;
  with_type(op.q.dtype, [&]<class T>(T) { status = forward<T>(op, threads); });
  return status;
}

PYKERN_END_ISA

// sample: a row by a thread; the choice is cpu/sampling.h.
#include "cpu/sampling.h"

#include "cpu/parallel.h"
#include "cpu/scratch.h"

PYKERN_BEGIN_ISA

Status sample(const Sample& op, int threads) {
  const int64_t B = op.logits.size[0], V = op.logits.size[1];
  const Scratch logit(V * sizeof(double), threads), order(V * sizeof(int32_t), threads);
  if (!logit.ok() || !order.ok()) return Status::out_of_memory;
  const auto at = [](const Tensor& t, int64_t b) { return static_cast<int64_t*>(t.data)[b]; };
  with_type(op.logits.dtype, [&]<class T>(T) {
    parallel_for(B, threads, [&](int64_t b, int thread) {
      const SampleRow row{
          .options = op.options,
          .history = op.history.given ? row_of<const int64_t>(op.history, b) : nullptr,
          .tokens = op.history.given ? at(op.counts, b) : 0,
          .seed = static_cast<uint64_t>(at(op.seeds, b)),
          .draw = static_cast<uint64_t>(at(op.draws, b)),
          .logit = logit.at<double>(thread),
          .order = order.at<int32_t>(thread)};
      static_cast<int64_t*>(op.ids.data)[b] = sample_row(row_of<const T>(op.logits, b), V, row);
    });
  });
  return Status::ok;
}

PYKERN_END_ISA

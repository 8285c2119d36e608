#include "ops/sampling.h"

#include <cmath>

#include "ops/check.h"

namespace pykern {

void check(const Sampling& o, const char* op) {
  PYKERN_CHECK(value, std::isfinite(o.temperature) && o.temperature >= 0, op, ": temperature is ",
               o.temperature, " but must be 0 (greedy) or a positive number");
  PYKERN_CHECK(value, o.top_k >= 0, op, ": top_k is ", o.top_k, " but must be at least 1, or 0");
  PYKERN_CHECK(value, o.top_p > 0 && o.top_p <= 1, op, ": top_p is ", o.top_p,
               " but must be above 0 and at most 1");
  PYKERN_CHECK(value, o.min_p >= 0 && o.min_p <= 1, op, ": min_p is ", o.min_p,
               " but must be from 0 to 1");
  PYKERN_CHECK(value, std::isfinite(o.repetition_penalty) && o.repetition_penalty > 0, op,
               ": repetition_penalty is ", o.repetition_penalty, " but must be a positive number");
}

void check_history(const char* op, const Tensor& history, const Tensor& counts, int64_t more,
                   int64_t V) {
  for (int64_t b = 0; b < history.size[0]; ++b) {
    const int64_t n = static_cast<const int64_t*>(counts.data)[b];
    const int64_t* tokens = static_cast<const int64_t*>(history.data) + b * history.stride[0];
    PYKERN_CHECK(index, n >= 0 && n + more <= history.size[1], op, ": counts[", b, "] is ", n,
                 ", but history has ", history.size[1], " columns, ", more,
                 " of them for new tokens");
    for (int64_t i = 0; i < n; ++i)
      PYKERN_CHECK(index, tokens[i] >= 0 && tokens[i] < V, op, ": history contains ", tokens[i],
                   ", but the vocabulary has ", V, " tokens");
  }
}

void check(const Sample& op) {
  static constexpr Checker c{"sample"};
  const Arg logits{"logits", op.logits}, seeds{"seeds", op.seeds}, draws{"draws", op.draws};
  const Arg history{"history", op.history}, counts{"counts", op.counts}, ids{"ids", op.ids};
  c.floating(logits);
  c.rank(logits, 2, "[B, V]");
  c.unit_last(logits);
  const int64_t B = op.logits.size[0], V = op.logits.size[1];
  PYKERN_CHECK(value, V >= 1, c.op, ": logits have no columns");
  for (const Arg& a : {seeds, draws, counts, ids}) {
    c.dtype(a, DType::i64);
    c.same_device(a, logits);
    c.rank(a, 1, "[B]");
    c.size(a, 0, B, "rows of logits");
    c.contiguous(a);
  }
  PYKERN_CHECK(value, op.history.given == op.counts.given, c.op,
               ": history and counts must be given together");
  if (op.history.given) {
    c.dtype(history, DType::i64);
    c.same_device(history, logits);
    c.rank(history, 2, "[B, n]");
    c.size(history, 0, B, "rows of logits");
    c.unit_last(history);
  }
  c.output(ids);
  c.disjoint({ids}, {logits, seeds, draws, history, counts});
  check(op.options, c.op);
  if (op.logits.device == Device::cpu && op.history.given)
    check_history(c.op, op.history, op.counts, 0, V);
}

}  // namespace pykern

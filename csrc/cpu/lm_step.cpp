// lm_step: the layers once. lm_generate: the layers and the choice of the next tokens, by one team.
#include "ops/lm_step.h"

#include "cpu/lm_layers.h"
#include "cpu/sampling.h"

PYKERN_BEGIN_ISA
namespace {

template <class T>
static Status run_step(const LmStep& op, int threads) {
  const int64_t R = op.tokens.size[0], S = op.lengths.size[0];
  const Work<T> work(*op.model, R, S, Extent(op, 0), threads);
  if (!work.ok()) return Status::out_of_memory;
  const bool last = op.logits.given && op.logits.size[0] == S;
  with_team(threads, [&](Team team) {
    step<T>(team, op, static_cast<const int64_t*>(op.tokens.data), static_cast<T*>(op.logits.data),
            op.logits.stride[0], last, work);
  });
  return Status::ok;
}

// What the texts of lm_generate carry from one token to the next.
struct Running {
  int64_t* tokens;
  int32_t* lengths;
  int64_t steps;
  bool stopped;
};

static bool is_stop(const LmGenerate& op, int64_t id) {
  bool found = id < 0;
  for (int64_t i = 0; op.stop_tokens.given && i < op.stop_tokens.size[0]; ++i)
    found = found || static_cast<const int64_t*>(op.stop_tokens.data)[i] == id;
  return found;
}

// Draws the next token of text s and writes it where the next step and the caller look.
template <class T>
static void draw(const LmGenerate& op, int64_t s, int64_t k, const T* logits, double* logit,
                 int32_t* order, Running& running) {
  const int64_t V = op.step.model->vocabulary;
  const auto at = [&](const Tensor& t) { return static_cast<int64_t*>(t.data) + s; };
  int64_t* history = nullptr;
  if (op.history.given) history = static_cast<int64_t*>(op.history.data) + s * op.history.size[1];
  const SampleRow row{.options = op.options,
                      .history = history,
                      .tokens = history ? *at(op.counts) : 0,
                      .seed = static_cast<uint64_t>(*at(op.seeds)),
                      .draw = static_cast<uint64_t>(*at(op.draws)),
                      .logit = logit,
                      .order = order};
  const int64_t id = sample_row(logits + s * V, V, row);
  static_cast<int64_t*>(op.ids.data)[s * op.ids.size[1] + k] = id;
  *at(op.draws) += 1;
  if (history && id >= 0) history[(*at(op.counts))++] = id;
  running.tokens[s] = id;
  running.lengths[s] += 1;
  if (is_stop(op, id)) __atomic_store_n(&running.stopped, true, __ATOMIC_RELAXED);
}

template <class T>
static Status run_generate(const LmGenerate& op, int threads) {
  const LmModel& m = *op.step.model;
  const int64_t S = op.step.lengths.size[0], K = op.ids.size[1], V = m.vocabulary;
  const Work<T> work(m, S, S, Extent(op.step, K - 1), threads);
  const Scratch logits(S * V * sizeof(T)), tokens(S * sizeof(int64_t)),
      lengths(S * sizeof(int32_t));
  const Scratch logit(V * sizeof(double), threads), order(V * sizeof(int32_t), threads);
  if (!work.ok() || !logits.ok() || !tokens.ok() || !lengths.ok() || !logit.ok() || !order.ok())
    return Status::out_of_memory;
  Running running{tokens.at<int64_t>(), lengths.at<int32_t>(), 0, false};
  for (int64_t s = 0; s < S; ++s) {
    running.tokens[s] = static_cast<const int64_t*>(op.step.tokens.data)[s];
    running.lengths[s] =
        static_cast<const int32_t*>(op.step.lengths.data)[s * op.step.lengths.stride[0]];
  }
  LmStep each = op.step;
  each.lengths.data = running.lengths, each.lengths.stride[0] = 1;
  with_team(threads, [&](Team team) {
    for (int64_t k = 0; k < K; ++k) {
      step<T>(team, each, running.tokens, logits.at<T>(), V, true, work);
      team.loop(S, [&](int64_t s) {
        draw<T>(op, s, k, logits.at<T>(), logit.at<double>(team.thread()),
                order.at<int32_t>(team.thread()), running);
      });
      if (team.thread() == 0) running.steps = k + 1;
      if (__atomic_load_n(&running.stopped, __ATOMIC_RELAXED)) break;
    }
  });
  *op.steps = running.steps;
  return Status::ok;
}

template <class Run>
static Status in_dtype(const LmModel& m, const Run& run) {
  return m.embedding.dtype == DType::bf16 ? run(bf16{}) : run(float{});
}

}  // namespace

Status lm_step(const LmStep& op, int threads) {
  return in_dtype(*op.model, [&]<class T>(T) { return run_step<T>(op, threads); });
}

Status lm_generate(const LmGenerate& op, int threads) {
  return in_dtype(*op.step.model, [&]<class T>(T) { return run_generate<T>(op, threads); });
}

PYKERN_END_ISA

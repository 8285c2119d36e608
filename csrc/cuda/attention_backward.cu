// attention, backward: what the rows need, in one pass over out and dout; then dq, dk, dv, dbias
// and dsinks, each by kernels that own their results.
#include "cuda/attention_halves.h"
#include "cuda/attention_plain.h"

namespace pykern::cuda {
namespace {

constexpr int kRowThreads = 256, kFactWarps = kRowThreads / kWarp;

template <class T>
struct FactRows {
  HeadRows<const T> out, dout;
  Stats lse, dlse;
  RowFacts<Compute<T>>* facts;  // [B, H, T]
  int64_t rows, H, queries;
  int E;
  bool words;
};

// A warp per row: delta = sum of dout out - dlse.
template <class T>
__global__ void __launch_bounds__(kRowThreads) attention_facts(const FactRows<T> a) {
  using C = Compute<T>;
  constexpr int V = kPack<T>;
  const int64_t i = int64_t{blockIdx.x} * kFactWarps + threadIdx.x / kWarp;
  if (i >= a.rows) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t head = quotient(i, a.queries), t = i - head * a.queries;
  const int64_t b = quotient(head, a.H), h = head - b * a.H;
  const T *out = a.out.at(b, h, t), *dout = a.dout.at(b, h, t);
  C sum = 0;
  for (int e = lane * V; e < a.E; e += kWarp * V) {
    C x[V], dx[V];
    load(out + e, a.E - e, a.words, x);
    load(dout + e, a.E - e, a.words, dx);
#pragma unroll
    for (int j = 0; j < V; ++j) sum = fma(x[j], dx[j], sum);
  }
  sum = across_lanes<kWarp>(sum, Add());
  if (lane > 0) return;
  const double dlse = a.dlse.data ? a.dlse.at(b, h, t) : 0;
  a.facts[i] = facts_of(a.lse.at(b, h, t), static_cast<C>(sum - dlse));
}

template <class T>
struct Sinks {
  const T* sinks;
  T* dsinks;
  int64_t sink_step, dsink_step;
  Stats lse;
  const RowFacts<Compute<T>>* facts;
  int64_t rows, H, queries;  // rows: of a head
};

// A block per head: dsinks = - sum over b, t of exp(sink - lse) delta, each thread every 256th row.
template <class T>
__global__ void __launch_bounds__(kRowThreads) attention_dsinks(const Sinks<T> a) {
  auto& scratch = shared_memory<RowScratch<double, 1>>();
  AcrossRow<double, 1> across_row(scratch);
  const int64_t h = blockIdx.x;
  const double sink = widen(a.sinks[h * a.sink_step]);
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < a.rows && sink != -INFINITY; i += kRowThreads) {
    const int64_t b = quotient(i, a.queries), t = i - b * a.queries;
    const double delta = a.facts[(b * a.H + h) * a.queries + t].delta;
    sum[0] -= exp(sink - a.lse.at(b, h, t)) * delta;
  }
  across_row(sum, Add());
  if (threadIdx.x == 0) a.dsinks[h * a.dsink_step] = narrow<T>(sum[0]);
}

template <class T>
void backward(const AttentionBackward& op, const MaskBits& mask, Stream stream) {
  using Facts = RowFacts<Compute<T>>;
  const int64_t B = op.q.size[0], H = op.q.size[1], queries = op.q.size[2];
  const Scores<T> x = scores_of<T>(op, mask);
  const Workspace memory(B * H * queries * sizeof(Facts), stream);
  Facts* facts = memory.at<Facts>();
  const Stats lse = stats_of(op.lse);
  if (B * H * queries > 0) {
    const FactRows<T> a{.out = head_rows<const T>(op.out),
                        .dout = head_rows<const T>(op.dout),
                        .lse = lse,
                        .dlse = stats_of(op.dlse),
                        .facts = facts,
                        .rows = B * H * queries,
                        .H = H,
                        .queries = queries,
                        .E = x.E,
                        .words = take_packs<T>({&op.out, &op.dout})};
    launch("attention_facts", attention_facts<T>,
           Grid{.blocks = dim3(ceil_div(a.rows, kFactWarps)), .threads = dim3(kRowThreads)}, stream,
           a);
  }
  bool done = false;
  if constexpr (kHalf<T>) done = halves_backward<T>(op, x, facts, stream);
  if (!done) plain_backward<T>(op, x, facts, stream);
  if (op.dbias.given) bias_gradient<T>(op, x, facts, stream);
  if (op.dsinks.given && H > 0) {
    const Sinks<T> a{.sinks = x.sinks,
                     .dsinks = static_cast<T*>(op.dsinks.data),
                     .sink_step = x.sink_head,
                     .dsink_step = op.dsinks.stride[0],
                     .lse = lse,
                     .facts = facts,
                     .rows = B * queries,
                     .H = H,
                     .queries = queries};
    launch("attention_dsinks", attention_dsinks<T>,
           Grid{.blocks = dim3(H),
                .threads = dim3(kRowThreads),
                .shared = sizeof(RowScratch<double, 1>)},
           stream, a);
  }
}

}  // namespace

void attention_backward(const AttentionBackward& op, Stream stream) {
  const OnDevice device(op.q);
  const PackedMask mask(op.mask, stream);
  with_type(op.q.dtype, [&]<class T>(T) { backward<T>(op, mask.bits(), stream); });
}

}  // namespace pykern::cuda

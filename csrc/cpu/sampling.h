// The choice of one token from one row of logits, by itself or at the end of a step.
#pragma once
#include <math.h>

#include "cpu/math.h"
#include "cpu/philox.h"
#include "cpu/rows.h"
#include "ops/sampling.h"

PYKERN_BEGIN_ISA
namespace {

// What one row needs beside its logits; scratch of V doubles and V int32.
struct SampleRow {
  const Sampling& options;
  const int64_t* history;
  int64_t tokens;  // in the history
  uint64_t seed, draw;
  double* logit;
  int32_t* order;
};

// A heap of token ids: the most likely one, the lowest id among equals, is at the top.
struct TokenHeap {
  const double* logit;
  int32_t* id;
  int64_t size;

  bool ahead(int32_t a, int32_t b) const {
    return logit[a] > logit[b] || (logit[a] == logit[b] && a < b);
  }
  void sink(int64_t i) {
    const int32_t moved = id[i];
    for (int64_t child; (child = 2 * i + 1) < size; i = child) {
      if (child + 1 < size && ahead(id[child + 1], id[child])) ++child;
      if (!ahead(id[child], moved)) break;
      id[i] = id[child];
    }
    id[i] = moved;
  }
  void build() {
    for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i);
  }
  // Takes the top out and puts it behind the others.
  int32_t pop() {
    const int32_t top = id[0];
    id[0] = id[--size];
    id[size] = top;
    if (size > 0) sink(0);
    return top;
  }
};

// sum over the first n of exp((l - most) / temperature), which replaces l
static inline double weigh(double* l, int64_t n, double most, double temperature) {
  const VecD shift = VecD::splat(most), divisor = VecD::splat(temperature);
  each_vector<double>(
      n, [&](int64_t i, int m) { store_n(l + i, exp((load_n(l + i, m) - shift) / divisor), m); });
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += l[i];
  return total;
}

// The first of n ids whose cumulative weight exceeds target; the last of positive weight where
// rounding leaves none. ids null: 0, 1, 2, ...
static inline int64_t pick(const double* weight, const int32_t* ids, int64_t n, double target) {
  double sum = 0;
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = ids ? ids[i] : i;
    if (weight[id] == 0) continue;
    sum += weight[id];
    last = id;
    if (sum > target) return id;
  }
  return last;
}

// The id of the largest logit, the lowest among equals; -1 where one is NaN or the largest is
// infinite.
template <class T>
static int64_t most_likely(const T* logits, int64_t V) {
  using C = Compute<T>;
  using Vector = Vec<C>;
  const int64_t whole = V / Vector::lanes * Vector::lanes;
  Vector most = Vector::splat(-INFINITY), poison = Vector::zero();
  for (int64_t i = 0; i < whole; i += Vector::lanes) {
    const Vector l = load(logits + i);
    most = max(most, l);
    poison = select(l == l, poison, l);
  }
  C best = most.max();
  bool broken = poison.sum() != 0;
  for (int64_t i = whole; i < V; ++i) {
    const C l = widen(logits[i]);
    broken = broken || l != l;
    best = l > best ? l : best;
  }
  if (broken || best == INFINITY || best == -INFINITY) return -1;
  int64_t id = 0;
  const Vector wanted = Vector::splat(best);
  while (id < whole && !bits_of(load(logits + id) == wanted)) id += Vector::lanes;
  while (widen(logits[id]) != best) ++id;
  return id;
}

// The token, or -1 where a logit is NaN or the largest one is infinite.
template <class T>
static int64_t sample_row(const T* logits, int64_t V, const SampleRow& row) {
  const Sampling& o = row.options;
  if (o.temperature == 0 && o.repetition_penalty == 1) return most_likely(logits, V);
  double* l = row.logit;
  for (int64_t i = 0; i < V; ++i) l[i] = widen(logits[i]);
  if (o.repetition_penalty != 1)
    for (int64_t i = 0; i < row.tokens; ++i) {  // once for each token, however often it came
      const int64_t id = row.history[i];
      const double was = widen(logits[id]);
      l[id] = was > 0 ? was / o.repetition_penalty : was * o.repetition_penalty;
    }
  int64_t best = 0;
  for (int64_t i = 0; i < V; ++i) {
    if (l[i] != l[i]) return -1;
    if (l[i] > l[best]) best = i;
  }
  const double most = l[best];
  if (most == INFINITY || most == -INFINITY) return -1;
  if (o.temperature == 0) return best;

  const double random = uniform(row.draw, row.seed);
  const bool cut = (o.top_k > 0 && o.top_k < V) || o.top_p < 1 || o.min_p > 0;
  if (!cut) {
    const double total = weigh(l, V, most, o.temperature);
    return pick(l, nullptr, V, random * total);
  }
  TokenHeap heap{l, row.order, V};
  for (int64_t i = 0; i < V; ++i) row.order[i] = static_cast<int32_t>(i);
  heap.build();
  const int64_t most_tokens = o.top_k > 0 && o.top_k < V ? o.top_k : V;
  const bool popped = most_tokens < V;
  for (int64_t k = 0; popped && k < most_tokens; ++k) heap.pop();
  // Weights are in the order of the logits that they replace, so the heap goes on holding.
  double candidates = weigh(l, V, most, o.temperature);
  if (popped) {
    candidates = 0;
    for (int64_t k = 0; k < most_tokens; ++k) candidates += l[row.order[V - 1 - k]];
  }
  double kept = 0;
  int64_t count = 0;  // of tokens that stay, which lie at order[V - 1], order[V - 2], ...
  while (count < most_tokens && (count == 0 || kept < o.top_p * candidates)) {
    const int32_t id = popped ? row.order[V - 1 - count] : heap.pop();
    if (count > 0 && l[id] < o.min_p) break;
    kept += l[id];
    ++count;
  }
  for (int64_t i = 0; i < count / 2; ++i) {  // the kept ones in order, at the end
    int32_t &a = row.order[V - count + i], &b = row.order[V - 1 - i];
    const int32_t swapped = a;
    a = b, b = swapped;
  }
  return pick(l, row.order + V - count, count, random * kept);
}

}  // namespace
PYKERN_END_ISA

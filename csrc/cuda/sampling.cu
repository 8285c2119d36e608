// sample: a block chooses the token of a row. Weights exp((l - most) / temperature) are whole
// numbers, parts of 2^-shift of the largest, so that sums have no order and no rounding. Where the
// list of candidates ends and which of them is drawn are the same question: which is the first,
// most likely first, at which a sum passes a target. It is answered by dividing the range of the
// logits, and of the ids among equal ones, into kParts until one is left; nothing is sorted.
#include <limits.h>

#include "cuda/math.cuh"
#include "cuda/philox.cuh"
#include "cuda/reduce.cuh"
#include "cuda/rows.cuh"
#include "cuda/sampling.h"

namespace pykern::cuda {
namespace {

constexpr int kChoiceThreads = 512, kParts = 256;
constexpr int kMostLevels = 12;  // a level leaves 1 / kParts of a range; a double has 64 bits

using Mass = unsigned long long;

template <class T>
struct ChoiceRows {
  const T* logits;
  int64_t logits_row, V, K, history_row;
  const int64_t* seeds;
  int64_t* draws;
  int64_t* history;
  int64_t* counts;
  int64_t* ids;
  double* behind;  // [B, V]: how far behind the largest
  Mass* weight;    // [B, V]
  Sampling options;
  int shift;
  Running running;
};

struct Level {
  double low, width;
  int part;

  __device__ __forceinline__ int of(double key) const {
    const int part = static_cast<int>((key - low) / width * kParts);
    return part < kParts ? part : kParts - 1;
  }
};

struct ChoiceShared {
  RowScratch<double, 2> doubles;
  RowScratch<Mass, 1> masses;
  Mass part[kParts], of_warp[kParts / kWarp];
  Mass before;
  int found;
  Level levels[kMostLevels];
};

class Chooser {
 public:
  __device__ __forceinline__ explicit Chooser(ChoiceShared& shared)
      : shared_(shared), doubles_(shared.doubles), masses_(shared.masses) {}

  __device__ __forceinline__ double largest(double x) {
    double of[1] = {x};
    doubles_(of, Larger{});
    return of[0];
  }
  __device__ __forceinline__ Mass sum(Mass x) {
    Mass of[1] = {x};
    masses_(of, Add{});
    return of[0];
  }
  template <class Measure>
  __device__ __forceinline__ Mass sum_of(int64_t V, const Measure& measure) {
    Mass own = 0;
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) own += measure(i);
    return sum(own);
  }

  // The key, counted from below, at which the sum of the measures first exceeds target, which then
  // is what is left of it for those of this key. Their sum must exceed it.
  template <class Key, class Measure>
  __device__ __forceinline__ double first_beyond(int64_t V, const Key& key, const Measure& measure,
                                                 Mass& target) {
    for (int levels = 0;; ++levels) {
      const auto within = [&](int64_t i) {
        if (measure(i) == 0) return false;
        for (int l = 0; l < levels; ++l)
          if (shared_.levels[l].of(key(i)) != shared_.levels[l].part) return false;
        return true;
      };
      double ends[2] = {-INFINITY, -INFINITY};  // the largest key, and the smallest negated
      for (int64_t i = threadIdx.x; i < V; i += blockDim.x)
        if (within(i)) ends[0] = larger(ends[0], key(i)), ends[1] = larger(ends[1], -key(i));
      doubles_(ends, Larger{});
      if (ends[0] == -ends[1] || levels == kMostLevels) return -ends[1];
      const Level level{-ends[1], ends[0] + ends[1], 0};
      for (int p = threadIdx.x; p < kParts; p += blockDim.x) shared_.part[p] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < V; i += blockDim.x)
        if (within(i)) atomicAdd(&shared_.part[level.of(key(i))], measure(i));
      __syncthreads();
      find_part(target);
      if (threadIdx.x == 0) shared_.levels[levels] = {level.low, level.width, shared_.found};
      target -= shared_.before;
      __syncthreads();  // levels are there, part and found have been read
    }
  }

 private:
  // found: the part in which the sum of the parts first exceeds target; before: the sum in front
  __device__ __forceinline__ void find_part(Mass target) {
    const int p = threadIdx.x, lane = p % kWarp;
    const Mass own = p < kParts ? shared_.part[p] : 0;
    Mass sum = own;
    for (int step = 1; step < kWarp; step *= 2) {
      const Mass other = __shfl_sync(kAllLanes, sum, lane - step);
      if (lane >= step) sum += other;
    }
    if (p < kParts && lane == kWarp - 1) shared_.of_warp[p / kWarp] = sum;
    __syncthreads();
    if (p < kParts) {
      for (int w = 0; w < p / kWarp; ++w) sum += shared_.of_warp[w];
      if (sum > target && sum - own <= target) shared_.found = p, shared_.before = sum - own;
    }
    __syncthreads();
  }

  ChoiceShared& shared_;
  AcrossRow<double, 2> doubles_;
  AcrossRow<Mass, 1> masses_;
};

// A place in the list of candidates: the logit's distance from the largest, then the id.
struct Candidate {
  double behind;
  double id;
};

template <class T>
__device__ __forceinline__ int64_t chosen(const ChoiceRows<T>& a, int64_t b, ChoiceShared& shared) {
  const Sampling& o = a.options;
  const int64_t V = a.V;
  const T* logits = a.logits + b * a.logits_row;
  double* behind = a.behind + b * V;
  Mass* weight = a.weight + b * V;
  Chooser across(shared);

  // The logits, of tokens in the history with the penalty
  const bool penalised = o.repetition_penalty != 1 && a.history;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x)
    behind[i] = static_cast<double>(widen(logits[i])) + 0.0;  // one zero
  __syncthreads();
  if (penalised) {
    const int64_t* history = a.history + b * a.history_row;
    for (int64_t i = threadIdx.x; i < a.counts[b]; i += blockDim.x) {
      const int64_t id = history[i];  // in several threads the same number
      if (id < 0 || id >= V) continue;
      const double was = static_cast<double>(widen(logits[id])) + 0.0;
      behind[id] = was > 0 ? was / o.repetition_penalty : was * o.repetition_penalty;
    }
    __syncthreads();
  }
  double own = -INFINITY, own_id = V;
  bool broken = false;
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    broken = broken || behind[i] != behind[i];
    if (behind[i] > own) own = behind[i], own_id = static_cast<double>(i);
  }
  const double most = across.largest(own);
  const bool any_broken = across.largest(broken ? 1.0 : 0.0) > 0;
  if (any_broken || most == INFINITY || most == -INFINITY) return -1;
  const double best = -across.largest(own == most ? -own_id : -INFINITY);
  if (o.temperature == 0) return static_cast<int64_t>(best);

  const double unit = static_cast<double>(Mass{1} << a.shift);
  for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
    const double far = most - behind[i];
    behind[i] = far;
    weight[i] = static_cast<Mass>(exp(-far / o.temperature) * unit);
  }  // here and below a thread reads none but its own
  const auto distance = [&](int64_t i) { return behind[i]; };
  const auto id = [](int64_t i) { return static_cast<double>(i); };
  const double random =
      uniform(static_cast<uint64_t>(a.draws[b]), static_cast<uint64_t>(a.seeds[b]));
  const auto target_of = [&](Mass kept) {
    const Mass target = static_cast<Mass>(random * static_cast<double>(kept));
    return target < kept ? target : kept - 1;
  };

  const bool first_tokens = o.top_k > 0 && o.top_k < V;
  if (!first_tokens && o.top_p >= 1 && o.min_p <= 0) {  // in the order of the ids
    const auto mass = [&](int64_t i) { return weight[i]; };
    Mass target = target_of(across.sum_of(V, mass));
    return static_cast<int64_t>(across.first_beyond(V, id, mass, target));
  }

  Candidate last{INFINITY, INFINITY};  // of those that stay
  const auto stays = [&](int64_t i) {
    return behind[i] < last.behind ||
           (behind[i] == last.behind && static_cast<double>(i) <= last.id);
  };
  // Where the sum of the measures of those that stay exceeds target, most likely first
  const auto candidate_at = [&](const auto& measure, Mass target) {
    const auto of_those = [&](int64_t i) { return stays(i) ? measure(i) : Mass{0}; };
    const double far = across.first_beyond(V, distance, of_those, target);
    const auto as_far = [&](int64_t i) { return behind[i] == far ? of_those(i) : Mass{0}; };
    return Candidate{far, across.first_beyond(V, id, as_far, target)};
  };
  const auto one = [&](int64_t i) { return Mass{behind[i] < INFINITY}; };
  if (first_tokens && across.sum_of(V, one) > static_cast<Mass>(o.top_k))
    last = candidate_at(one, static_cast<Mass>(o.top_k) - 1);
  const auto all = [&](int64_t i) { return stays(i) ? weight[i] : Mass{0}; };
  if (o.top_p < 1) {
    const Mass wanted =
        static_cast<Mass>(ceil(o.top_p * static_cast<double>(across.sum_of(V, all))));
    last = candidate_at(all, wanted > 0 ? wanted - 1 : 0);
  }
  const double least = o.min_p * unit;
  const auto mass = [&](int64_t i) {
    return stays(i) && static_cast<double>(weight[i]) >= least ? weight[i] : Mass{0};
  };
  return static_cast<int64_t>(candidate_at(mass, target_of(across.sum_of(V, mass))).id);
}

template <class T>
__global__ void __launch_bounds__(kChoiceThreads, 1) choose_tokens(const ChoiceRows<T> a) {
  auto& shared = shared_memory<ChoiceShared>();
  const Running& running = a.running;
  const int64_t b = blockIdx.x;
  const int now = running.tokens ? *running.now : 1;
  if (running.tokens && *running.last < now) return;
  const int64_t id = chosen(a, b, shared);
  if (threadIdx.x != 0) return;
  a.ids[b * a.K + now - 1] = id;
  if (!running.tokens) return;
  a.draws[b] += 1;
  if (a.history && id >= 0) a.history[b * a.history_row + a.counts[b]++] = id;
  running.tokens[b] = id;
  running.lengths[b] += 1;
  bool stops = id < 0;
  for (int64_t i = 0; i < running.stops; ++i) stops = stops || running.stop_tokens[i] == id;
  if (stops) *running.last = now;  // whichever of several blocks
}

}  // namespace

size_t choice_bytes(const Choice& c) { return count(c.logits) * (sizeof(double) + sizeof(Mass)); }

void choose(const Choice& c, void* scratch, Stream stream) {
  const int64_t B = c.logits.size[0], V = c.logits.size[1];
  if (B == 0) return;
  PYKERN_CHECK(value, B < kMaxBlocks && V < (int64_t{1} << 31), "sample: ", B, " rows of ", V,
               " logits are too many on CUDA");
  int shift = 62;  // the weights of a row add up to less than 2^63
  while (V >> (62 - shift) > 0) --shift;
  if (shift > 52) shift = 52;  // what a double holds
  with_type(c.logits.dtype, [&]<class T>(T) {
    const ChoiceRows<T> a{.logits = static_cast<const T*>(c.logits.data),
                          .logits_row = c.logits.stride[0],
                          .V = V,
                          .K = c.ids.rank == 2 ? c.ids.size[1] : 1,
                          .history_row = c.history.given ? c.history.stride[0] : 0,
                          .seeds = static_cast<const int64_t*>(c.seeds.data),
                          .draws = static_cast<int64_t*>(c.draws.data),
                          .history = static_cast<int64_t*>(c.history.data),
                          .counts = static_cast<int64_t*>(c.counts.data),
                          .ids = static_cast<int64_t*>(c.ids.data),
                          .behind = static_cast<double*>(scratch),
                          .weight = reinterpret_cast<Mass*>(static_cast<double*>(scratch) + B * V),
                          .options = c.options,
                          .shift = shift,
                          .running = c.running};
    const Grid grid{
        .blocks = dim3(B), .threads = dim3(kChoiceThreads), .shared = sizeof(ChoiceShared)};
    launch("sample", choose_tokens<T>, grid, stream, a);
  });
}

void sample(const Sample& op, Stream stream) {
  const OnDevice device(op.logits);
  const Choice c{op.logits, op.seeds, op.draws, op.history, op.counts, op.ids, op.options, {}};
  const Workspace scratch(choice_bytes(c), stream);
  choose(c, scratch.at<void>(), stream);
}

}  // namespace pykern::cuda

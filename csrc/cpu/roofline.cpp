// roofline: loops with nothing in them but the resource that is measured.
#include "ops/roofline.h"

#include "cpu/parallel.h"
#include "cpu/rows.h"
#include "cpu/tile.h"

PYKERN_BEGIN_ISA

constexpr int kChains =
    12;  // latency 4 x 2 units = 8 at least; 12 and two factors fit 16 registers
constexpr int kStreams = 8;  // vectors in flight of the reading loop

// One more multiply-add of a chain. x -> 0.999 x + 0.001 goes to 1, so that neither infinities nor
// subnormal numbers change the pace; a product that no chain enters would be taken out of the loop.
template <class T>
static inline Vec<Compute<T>> link(Vec<Compute<T>> x) {
  using V = Vec<Compute<T>>;
  return fma(x, V::splat(Compute<T>(0.999)), V::splat(Compute<T>(0.001)));
}
#if defined(__AVX512BF16__)
template <>
inline VecF link<bf16>(VecF x) {
  const VecF pair = pack_pairs(VecF::splat(0.03f), VecF::splat(0.02f));
  return dot_pairs(x, pair, pair);
}
#endif

template <class T>
static Compute<T> chains(int64_t repeats) {
  using V = Vec<Compute<T>>;
  V chain[kChains];
  // From places that the compiler cannot know: it would compute the end of a chain from 1 itself.
  for (int i = 0; i < kChains; ++i)
    chain[i] = V::splat(1 + static_cast<Compute<T>>(repeats % (i + 2)) / 64);
  for (int64_t r = 0; r < repeats; ++r) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chain[i] = link<T>(chain[i]);
  }
  V total = V::zero();
  for (const V& x : chain) total = total + x;
  return total.sum();
}

Status roofline_fma(const RooflineFma& op, int threads) {
  const int64_t tasks = op.sink.size[0];
  with_type(op.sink.dtype, [&]<class T>(T) {
    parallel_for(tasks, threads, [&](int64_t task, int) {
      static_cast<T*>(op.sink.data)[task] = narrow<T>(chains<T>(op.repeats));
    });
    const int per_round = 2 * kUnit<T> * Vec<Compute<T>>::lanes * kChains;
    *op.flops = static_cast<double>(per_round) * static_cast<double>(op.repeats * tasks);
  });
  return Status::ok;
}

// Where the task-th of equal parts of n numbers begins; the last part takes what is left.
static int64_t begin_of(int64_t n, int64_t task, int64_t tasks) {
  return task == tasks ? n : n / tasks * task;
}

Status roofline_read(const RooflineRead& op, int threads) {
  const int64_t n = op.source.size[0], tasks = op.sink.size[0];
  const float* source = static_cast<const float*>(op.source.data);
  parallel_for(tasks, threads, [&](int64_t task, int) {
    const int64_t first = begin_of(n, task, tasks), length = begin_of(n, task + 1, tasks) - first;
    const float* x = source + first;
    constexpr int step = kStreams * VecF::lanes;
    VecF sum[kStreams] = {};
    for (int64_t r = 0; r < op.repeats; ++r) {
      int64_t i = 0;
      for (; i + step <= length; i += step) {
#pragma GCC unroll 8
        for (int j = 0; j < kStreams; ++j) sum[j] = sum[j] + load(x + i + j * VecF::lanes);
      }
      each_vector<float>(length - i,
                         [&](int64_t k, int m) { sum[0] = sum[0] + load_n(x + i + k, m); });
    }
    VecF total = VecF::zero();
    for (const VecF& s : sum) total = total + s;
    static_cast<float*>(op.sink.data)[task] = total.sum();
  });
  return Status::ok;
}

Status roofline_copy(const RooflineCopy& op, int threads) {
  const int64_t n = op.source.size[0];
  const float* source = static_cast<const float*>(op.source.data);
  float* target = static_cast<float*>(op.target.data);
  parallel_for(op.tasks, threads, [&](int64_t task, int) {
    const int64_t first = begin_of(n, task, op.tasks);
    const int64_t length = begin_of(n, task + 1, op.tasks) - first;
    for (int64_t r = 0; r < op.repeats; ++r)
      each_vector<float>(length, [&](int64_t i, int m) {
        store_n(target + first + i, load_n(source + first + i, m), m);
      });
  });
  return Status::ok;
}

PYKERN_END_ISA

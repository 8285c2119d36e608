// Threads that stay together through many short loops. A loop ends at a barrier that spins: two
// threads are through it in a fraction of a microsecond, where a parallel region takes several.
#pragma once
#include <omp.h>
#include <sched.h>

#include "core/tensor.h"
#include "cpu/isa.h"

PYKERN_BEGIN_ISA
namespace {

struct TeamState {
  alignas(64) int arrived = 0;
  alignas(64) int round = 0;
  alignas(64) int64_t next = 0;
};

static inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Team {
 public:
  Team(TeamState& state, int size, int thread) : state_(state), size_(size), thread_(thread) {}
  int size() const { return size_; }
  int thread() const { return thread_; }

  // body(i) for i in 0..n-1, each by the thread that comes first or, where there are no more than
  // threads, by thread i; returns when all are done. Every thread of the team makes the same calls
  // with the same n.
  template <class Body>
  void loop(int64_t n, const Body& body) {
    if (size_ == 1) {
      for (int64_t i = 0; i < n; ++i) body(i);
      return;
    }
    if (n <= size_) {  // one each: nothing to deal
      if (thread_ < n) body(thread_);
      wait();
      return;
    }
    for (int64_t i; (i = __atomic_fetch_add(&state_.next, 1, __ATOMIC_RELAXED)) < n;) body(i);
    wait();
  }

 private:
  static constexpr int kSpins = 4000;  // some 100 us; then others may need the processor

  void wait() {
    const int round = __atomic_load_n(&state_.round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&state_.arrived, 1, __ATOMIC_ACQ_REL) == size_) {
      state_.arrived = 0;
      state_.next = 0;
      __atomic_store_n(&state_.round, round + 1, __ATOMIC_RELEASE);
      return;
    }
    for (int spins = 0; __atomic_load_n(&state_.round, __ATOMIC_ACQUIRE) == round; ++spins)
      if (spins < kSpins)
        relax();
      else
        sched_yield();
  }

  TeamState& state_;
  int size_, thread_;
};

// body(team) on as many threads as there are, at most `threads`.
template <class Body>
static inline void with_team(int threads, const Body& body) {
  TeamState state;
  if (threads <= 1) {
    body(Team(state, 1, 0));
    return;
  }
#pragma omp parallel num_threads(threads)
  body(Team(state, omp_get_num_threads(), omp_get_thread_num()));
}

}  // namespace
PYKERN_END_ISA

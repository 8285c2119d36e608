// parallel_for(n, threads, body): body(i, thread) for i in 0..n-1. Iterations are independent and
// each writes its own outputs, so the result does not depend on which thread runs which.
#pragma once
#include <omp.h>

#include "core/tensor.h"
#include "cpu/isa.h"

PYKERN_BEGIN_ISA

// thread counts from 0 to threads - 1 and picks scratch memory.
template <class Body>
static inline void parallel_for(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, 0);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i) body(i, omp_get_thread_num());
}

// The same, with body(i, next): a thread is told which iteration it runs next (n: none), so that it
// can fetch what that one reads.
template <class Body>
static inline void parallel_with_next(int64_t n, int threads, const Body& body) {
  if (threads <= 1 || n <= 1) {
    for (int64_t i = 0; i < n; ++i) body(i, i + 1);
    return;
  }
  int64_t taken = 0;
  const auto take = [&] { return __atomic_fetch_add(&taken, 1, __ATOMIC_RELAXED); };
#pragma omp parallel num_threads(threads)
  for (int64_t i = take(); i < n;) {
    const int64_t next = take();
    body(i, next < n ? next : n);
    i = next;
  }
}

// body(first, last, thread) over chunks of grain rows, the last one shorter.
template <class Body>
static inline void parallel_rows(int64_t n, int64_t grain, int threads, const Body& body) {
  parallel_for((n + grain - 1) / grain, threads, [&](int64_t chunk, int thread) {
    const int64_t first = chunk * grain;
    body(first, first + grain < n ? first + grain : n, thread);
  });
}

PYKERN_END_ISA

// Picks one Table per process, on first use, and calls its kernels.
#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/error.h"
#include "isa_list.h"  // generated from PYKERN_ISAS
#include "runtime/cpu_table.h"
#include "runtime/runtime.h"

namespace pykern {

namespace cpu {
#define PYKERN_ISA_TABLE(isa) \
  namespace isa {             \
  extern const Table kernels; \
  }
PYKERN_ISA_LIST(PYKERN_ISA_TABLE)
#undef PYKERN_ISA_TABLE

static bool runs_here(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "v4_bf16") == 0)
    return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(isa, "v4") == 0) return __builtin_cpu_supports("x86-64-v4");
  if (std::strcmp(isa, "v3") == 0) return __builtin_cpu_supports("x86-64-v3");
#endif
  return std::strcmp(isa, "base") == 0;
}

static const Table* const kTables[] = {// best first
#define PYKERN_ISA_ENTRY(isa) &isa::kernels,
                                       PYKERN_ISA_LIST(PYKERN_ISA_ENTRY)
#undef PYKERN_ISA_ENTRY
};

static const Table& choose() {
  const char* forced = std::getenv("PYKERN_ISA");
  if (forced && !*forced) forced = nullptr;
  std::ostringstream known;
  for (const Table* table : kTables) {
    const bool here = runs_here(table->isa);
    if (forced ? std::strcmp(forced, table->isa) == 0 : here) {
      PYKERN_CHECK(runtime, here, "PYKERN_ISA=", forced, " does not run on this processor");
      return *table;
    }
    known << (known.tellp() > 0 ? ", " : "") << table->isa;
  }
  PYKERN_CHECK(runtime, forced, "none of the ISAs that pykern was built for, ", known.str(),
               ", runs on this processor");
  fail(Kind::runtime, "PYKERN_ISA=", forced, " is not one of ", known.str());
}

static const Table& table() {
  static const Table& best = choose();
  return best;
}

#define PYKERN_CALL(kernel, Op)                                                       \
  void kernel(const Op& op) {                                                         \
    if (table().kernel(op, runtime::threads()) != Status::ok) throw std::bad_alloc(); \
  }
PYKERN_OPS(PYKERN_CALL)
#undef PYKERN_CALL

}  // namespace cpu

namespace runtime {

const char* isa() { return cpu::table().isa; }
int panel_width() { return cpu::table().panel_width; }
bool pairs_bf16() { return cpu::table().pairs_bf16; }

std::vector<std::pair<std::string, bool>> isas() {
  std::vector<std::pair<std::string, bool>> list;
  for (const cpu::Table* table : cpu::kTables)
    list.emplace_back(table->isa, cpu::runs_here(table->isa));
  return list;
}

// The OpenMP team of the parent does not survive fork(): waiting for it would hang the child.
static std::atomic<bool> forked{false};
static std::atomic<int> requested_threads{0};
[[maybe_unused]] static const int watch_fork =
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

int threads() {
  if (forked.load(std::memory_order_relaxed)) return 1;
  const int requested = requested_threads.load(std::memory_order_relaxed);
  return requested > 0 ? requested : omp_get_max_threads();
}

void set_threads(int count) {
  PYKERN_CHECK(value, count >= 0 && count <= 1024, "set_num_threads: n is ", count,
               ", expected 1..1024, or 0 to follow OpenMP");
  requested_threads.store(count, std::memory_order_relaxed);
}

}  // namespace runtime
}  // namespace pykern

#include "emulator.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <sstream>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#error "the fibers of the CUDA emulation are written for x86-64"
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the registers that a callee must keep, and goes on where `to` was saved.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

namespace emulation {

Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr size_t kMostShared = 227 << 10;  // of a block, on sm_90
constexpr unsigned kMostThreads = 1024;

struct Copy {
  void* to;
  const void* from;
  int bytes, valid;
};

// A group of threads that waits for its last member.
struct Meeting {
  unsigned arrived = 0;
  uint64_t round = 0;
  Where where;
};

struct Warp {
  Meeting meeting;
  unsigned live = 0;
  Deposit deposits[2][kWarp];
};

struct Fiber {
  char* stack = nullptr;
  void* sp = nullptr;
  unsigned number = 0;
  bool done = false;
  Meeting* waits_for = nullptr;
  uint64_t round = 0;
  uint64_t exchanges = 0;
  Dim3 index;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> groups;
};

// A readable and writable region whose end borders on a page that must not be touched.
char* guarded(size_t bytes) {
  const size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(static_cast<char*>(memory) + page, size, PROT_READ | PROT_WRITE))
    throw std::bad_alloc();
  return static_cast<char*>(memory) + page;
}

struct Machine {
  std::mutex one_at_a_time;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting block;
  unsigned live = 0;
  Fiber* current = nullptr;
  void* scheduler_sp = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr failure;
  char* shared_end = guarded(kMostShared) + (kMostShared + 4095) / 4096 * 4096;
  size_t shared_bytes = 0;
  uint64_t seed = std::getenv("PYKERN_EMULATION_SEED")
                      ? std::strtoull(std::getenv("PYKERN_EMULATION_SEED"), nullptr, 10)
                      : 1;
  Counts counts{};
  bool watching = false;
  std::set<std::string> sites;
  std::string left_out;
  unsigned left_out_line = 0;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

Machine& machine() {
  static Machine* const one = new Machine;  // its fibers may outlive static destructors
  return *one;
}

void to_scheduler(bool forever) {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, m.scheduler_stack,
                                 m.scheduler_stack_size);
#else
  (void)forever;
#endif
  emulation_switch(&m.current->sp, m.scheduler_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
}

void to_fiber(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
  threadIdx = fiber.index;
  ++m.counts.switches;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStack);
#endif
  emulation_switch(&m.scheduler_sp, fiber.sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

std::string place(Where where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  std::ostringstream text;
  text << (slash ? slash + 1 : where.file_name()) << ":" << where.line();
  return text.str();
}

// Notes a barrier or wait; whether it is left out.
bool left_out(const char* kind, Where where) {
  Machine& m = machine();
  if (!m.watching && m.left_out.empty()) return false;
  if (m.watching) m.sites.insert(place(where) + " " + kind);
  return where.line() == m.left_out_line && place(where) + " " + kind == m.left_out;
}

bool same(Where a, Where b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Arrives and, unless the group is complete, waits until it is.
void meet(Meeting& meeting, unsigned members, Where where) {
  Machine& m = machine();
  Fiber& fiber = *m.current;
  if (meeting.arrived == 0)
    meeting.where = where;
  else if (!same(meeting.where, where))
    throw Fault("divergent: thread " + std::to_string(fiber.number) + " is at " + place(where) +
                " while others of its group wait at " + place(meeting.where));
  if (++meeting.arrived == members) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  fiber.waits_for = &meeting;
  fiber.round = meeting.round;
  to_scheduler(false);
}

void leave(Meeting& meeting, unsigned members) {  // a thread that has ended waits no more
  if (members == 0 || meeting.arrived != members) return;
  meeting.arrived = 0;
  ++meeting.round;
}

void fiber_main() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack, &m.scheduler_stack_size);
#endif
  try {
    (*m.kernel)();
  } catch (...) {
    m.failure = std::current_exception();
  }
  Fiber& fiber = *m.current;
  fiber.done = true;
  leave(m.block, --m.live);
  --m.warps[fiber.number / kWarp].live;  // whoever still exchanges in this warp waits for ever
  to_scheduler(true);
  __builtin_unreachable();
}

void prepare(Fiber& fiber, unsigned number, const Launch& launch) {
  fiber.number = number;
  fiber.done = false;
  fiber.waits_for = nullptr;
  fiber.exchanges = 0;
  fiber.open.clear();
  fiber.groups.clear();
  const unsigned x = launch.block.x, y = launch.block.y;
  fiber.index = Dim3(number % x, number / x % y, number / (x * y));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack,
                                kStack);  // of frames that the last thread here never left
#endif
  void** top = reinterpret_cast<void**>(fiber.stack + kStack);
  *--top = nullptr;  // alignment: as if fiber_main had been called
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.sp = top;
}

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

void shuffle(std::vector<unsigned>& order, uint64_t& state) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(state) % i]);
}

[[noreturn]] void report_deadlock(const Launch& launch, Dim3 block) {
  Machine& m = machine();
  std::ostringstream text;
  text << "deadlock in block (" << block.x << ", " << block.y << ", " << block.z << "):";
  unsigned done = 0, listed = 0;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  for (unsigned i = 0; i < threads; ++i) {
    const Fiber& fiber = m.fibers[i];
    if (fiber.done) ++done;
    if (fiber.done || ++listed > 4) continue;
    text << " thread " << i << " waits at " << place(fiber.waits_for->where)
         << (fiber.waits_for == &m.block ? " for its block," : " for its warp,");
  }
  text << " " << done << " of " << threads << " threads have ended";
  throw Fault(text.str());
}

void run_block(const Launch& launch, Dim3 block, uint64_t& state) {
  Machine& m = machine();
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  m.live = threads;
  m.block = {};
  blockIdx = block, blockDim = launch.block, gridDim = launch.grid;
  for (Warp& warp : m.warps) warp.meeting = {}, warp.live = 0;
  std::memset(m.shared_end - m.shared_bytes, 0xff, m.shared_bytes);
  const unsigned warps = threads / kWarp;
  std::vector<unsigned> order(warps), lanes(kWarp);
  for (unsigned w = 0; w < warps; ++w) order[w] = w;
  for (unsigned l = 0; l < kWarp; ++l) lanes[l] = l;
  for (unsigned i = 0; i < threads; ++i) {
    prepare(m.fibers[i], i, launch);
    ++m.warps[i / kWarp].live;
  }
  // Warps go on in step, or each as far as it can before the next one: by the parity of a random
  // number, so that a warp may be far behind another that has passed no barrier since.
  const bool in_step = m.seed == 0 || next_random(state) % 2;
  for (unsigned left = threads; left > 0;) {
    if (m.seed) shuffle(order, state);
    bool any = false;
    for (unsigned w : order)
      for (bool moved = true; moved;) {
        if (m.seed) shuffle(lanes, state);
        moved = false;
        for (unsigned l : lanes) {
          Fiber& fiber = m.fibers[w * kWarp + l];
          if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) continue;
          fiber.waits_for = nullptr;
          any = moved = true;
          to_fiber(fiber);
          if (m.failure) std::rethrow_exception(std::exchange(m.failure, nullptr));
          left -= fiber.done;
        }
        moved = moved && !in_step;
      }
    if (!any) report_deadlock(launch, block);
  }
}

}  // namespace

unsigned lane() { return machine().current->number % kWarp; }

void* shared_memory(size_t bytes, size_t alignment) {
  Machine& m = machine();
  if (bytes > m.shared_bytes)
    throw Fault("the kernel uses " + std::to_string(bytes) +
                " bytes of shared memory, the launch asked for " + std::to_string(m.shared_bytes));
  char* start = m.shared_end - m.shared_bytes;
  if (reinterpret_cast<uintptr_t>(start) % alignment)
    throw Fault("shared memory of " + std::to_string(m.shared_bytes) +
                " bytes, not a multiple of the layout's alignment");
  return start;
}

bool is_shared(const void* p) {
  const Machine& m = machine();
  return p >= m.shared_end - m.shared_bytes && p < m.shared_end;
}

void block_barrier(Where where) {
  if (!left_out("barrier", where)) meet(machine().block, machine().live, where);
}

void warp_barrier(Where where) {
  if (!left_out("warp barrier", where)) exchange({}, where);
}

const Deposit* exchange(const Deposit& own, Where where) {
  Machine& m = machine();
  Fiber& fiber = *m.current;
  Warp& warp = m.warps[fiber.number / kWarp];
  Deposit* deposits = warp.deposits[fiber.exchanges++ % 2];
  deposits[fiber.number % kWarp] = own;
  meet(warp.meeting, kWarp, where);
  return deposits;
}

void copy_later(void* to, const void* from, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(to) % bytes ||
      (valid > 0 && reinterpret_cast<uintptr_t>(from) % bytes))
    throw Fault("an asynchronous copy of " + std::to_string(bytes) + " bytes is not aligned");
  if (valid < 0 || valid > bytes)
    throw Fault("an asynchronous copy of a negative or too large size");
  machine().current->open.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Fiber& fiber = *machine().current;
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void await_copies(int pending, Where where) {
  if (left_out("wait", where)) return;
  auto& groups = machine().current->groups;
  for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.from, copy.valid);
      std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
    }
}

void run(const Launch& launch, const std::function<void()>& kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.one_at_a_time);
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  const uint64_t blocks = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  if (threads == 0 || threads > kMostThreads || launch.block.z > 64)
    throw Fault("a block of " + std::to_string(threads) + " threads");
  if (threads % kWarp)
    throw Fault("a block of " + std::to_string(threads) + " threads: no whole warps");
  if (blocks == 0 || launch.grid.x > 0x7fffffff || launch.grid.y > 65535 || launch.grid.z > 65535)
    throw Fault("a grid of (" + std::to_string(launch.grid.x) + ", " +
                std::to_string(launch.grid.y) + ", " + std::to_string(launch.grid.z) + ") blocks");
  if (launch.shared > kMostShared)
    throw Fault(std::to_string(launch.shared) + " bytes of shared memory");
  while (m.fibers.size() < threads) {
    m.fibers.emplace_back();
    m.fibers.back().stack = guarded(kStack);
  }
  m.warps.resize(threads / kWarp);
  m.kernel = &kernel;
  m.shared_bytes = launch.shared;
  m.failure = nullptr;
  ++m.counts.launches;
  uint64_t state = m.seed * 0x2545f4914f6cdd1d + m.counts.launches;
  for (uint64_t b = 0; b < blocks; ++b) {
    const uint64_t i = m.seed ? blocks - 1 - b : b;
    const unsigned x = i % launch.grid.x, y = i / launch.grid.x % launch.grid.y;
    run_block(launch, Dim3(x, y, i / (uint64_t(launch.grid.x) * launch.grid.y)), state);
    ++m.counts.blocks;
  }
}

void set_seed(uint64_t seed) { machine().seed = seed; }

void watch(bool on) {
  machine().watching = on;
  if (on) machine().sites.clear();
}
std::string seen() {
  std::string text;
  for (const std::string& site : machine().sites) text += site + "\n";
  return text;
}
void leave_out(const std::string& site) {
  machine().left_out = site;
  machine().left_out_line = site.empty() ? 0 : std::stoul(site.substr(site.find(':') + 1));
}

Counts counts() { return machine().counts; }

}  // namespace emulation

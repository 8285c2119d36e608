#include "core/memory.h"

#include <atomic>
#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace pykern {

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kHugePage = 2 << 20;
constexpr int kSlots = 8;
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // a block that is larger than asked for would hide an overflow
#else
constexpr bool kKeeps = true;
#endif

struct Header {  // the line in front of a block
  void* start;
  int64_t bytes;
};

Header* header(void* block) { return reinterpret_cast<Header*>(static_cast<char*>(block) - kLine); }

struct Kept {
  void* block[kSlots] = {};
  int64_t bytes = 0;

  void drop(int i) {
    bytes -= header(block[i])->bytes;
    std::free(header(block[i])->start);
    block[i] = nullptr;
  }
  ~Kept() {
    for (int i = 0; i < kSlots; ++i)
      if (block[i]) drop(i);
  }
};

thread_local Kept kept;

void* allocate(int64_t bytes) {
  const int64_t align = bytes >= kHugePage ? kHugePage : kLine;
  const int64_t total = (bytes + kLine + align - 1) / align * align;
  void* start = std::aligned_alloc(static_cast<size_t>(align), static_cast<size_t>(total));
  if (!start) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (align == kHugePage) madvise(start, static_cast<size_t>(total), MADV_HUGEPAGE);
#endif
  void* block = static_cast<char*>(start) + kLine;
  *header(block) = {start, total - kLine};
  return block;
}

// The blocks of large results that nobody has, oldest first.
struct Results {
  static constexpr int kBlocks = 256;
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  void* block[kBlocks];
  int count = 0;
  std::atomic<int64_t> bytes = 0;
  int64_t limit = limit_of_machine();

  static int64_t limit_of_machine() {
#if defined(__linux__)
    const int64_t memory = sysconf(_SC_PHYS_PAGES) * int64_t{sysconf(_SC_PAGESIZE)};
    return memory / 8 < kKeptResults ? memory / 8 : kKeptResults;
#else
    return kKeptResults;
#endif
  }
  // Nobody waits for it: a child of fork() may have got it locked for good.
  bool lock() {
    for (int tries = 0; tries < 1000; ++tries)
      if (!busy.test_and_set(std::memory_order_acquire)) return true;
    return false;
  }
  void unlock() { busy.clear(std::memory_order_release); }
  void* remove(int i) {
    void* const removed = block[i];
    bytes -= header(removed)->bytes;
    for (--count; i < count; ++i) block[i] = block[i + 1];
    return removed;
  }
};

Results results;

}  // namespace

void* borrow_memory(int64_t bytes) {
  if (bytes < 0 || bytes > INT64_MAX / 2) return nullptr;  // a size that overflowed on its way here
  int best = -1;
  for (int i = 0; i < kSlots; ++i) {
    if (!kept.block[i]) continue;
    const int64_t size = header(kept.block[i])->bytes;
    if (size < bytes || size / 4 > bytes + kHugePage) continue;
    if (best < 0 || size < header(kept.block[best])->bytes) best = i;
  }
  if (best >= 0) {
    void* block = kept.block[best];
    kept.bytes -= header(block)->bytes;
    kept.block[best] = nullptr;
    return block;
  }
  return allocate(bytes);
}

void return_memory(void* block) {
  if (!block) return;
  const int64_t bytes = header(block)->bytes;
  if (!kKeeps || bytes > kKeptBytes) {
    std::free(header(block)->start);
    return;
  }
  // Room: whatever does not fit beside the new block goes, the first slots first.
  for (int i = 0; i < kSlots; ++i)
    if (kept.block[i] && kept.bytes + bytes > kKeptBytes) kept.drop(i);
  int slot = 0;
  while (slot < kSlots && kept.block[slot]) ++slot;
  if (slot == kSlots) kept.drop(slot = 0);
  kept.block[slot] = block;
  kept.bytes += bytes;
}

void* take_result(int64_t bytes) {
  if (bytes < 0 || bytes > INT64_MAX / 2) return nullptr;
  void* found = nullptr;
  if (results.lock()) {
    int best = -1;
    int64_t least = 0;
    for (int i = 0; i < results.count; ++i) {
      const int64_t size = header(results.block[i])->bytes;
      if (size < bytes || size - bytes > bytes / 4 + kHugePage || (best >= 0 && size >= least))
        continue;
      best = i, least = size;
    }
    if (best >= 0) found = results.remove(best);
    results.unlock();
  }
  return found ? found : allocate(bytes);
}

void give_result(void* block) {
  if (!block) return;
  const int64_t bytes = header(block)->bytes;
  if (!kKeeps || bytes > results.limit || bytes < kHugePage || !results.lock()) {
    std::free(header(block)->start);
    return;
  }
  void* dropped[Results::kBlocks];  // freed when others need not wait for it
  int count = 0;
  while (results.count == Results::kBlocks || results.bytes + bytes > results.limit)
    dropped[count++] = results.remove(0);
#if defined(__linux__) && defined(MADV_FREE)
  char* const second_page = static_cast<char*>(header(block)->start) + kHugePage;
  if (bytes > kHugePage)  // the first one holds the header
    madvise(second_page, static_cast<size_t>(bytes + kLine - kHugePage), MADV_FREE);
#endif
  results.block[results.count++] = block;
  results.bytes += bytes;
  results.unlock();
  while (count > 0) std::free(header(dropped[--count])->start);
}

int64_t kept_results() { return results.bytes; }

}  // namespace pykern

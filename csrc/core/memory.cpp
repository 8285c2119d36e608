#include "core/memory.h"

#include <cstdlib>
#if defined(__linux__)
#include <sys/mman.h>
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

}  // namespace pykern

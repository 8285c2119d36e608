// Working memory of a kernel call. A thread keeps the blocks it returns, up to kKeptBytes, and gets
// them again in its next call: fresh memory costs a page fault every 4 KiB, more than many kernels.
#pragma once
#include <cstdint>

namespace pykern {

constexpr int64_t kKeptBytes = 128 << 20;  // per thread

// A block of at least this many bytes, aligned to a cache line; null when there is no memory.
void* borrow_memory(int64_t bytes);
// Gives back what borrow_memory returned, on the same thread; null is allowed.
void return_memory(void* block);

}  // namespace pykern

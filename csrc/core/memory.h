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

// Memory of a large result, from any thread to any thread; null when there is none. What is given
// back is kept for the next results of about that size, up to an eighth of the machine's memory and
// kKeptResults, and meanwhile offered to the kernel: its pages need no clearing again.
constexpr int64_t kKeptResults = int64_t{1} << 30;
void* take_result(int64_t bytes);
void give_result(void* block);
// Bytes that are kept now.
int64_t kept_results();

}  // namespace pykern

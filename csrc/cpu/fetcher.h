// Fetching memory ahead of the loops that read it.
#pragma once
#include "core/tensor.h"
#include "cpu/isa.h"

PYKERN_BEGIN_ISA
namespace {

// Fetches rows that are read later, a line of the cache at a time, into the second-level cache: the
// tile at hand fills the first. So the loops over a tile keep memory busy while they compute.
class Fetcher {
 public:
  Fetcher(const void* rows, int64_t row_bytes, int64_t bytes)
      : row_(static_cast<const char*>(rows)), row_bytes_(row_bytes), bytes_(bytes) {}
  [[gnu::always_inline]] void fetch(int lines) {
    for (int i = 0; i < lines; ++i) {
      __builtin_prefetch(row_ + at_, 0, 2);
      at_ += 64;
      if (at_ >= bytes_) at_ = 0, row_ += row_bytes_;
    }
  }

 private:
  const char* row_;
  int64_t row_bytes_, bytes_, at_ = 0;
};

}  // namespace
PYKERN_END_ISA

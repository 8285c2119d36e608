// Scratch memory of one kernel call, aligned to a cache line. ok() is false when there was none:
// the kernel then returns Status::out_of_memory before it writes anything.
#pragma once
#include "core/memory.h"
#include "core/tensor.h"
#include "cpu/isa.h"

PYKERN_BEGIN_ISA
namespace {

class Scratch {
 public:
  // threads blocks of bytes each; a thread's block is at(thread_index())
  explicit Scratch(int64_t bytes, int threads = 1)
      : block_((bytes + kSlack + 63) / 64 * 64), memory_(borrow_memory(block_ * threads)) {}
  ~Scratch() { return_memory(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  bool ok() const { return memory_ != nullptr; }
  template <class T>
  T* at(int thread = 0) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_) + thread * block_);
  }

 private:
  static constexpr int64_t kSlack = 128;  // a full vector may be stored at the last element
  int64_t block_;
  void* memory_;
};

}  // namespace
PYKERN_END_ISA

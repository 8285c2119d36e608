// Many tensors in one launch: their addresses and sizes are in the kernel's parameters, a block
// takes a chunk of one of them.
#pragma once
#include <limits.h>

#include "cuda/launch.h"

namespace pykern::cuda {

constexpr int kParameterBytes = 4096;  // that every GPU and driver takes

// How many descriptions of a tensor fit beside Others, each with a count of chunks; one less, for
// the padding.
template <class Tensor, class Others>
constexpr int most_in_parameters() {
  return (kParameterBytes - sizeof(Others)) / (sizeof(Tensor) + sizeof(int)) - 1;
}

struct Chunk {
  int tensor;
  int64_t number;  // in its tensor, from 0
};

template <class Tensor, int most>
struct Many {
  Tensor of[most];
  int begin[most];  // chunks of all tensors before; INT_MAX where there is no tensor

  __device__ __forceinline__ Chunk chunk(int block) const {
    int tensor = 0;
#pragma unroll
    for (int step = 128; step > 0; step /= 2)  // no tensor of the launch is without a chunk
      if (step < most && tensor + step < most && block >= begin[tensor + step]) tensor += step;
    return {tensor, block - begin[tensor]};
  }
};

// Whether all addresses can be read 16 bytes at a time; null can.
template <class... P>
__device__ __forceinline__ bool aligned(const P*... p) {
  return ((reinterpret_cast<uintptr_t>(p) | ...) % 16) == 0;
}

// Collects tensors until a launch is full: launch(many, blocks).
template <class Tensor, int most>
class Batch {
 public:
  static_assert(most < 256 && sizeof(Many<Tensor, most>) <= kParameterBytes);

  template <class Launch>
  void add(const Tensor& tensor, int64_t chunks, const Launch& launch) {
    if (chunks == 0) return;
    if (tensors_ == most || chunks_ + chunks > kMaxBlocks) finish(launch);
    many_.of[tensors_] = tensor;
    many_.begin[tensors_++] = static_cast<int>(chunks_);
    chunks_ += chunks;
  }

  template <class Launch>
  void finish(const Launch& launch) {
    if (tensors_ == 0) return;
    for (int i = tensors_; i < most; ++i) many_.begin[i] = INT_MAX;
    launch(many_, static_cast<int>(chunks_));
    tensors_ = 0;
    chunks_ = 0;
  }

 private:
  Many<Tensor, most> many_{};
  int tensors_ = 0;
  int64_t chunks_ = 0;
};

}  // namespace pykern::cuda

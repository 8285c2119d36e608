// A borrowed, strided view of memory owned by Python. Data only: an inline member compiled with
// AVX-512 could be the copy the linker keeps, and nvcc would refuse to call it.
#pragma once
#include <cstdint>

namespace pykern {

enum class DType : uint8_t { f32, f64, bf16, f16, i32, i64, b8, u8 };
enum class Device : uint8_t { cpu, cuda };

constexpr int kMaxRank = 8;

using Stream = void*;  // cudaStream_t on CUDA, unused on CPU

struct Tensor {
  void* data = nullptr;
  int64_t size[kMaxRank] = {};
  int64_t stride[kMaxRank] = {};  // in elements
  int rank = 0;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int device_index = 0;
  bool readonly = false;
  bool given = false;       // false: the optional argument was None
  Stream stream = nullptr;  // on CUDA: the one in which its framework works at the moment
};

// What a CPU kernel reports: kernels do not throw.
enum class Status : uint8_t { ok, out_of_memory };

}  // namespace pykern

// What the kernels use of CUDA's language and runtime, on the emulator. Stands before the include
// path, so that csrc/cuda is compiled as it is.
#pragma once
#include <math.h>
#include <string.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulator.h"

// ---- the language

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using dim3 = emulation::Dim3;
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using emulation::blockDim;
using emulation::blockIdx;
using emulation::gridDim;
using emulation::threadIdx;

inline void __syncthreads(emulation::Where where = emulation::Where::current()) {
  emulation::block_barrier(where);
}
inline void __syncwarp(unsigned mask = ~0u, emulation::Where where = emulation::Where::current()) {
  if (mask != ~0u) throw emulation::Fault("__syncwarp of a part of a warp");
  emulation::warp_barrier(where);
}

namespace emulation {
template <class T>
Deposit deposit_of(T x) {
  static_assert(sizeof(T) <= 8);
  Deposit deposit{};
  memcpy(deposit.word, &x, sizeof(T));
  return deposit;
}
template <class T>
T shuffled(unsigned mask, T x, unsigned source, Where where) {
  if (mask != ~0u) throw Fault("a shuffle among a part of a warp");
  const Deposit* all = exchange(deposit_of(x), where);
  T result;
  memcpy(&result, all[source % 32].word, sizeof(T));
  return result;
}
}  // namespace emulation

inline float rsqrtf(float x) { return 1 / sqrtf(x); }

template <class T>
T __shfl_xor_sync(unsigned mask, T x, int lanes,
                  emulation::Where where = emulation::Where::current()) {
  return emulation::shuffled(mask, x, emulation::lane() ^ lanes, where);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int source,
              emulation::Where where = emulation::Where::current()) {
  return emulation::shuffled(mask, x, source, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned lanes,
                   emulation::Where where = emulation::Where::current()) {
  const unsigned source = emulation::lane() + lanes;
  return emulation::shuffled(mask, x, source < 32 ? source : emulation::lane(), where);
}
inline unsigned __ballot_sync(unsigned mask, int vote,
                              emulation::Where where = emulation::Where::current()) {
  if (mask != ~0u) throw emulation::Fault("a vote among a part of a warp");
  const emulation::Deposit* all = emulation::exchange(emulation::deposit_of(vote != 0), where);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i].word[0] & 1) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int vote,
                      emulation::Where where = emulation::Where::current()) {
  return __ballot_sync(mask, vote, where) != 0;
}
inline int __all_sync(unsigned mask, int vote,
                      emulation::Where where = emulation::Where::current()) {
  return __ballot_sync(mask, vote, where) == ~0u;
}

template <class T>
unsigned __match_any_sync(unsigned mask, T x,
                          emulation::Where where = emulation::Where::current()) {
  if (mask != ~0u) throw emulation::Fault("a match among a part of a warp");
  const emulation::Deposit own = emulation::deposit_of(x);
  const emulation::Deposit* all = emulation::exchange(own, where);
  unsigned equal = 0;
  for (int i = 0; i < 32; ++i) equal |= static_cast<unsigned>(all[i].word[0] == own.word[0]) << i;
  return equal;
}

// Fibers do not interrupt each other.
template <class T>
T atomicAdd(T* p, T x) {
  const T before = *p;
  *p = before + x;
  return before;
}
template <class T>
T atomicMax(T* p, T x) {
  const T before = *p;
  if (x > before) *p = x;
  return before;
}
template <class T>
T atomicOr(T* p, T x) {
  const T before = *p;
  *p = before | x;
  return before;
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  const T before = *p;
  if (before == expected) *p = x;
  return before;
}
inline void __threadfence() {}

inline int __ffs(int bits) { return std::countr_zero(static_cast<uint32_t>(bits)) + 1; }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }

// ---- the runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorMemoryAllocation };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t) { return "an error of the emulated runtime"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const char* shared = getenv("PYKERN_EMULATED_SHARED");    // bytes
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2  // so that blocks that walk do walk
           : shared                                    ? atoi(shared)
                                                       : 227 << 10;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int bytes) {
  return bytes <= 227 << 10 ? cudaSuccess : cudaErrorInvalidValue;
}
using cudaMemPool_t = void*;
enum cudaMemAllocationType { cudaMemAllocationTypePinned = 1 };
enum cudaMemLocationType { cudaMemLocationTypeDevice = 1 };
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold };
struct cudaMemPoolProps {
  cudaMemAllocationType allocType;
  struct {
    cudaMemLocationType type;
    int id;
  } location;
};
inline cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps* properties) {
  static int some;
  *pool = properties->location.id == 0 ? &some : nullptr;
  return *pool ? cudaSuccess : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
// What is launched while a stream is captured is kept, and done again by each launch of the graph.
// Memory of a captured call lives as long as the graph; it is poisoned whenever it is handed out.
struct EmulatedGraph {
  std::vector<std::function<void()>> nodes;
  std::vector<void*> memory;
  ~EmulatedGraph() {
    for (void* data : memory) free(data);
  }
};
using cudaGraph_t = std::shared_ptr<EmulatedGraph>*;
using cudaGraphExec_t = std::shared_ptr<EmulatedGraph>*;
namespace emulation {
inline std::shared_ptr<EmulatedGraph> captured;  // null: nothing is captured
inline void enqueue(std::function<void()> node) {
  if (captured)
    captured->nodes.push_back(std::move(node));
  else
    node();
}
}  // namespace emulation

inline cudaError_t cudaMallocFromPoolAsync(void** data, size_t bytes, cudaMemPool_t, cudaStream_t) {
  void* const memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
  if (!memory) return cudaErrorMemoryAllocation;
  if (emulation::captured) emulation::captured->memory.push_back(memory);
  emulation::enqueue([=] { memset(memory, 0xff, bytes); });
  *data = memory;
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* data, cudaStream_t) {
  if (!emulation::captured) free(data);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t) {
  emulation::enqueue([=] { memset(data, value, bytes); });
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  if (emulation::captured) return cudaErrorInvalidValue;  // its host memory might be gone
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulation::captured ? cudaErrorInvalidValue : cudaSuccess;
}
using cudaEvent_t = void*;
enum { cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2 };
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new char;
  return cudaSuccess;
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete static_cast<char*>(stream);
  return cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new char;
  return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete static_cast<char*>(event);
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (!stream || emulation::captured) return cudaErrorInvalidValue;
  emulation::captured = std::make_shared<EmulatedGraph>();
  return cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = new std::shared_ptr<EmulatedGraph>(std::move(emulation::captured));
  emulation::captured = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* ready, cudaGraph_t graph, uint64_t) {
  *ready = new std::shared_ptr<EmulatedGraph>(*graph);
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t ready) {
  delete ready;
  return cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t ready, cudaStream_t) {
  for (const auto& node : (*ready)->nodes) node();
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<Parameters...> copied(std::forward<Arguments>(arguments)...);
  const emulation::Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  emulation::enqueue([=] { emulation::run(launch, [&] { std::apply(kernel, copied); }); });
  return cudaSuccess;
}

// Small kernels, each right and with one fault: what does the emulator say about it?
//   faults NAME right|wrong    prints "right", "wrong", or the text of the Fault
#include <cstdio>
#include <vector>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"

namespace pykern::cuda {
namespace {

constexpr int kThreads = 128;

struct Scene {
  bool faulty;
  std::vector<float> in = std::vector<float>(1024), out = std::vector<float>(1024, -1.0f);
};

void start(void (*kernel)(const float*, float*), Scene& s, size_t shared, int threads = kThreads) {
  launch("scene", kernel, {.blocks = dim3(1), .threads = dim3(threads), .shared = shared}, nullptr,
         s.in.data(), s.out.data());
}

struct Numbers {
  alignas(16) float of[kThreads];
};

// out[i] = in[n - 1 - i], through shared memory
template <bool barrier>
__global__ void reverse(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  const int i = threadIdx.x;
  shared.of[i] = in[i];
  if (barrier) __syncthreads();
  out[i] = shared.of[kThreads - 1 - i];
}

// the same in place: written again before all have read
template <bool barrier>
__global__ void reverse_twice(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  const int i = threadIdx.x;
  shared.of[i] = in[i];
  __syncthreads();
  const float other = shared.of[kThreads - 1 - i];
  if (barrier) __syncthreads();
  shared.of[i] = other;
  __syncthreads();
  out[i] = shared.of[kThreads - 1 - i];  // in[i]
}

// each thread copies 16 bytes and hands them to its neighbour
template <bool wait, bool barrier>
__global__ void copy_async(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  const int i = threadIdx.x;
  if (i < kThreads / 4) cp_async16(shared.of + 4 * i, in + 4 * i);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  if (barrier) __syncthreads();
  out[i] = shared.of[(i + 4) % kThreads];
}

// two stages in flight; the first is read while the second may still be under way
template <int pending>
__global__ void copy_stages(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  const int i = threadIdx.x;
  for (int stage = 0; stage < 2; ++stage) {
    if (i < kThreads / 8) cp_async16(shared.of + 64 * stage + 4 * i, in + 64 * stage + 4 * i);
    cp_async_commit();
  }
  cp_async_wait<pending>();
  __syncthreads();
  if (i < 64) out[i] = shared.of[64 - 1 - i];
}

template <bool same_for_all>
__global__ void divergent_barrier(const float* in, float* out) {
  const int i = threadIdx.x;
  if (same_for_all || i % 2 == 0)
    __syncthreads();
  else
    __syncthreads();  // another place
  out[i] = in[i];
}

template <bool all>
__global__ void missing_lane(const float* in, float* out) {
  float x = in[threadIdx.x];
  if (all || threadIdx.x % 32 != 7) x = across_lanes<kWarp>(x, Add());
  out[threadIdx.x] = x;
}

template <bool all>
__global__ void missing_thread(const float* in, float* out) {
  if (!all && threadIdx.x < 32) return;
  if (threadIdx.x >= 32 || all) {
    float x[1] = {in[threadIdx.x]};
    AcrossRow across_row(shared_memory<RowScratch<float, 1>>());
    across_row(x, Add());  // warp 0 leaves its partial sum unwritten
    out[threadIdx.x] = x[0];
  }
}

template <int bytes>
__global__ void beyond_shared(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  reinterpret_cast<char*>(&shared)[sizeof(Numbers) - 1 + bytes] = 1;
  out[threadIdx.x] = in[threadIdx.x];
}

// seen by the address sanitizer only
template <int places>
__global__ void beyond_global(const float* in, float* out) {
  out[threadIdx.x] = in[threadIdx.x];
  if (threadIdx.x == 0) out[1023 + places] = 0;
}

template <int offset>
__global__ void unaligned_copy(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  if (threadIdx.x == 0) cp_async16(shared.of, in + offset);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  if (threadIdx.x < 4) out[threadIdx.x] = shared.of[threadIdx.x];
}

template <bool to_global>
__global__ void store_elsewhere(const float* in, float* out) {
  auto& shared = shared_memory<Numbers>();
  const uint4 zero{};
  if (threadIdx.x == 0) store_word(reinterpret_cast<uint4*>(to_global ? out : shared.of), zero);
  if (threadIdx.x >= 4) out[threadIdx.x] = in[threadIdx.x];
}

struct Matrices {
  alignas(16) uint16_t a[16 * 16], b[8 * 16];
};

// out [16, 8] = a [16, 16] b^T, both from in, as bfloat16 through ldmatrix
template <bool right_rows>
__global__ void matrix_product(const float* in, float* out) {
  auto& shared = shared_memory<Matrices>();
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) shared.a[i] = bf16_bits(in[i]);
  for (int i = lane; i < 128; i += 32) shared.b[i] = bf16_bits(in[256 + i]);
  __syncthreads();
  uint32_t a[4], b[4];
  const int row = right_rows ? lane % 16 : lane / 2;
  ldmatrix_x4(a, shared.a + row * 16 + lane / 16 * 8);
  ldmatrix_x4(b, shared.b + lane % 8 * 16 + lane / 8 % 2 * 8);
  float d[4] = {};
  mma_bf16(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

struct Case {
  const char* name;
  void (*run)(Scene&);
  float (*expected)(const Scene&, int);
  int count;
};

float reversed(const Scene& s, int i) { return s.in[kThreads - 1 - i]; }
float same(const Scene& s, int i) { return s.in[i]; }
float next(const Scene& s, int i) { return s.in[(i + 4) % kThreads]; }
float half_reversed(const Scene& s, int i) { return s.in[63 - i]; }
float warp_sum(const Scene& s, int i) {
  float sum = 0;
  for (int j = 0; j < 32; ++j) sum += s.in[i / 32 * 32 + j];
  return sum;
}
float block_sum(const Scene& s, int) {
  float sum = 0;
  for (int j = 0; j < kThreads; ++j) sum += s.in[j];
  return sum;
}
float product(const Scene& s, int i) {
  float sum = 0;
  for (int k = 0; k < 16; ++k) sum += s.in[i / 8 * 16 + k] * s.in[256 + i % 8 * 16 + k];
  return sum;
}

#define CASE(name, right, wrong, bytes, threads, expected, count) \
  {#name, [](Scene& s) { start(s.faulty ? wrong : right, s, bytes, threads); }, expected, count}
const Case kCases[] = {
    CASE(barrier, reverse<true>, reverse<false>, sizeof(Numbers), kThreads, reversed, kThreads),
    CASE(second_barrier, reverse_twice<true>, reverse_twice<false>, sizeof(Numbers), kThreads, same,
         kThreads),
    CASE(wait, (copy_async<true, true>), (copy_async<false, true>), sizeof(Numbers), kThreads, next,
         kThreads),
    CASE(barrier_after_wait, (copy_async<true, true>), (copy_async<true, false>), sizeof(Numbers),
         kThreads, next, kThreads),
    CASE(pending, copy_stages<1>, copy_stages<2>, sizeof(Numbers), kThreads, half_reversed, 64),
    CASE(divergent, divergent_barrier<true>, divergent_barrier<false>, 0, kThreads, same, kThreads),
    CASE(lane, missing_lane<true>, missing_lane<false>, 0, kThreads, warp_sum, kThreads),
    CASE(thread, missing_thread<true>, missing_thread<false>, (sizeof(RowScratch<float, 1>)),
         kThreads, block_sum, kThreads),
    CASE(beyond, beyond_shared<0>, beyond_shared<1>, sizeof(Numbers), kThreads, same, kThreads),
    CASE(beyond_global, beyond_global<0>, beyond_global<1>, 0, kThreads, same, kThreads),
    CASE(too_little_shared, beyond_shared<0>, beyond_shared<0>, s.faulty ? 64 : sizeof(Numbers),
         kThreads, same, kThreads),
    CASE(
        alignment, unaligned_copy<4>, unaligned_copy<1>, sizeof(Numbers), kThreads,
        [](const Scene& s, int i) { return s.in[4 + i]; }, 4),
    CASE(
        store_to_shared, store_elsewhere<true>, store_elsewhere<false>, sizeof(Numbers), kThreads,
        [](const Scene& s, int i) { return i < 4 ? 0 : s.in[i]; }, kThreads),
    CASE(rows, matrix_product<true>, matrix_product<false>, sizeof(Matrices), 32, product, 128),
    CASE(threads, reverse<true>, reverse<true>, sizeof(Numbers), s.faulty ? 100 : kThreads,
         reversed, kThreads),
};
#undef CASE

int run(const char* name, bool faulty) {
  for (const Case& c : kCases) {
    if (strcmp(c.name, name) != 0) continue;
    Scene s{.faulty = faulty};
    for (size_t i = 0; i < s.in.size(); ++i) s.in[i] = static_cast<float>(1 + i * 7 % 97);
    try {
      c.run(s);
    } catch (const std::exception& error) {
      printf("%s\n", error.what());
      return 0;
    }
    bool right = true;
    for (int i = 0; i < c.count; ++i) right = right && s.out[i] == c.expected(s, i);
    printf(right ? "right\n" : "wrong\n");
    return 0;
  }
  for (const Case& c : kCases) printf("%s\n", c.name);
  return 2;
}

}  // namespace
}  // namespace pykern::cuda

int main(int argc, char** argv) {
  if (argc == 3) return pykern::cuda::run(argv[1], strcmp(argv[2], "wrong") == 0);
  return pykern::cuda::run("", false);
}

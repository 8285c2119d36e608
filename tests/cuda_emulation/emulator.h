// Runs CUDA kernels on the CPU, to test them where there is no GPU: one block at a time, each of
// its threads a fiber.
//
// Fibers run until they must wait for each other, in an order drawn from a seed. What waits is an
// exchange: every thread of the group leaves an operand, and when the last one has come all go on
// and compute their own part. Memory that was not written is NaN, asynchronous copies land when
// they are waited for and not before, and a group that can never be complete is a Fault that says
// who is missing. So a missing barrier or wait shows as a wrong result. It is a net, not a proof.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

namespace emulation {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// What a kernel did that a GPU forbids, or would never come back from.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Where = std::source_location;

// ---- what the running fiber sees

extern Dim3 threadIdx, blockIdx, blockDim, gridDim;
unsigned lane();
void* shared_memory(size_t bytes, size_t alignment);  // Fault when the launch asked for fewer bytes

bool is_shared(const void* p);

// ---- meeting points

void block_barrier(Where where);
void warp_barrier(Where where);

// Leaves four words, waits until the 32 threads of the warp have left theirs, and returns all of
// them; they stay until the exchange after the next.
struct Deposit {
  uint64_t word[4];
};
const Deposit* exchange(const Deposit& own, Where where);

// ---- asynchronous copies of the running fiber

void copy_later(void* to, const void* from, int bytes, int valid);
void commit_copies();
void await_copies(int pending, Where where);

// ---- launches

struct Launch {
  Dim3 grid, block;
  size_t shared;
};
void run(const Launch& launch, const std::function<void()>& kernel);

// A repeatable order for every seed; 0 is ascending. $PYKERN_EMULATION_SEED is the first one.
void set_seed(uint64_t seed);

// ---- faults on purpose: what a kernel without one of its barriers or waits would do

// The barriers and waits that kernels have come to since watch(true), "norm.cu:31 barrier" each.
void watch(bool on);
std::string seen();
// As if that one were not there; "" puts it back.
void leave_out(const std::string& site);

struct Counts {
  uint64_t launches, blocks, switches;
};
Counts counts();

}  // namespace emulation

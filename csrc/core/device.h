// What can be said about CUDA before any tensor is there.
#pragma once
#include <string>

namespace pykern {

struct CudaStatus {
  bool usable = false;   // there are kernels, and a driver and a device for them
  std::string sentence;  // why not, or on what
};

extern const bool kCudaBuilt;  // this build has CUDA kernels

// Asks the driver, which then no longer works in forked children. Not cached: a device may appear.
CudaStatus cuda_status();

}  // namespace pykern

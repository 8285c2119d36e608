// What can be said about CUDA before any tensor is there.
#pragma once
#include <string>

namespace pykern {

struct CudaStatus {
  bool built = false;    // this build has CUDA kernels
  bool usable = false;   // and there is a driver and a device for them
  std::string sentence;  // why not, or on what
};

CudaStatus cuda_status();  // cheap, not cached: a device may appear

}  // namespace pykern

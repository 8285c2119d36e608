// A stream of its own, and what a body launches in it as a graph: launched again for a few
// microseconds instead of those of each kernel.
#pragma once
#include "cuda/launch.h"

namespace pykern::cuda {

// Begins when what `after` holds so far is done.
class OwnStream {
 public:
  explicit OwnStream(Stream after) {
    require(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    cudaEvent_t event = nullptr;
    cudaError_t status = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    if (status == cudaSuccess) status = cudaEventRecord(event, static_cast<cudaStream_t>(after));
    if (status == cudaSuccess) status = cudaStreamWaitEvent(stream_, event, 0);
    if (event) (void)cudaEventDestroy(event);
    if (status != cudaSuccess) {
      (void)cudaStreamDestroy(stream_);
      require(status, "cudaStreamWaitEvent");
    }
  }
  ~OwnStream() { (void)cudaStreamDestroy(stream_); }
  OwnStream(const OwnStream&) = delete;
  OwnStream& operator=(const OwnStream&) = delete;
  operator Stream() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Graph {
 public:
  template <class Body>
  Graph(const OwnStream& stream, const Body& body)
      : stream_(static_cast<cudaStream_t>(Stream{stream})) {
    require(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal),
            "cudaStreamBeginCapture");
    cudaGraph_t graph = nullptr;
    try {
      body();
    } catch (...) {  // the stream must not stay in capture
      if (cudaStreamEndCapture(stream_, &graph) == cudaSuccess) (void)cudaGraphDestroy(graph);
      (void)cudaGetLastError();
      throw;
    }
    require(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    const cudaError_t status = cudaGraphInstantiate(&ready_, graph, 0);
    (void)cudaGraphDestroy(graph);
    require(status, "cudaGraphInstantiate");
  }
  ~Graph() { (void)cudaGraphExecDestroy(ready_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void launch() const { require(cudaGraphLaunch(ready_, stream_), "cudaGraphLaunch"); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t ready_ = nullptr;
};

}  // namespace pykern::cuda

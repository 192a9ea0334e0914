// Streams, recordings and events of the simulated CUDA runtime.
#include <pthread.h>

#include <cstring>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "runtime_cases.h"
#include "simt/host.h"
#include "simt/race.h"

namespace gpt2f::cuda {
namespace {

KERNEL add(float* values, float term) {
  wait_for_previous();
  values[threadIdx.x] += term;
}

// Work happens when somebody waits, in order, with the host memory of that moment.
std::string work_is_late() {
  Setting s;
  Row in = filled(1), out = filled(-1);
  EXPECT(s.upload(in) == cudaSuccess);
  s.add_to_row(2);
  EXPECT(s.download(out) == cudaSuccess);
  EXPECT(out == filled(-1));
  in = filled(10);  // too early: a real copy might also see this
  EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
  EXPECT(out == filled(12));
  return "";
}

std::string random_moments() {
  simt::schedule() = simt::named_schedule("random_1");
  Setting s;
  const Row in = filled(0);
  int early = 0;
  for (int i = 0; i < 64; ++i) {
    Row out = filled(-1);
    EXPECT(s.upload(in) == cudaSuccess);
    EXPECT(s.download(out) == cudaSuccess);
    early += out == in;
    EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
    EXPECT(out == in);
  }
  EXPECT(early > 0 && early < 64);
  return "";
}

std::string graph_replay() {
  Setting s;
  Row in = filled(1), out = filled(-1);
  float term = 5;
  EXPECT(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeThreadLocal) == cudaSuccess);
  EXPECT(s.upload(in) == cudaSuccess);
  s.add_to_row(term);
  term = 100;  // arguments are taken by value
  EXPECT(s.download(out) == cudaSuccess);
  cudaGraph_t graph = nullptr;
  EXPECT(cudaStreamEndCapture(s.stream, &graph) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
  EXPECT(out == filled(-1));  // recorded, not run
  cudaGraphExec_t exec = nullptr;
  EXPECT(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  EXPECT(cudaGraphDestroy(graph) == cudaSuccess);
  for (float value : {1.0f, 7.0f}) {
    in = filled(value);  // memory is read when the graph runs
    EXPECT(cudaGraphLaunch(exec, s.stream) == cudaSuccess);
    EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
    EXPECT(out == filled(value + 5));
  }
  EXPECT(cudaGraphExecDestroy(exec) == cudaSuccess);
  return "";
}

std::string spoilt_recording() {
  Setting s;
  cudaGraph_t graph = nullptr;
  void* memory = nullptr;
  EXPECT(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  EXPECT(cudaMalloc(&memory, 16) == cudaErrorStreamCaptureUnsupported);
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  EXPECT(cudaStreamIsCapturing(s.stream, &status) == cudaSuccess);
  EXPECT(status == cudaStreamCaptureStatusInvalidated);
  EXPECT(cudaStreamEndCapture(s.stream, &graph) == cudaErrorStreamCaptureInvalidated);
  EXPECT(graph == nullptr);
  EXPECT(cudaStreamBeginCapture(s.stream, cudaStreamCaptureModeGlobal) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(s.stream) == cudaErrorStreamCaptureUnsupported);
  EXPECT(cudaStreamEndCapture(s.stream, &graph) == cudaErrorStreamCaptureInvalidated);
  EXPECT(cudaGetLastError() == cudaErrorStreamCaptureInvalidated);
  EXPECT(cudaGetLastError() == cudaSuccess);
  s.add_to_row(1);  // the stream works again
  EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
  return "";
}

// A kernel that fails late is reported by whoever waits, also when memory was freed before.
std::string late_errors() {
  Setting s;
  add_to(s.row + 1, 1.0f, 1, s.stream);
  try {
    cudaStreamSynchronize(s.stream);
    return "no error at the end of the stream";
  } catch (const simt::KernelError& error) {
    EXPECT(std::strstr(error.what(), "kernel add writes past the end") != nullptr);
  }
  add_to(s.row - 1, 1.0f, 1, s.stream);
  void* other = nullptr;
  EXPECT(cudaMalloc(&other, 16) == cudaSuccess);
  EXPECT(cudaFree(other) == cudaSuccess);
  try {
    cudaStreamSynchronize(s.stream);
    return "no error after a free";
  } catch (const simt::KernelError& error) {
    EXPECT(std::strstr(error.what(), "before the begin") != nullptr);
  }
  EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
  return "";
}

std::string events() {
  Setting s;
  cudaEvent_t start = nullptr, end = nullptr;
  EXPECT(cudaEventCreate(&start) == cudaSuccess && cudaEventCreate(&end) == cudaSuccess);
  EXPECT(cudaEventRecord(start, s.stream) == cudaSuccess);
  s.add_to_row(1);
  EXPECT(cudaEventRecord(end, s.stream) == cudaSuccess);
  float milliseconds = -1;
  EXPECT(cudaEventElapsedTime(&milliseconds, start, end) == cudaErrorNotReady);
  EXPECT(cudaEventSynchronize(end) == cudaSuccess);
  EXPECT(cudaEventElapsedTime(&milliseconds, start, end) == cudaSuccess && milliseconds >= 0);
  EXPECT(cudaEventDestroy(start) == cudaSuccess && cudaEventDestroy(end) == cudaSuccess);
  cudaGetLastError();
  return "";
}

struct Stores {
  volatile bool began = false, ends = false;
  volatile float row[kRow] = {};
};

void* store_until_told(void* argument) {
  auto& stores = *static_cast<Stores*>(argument);
  for (float value = 0; !stores.ends; value += 1) {
    for (volatile float& x : stores.row) x = value;
    stores.began = true;
  }
  return nullptr;
}

// What another of the host's threads does while a kernel runs is not the kernel's, though its code
// was compiled with the kernels.
std::string other_threads() {
  Setting s;
  Row row = filled(0);
  Stores stores;
  pthread_t other{};
  EXPECT(pthread_create(&other, nullptr, store_until_told, &stores) == 0);
  while (!stores.began) {
  }
  cudaError_t result = s.upload(row);
  for (int i = 0; i < 2000; ++i) s.add_to_row(1);
  if (result == cudaSuccess) result = s.download(row);
  if (result == cudaSuccess) result = cudaStreamSynchronize(s.stream);
  stores.ends = true;
  pthread_join(other, nullptr);
  EXPECT(result == cudaSuccess);
  EXPECT(row == filled(2000));
  return "";
}

}  // namespace

void add_to(float* row, float term, int blocks, void* stream) {
  launch("add", add, Grid{blocks}, kRow, 0, stream, row, term);
}

RuntimeCases stream_cases() {
  return {
      {"work_is_late", work_is_late},   {"random_moments", random_moments},
      {"graph_replay", graph_replay},   {"spoilt_recording", spoilt_recording},
      {"late_errors", late_errors},     {"events", events},
      {"other_threads", other_threads},
  };
}

}  // namespace gpt2f::cuda

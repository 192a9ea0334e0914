// Checks of the simulated CUDA runtime: streams, graphs, memory, planned failures, launches.
#include "runtime_cases.h"

#include <cuda_runtime.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "simt/host.h"
#include "simt/race.h"

namespace gpt2f::cuda {
namespace {

constexpr int kThreads = 64;
constexpr size_t kBytes = kThreads * sizeof(float);
using Row = std::array<float, kThreads>;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) return cat("line ", __LINE__, ": not ", #condition); \
  } while (false)

KERNEL add(float* values, float term) {
  wait_for_previous();
  values[threadIdx.x] += term;
}

KERNEL touch_dynamic(float* out, int count) {
  DYNAMIC_SHARED(float, scratch);
  wait_for_previous();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) scratch[i] = 1.0f;
  sync_block();
  out[threadIdx.x] = scratch[count - 1 - static_cast<int>(threadIdx.x)];
}

KERNEL never_waits(float* out) { out[threadIdx.x] = 1.0f; }

KERNEL copies_twice(const uint4* in, uint4* out) {
  wait_for_previous();
  const uint4 first = load_stream16(in + threadIdx.x);
  const uint4 again = load16(in + threadIdx.x);
  store16(out + threadIdx.x, uint4{first.x, again.y, first.z, again.w});
}

// A stream and one row of device memory.
struct Setting {
  cudaStream_t stream = nullptr;
  float* row = nullptr;

  Setting() {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, kBytes), "malloc");
    row = static_cast<float*>(memory);
  }
  ~Setting() {
    cudaFree(row);
    cudaStreamDestroy(stream);
  }
  void add_to_row(float term) { launch("add", add, Grid{1}, kThreads, 0, stream, row, term); }
  cudaError_t upload(const Row& from) {
    return cudaMemcpyAsync(row, from.data(), kBytes, cudaMemcpyHostToDevice, stream);
  }
  cudaError_t download(Row& to) {
    return cudaMemcpyAsync(to.data(), row, kBytes, cudaMemcpyDeviceToHost, stream);
  }
};

Row filled(float value) {
  Row row;
  row.fill(value);
  return row;
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

std::string fresh_memory_is_poisoned() {
  Setting s;
  Row out = filled(0);
  EXPECT(s.download(out) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
  for (float value : out) EXPECT(value != value);
  EXPECT(cudaMemsetAsync(s.row, 0, kBytes, s.stream) == cudaSuccess);
  EXPECT(s.download(out) == cudaSuccess);
  EXPECT(cudaStreamSynchronize(s.stream) == cudaSuccess);
  EXPECT(out == filled(0));
  return "";
}

std::string copies_are_checked() {
  Setting s;
  Row host = filled(0);
  EXPECT(cudaMemcpyAsync(s.row, host.data(), kBytes + 1, cudaMemcpyHostToDevice, s.stream) ==
         cudaErrorInvalidValue);
  EXPECT(cudaMemcpyAsync(s.row + 1, host.data(), kBytes, cudaMemcpyHostToDevice, s.stream) ==
         cudaErrorInvalidValue);
  EXPECT(cudaMemcpyAsync(host.data(), s.row, kBytes, cudaMemcpyHostToDevice, s.stream) ==
         cudaErrorInvalidValue);
  EXPECT(cudaMemsetAsync(host.data(), 0, kBytes, s.stream) == cudaErrorInvalidValue);
  EXPECT(cudaFree(host.data()) == cudaErrorInvalidValue);
  EXPECT(cudaFreeHost(host.data()) == cudaErrorInvalidValue);
  cudaGetLastError();
  return "";
}

// A kernel that fails late is reported by whoever waits, also when memory was freed before.
std::string late_errors() {
  Setting s;
  launch("add", add, Grid{1}, kThreads, 0, s.stream, s.row + 1, 1.0f);
  try {
    cudaStreamSynchronize(s.stream);
    return "no error at the end of the stream";
  } catch (const simt::KernelError& error) {
    EXPECT(std::strstr(error.what(), "kernel add writes past the end") != nullptr);
  }
  launch("add", add, Grid{1}, kThreads, 0, s.stream, s.row - 1, 1.0f);
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

std::string planned_failures() {
  simt::fail_next("cudaMalloc", cudaErrorMemoryAllocation, 1);
  void* memory = nullptr;
  EXPECT(cudaMalloc(&memory, 16) == cudaSuccess);
  EXPECT(cudaFree(memory) == cudaSuccess);
  EXPECT(cudaMalloc(&memory, 16) == cudaErrorMemoryAllocation);
  EXPECT(cudaPeekAtLastError() == cudaErrorMemoryAllocation);
  EXPECT(cudaMalloc(&memory, 16) == cudaSuccess);
  EXPECT(cudaFree(memory) == cudaSuccess);
  cudaGetLastError();
  Setting s;
  simt::fail_next("cudaLaunchKernelExC", cudaErrorLaunchFailure, 0);
  try {
    s.add_to_row(1);
    return "the launch did not fail";
  } catch (const Error& error) {
    EXPECT(std::string(error.what()) == "add: cudaErrorLaunchFailure: unspecified launch failure");
  }
  EXPECT(cudaGetLastError() == cudaSuccess);
  simt::device().missing = cudaErrorInsufficientDriver;
  int count = 77;
  EXPECT(cudaGetDeviceCount(&count) == cudaErrorInsufficientDriver && count == 77);
  simt::device().missing = cudaSuccess;
  simt::device().count = 0;
  EXPECT(cudaGetDeviceCount(&count) == cudaErrorNoDevice && count == 77);
  simt::device().count = 1;
  simt::device().memory = 1024;
  EXPECT(cudaMalloc(&memory, 2048) == cudaErrorMemoryAllocation);
  size_t free = 0, total = 0;
  EXPECT(cudaMemGetInfo(&free, &total) == cudaSuccess && total == 1024 && free == 1024 - kBytes);
  return "";
}

// launch.h asks for what a kernel needs, once; simt refuses what a device does not have.
std::string shared_limits() {
  std::vector<float> out(kThreads);
  const auto run = [&](int kilobytes) {
    launch("touch_dynamic", touch_dynamic, Grid{1}, kThreads, kilobytes * 1024, nullptr, out.data(),
           kilobytes * 256);
  };
  run(48);
  run(200);
  run(100);  // must not lower the limit
  simt::fail_next("cudaFuncSetAttribute", cudaErrorUnknown, 0);
  run(200);  // asks nothing
  simt::forget_failures();
  try {
    run(228);
    return "228 KB were granted";
  } catch (const Error& error) {
    EXPECT(std::strstr(error.what(), "touch_dynamic: cudaErrorInvalidValue") != nullptr);
  }
  cudaLaunchConfig_t config{};
  config.dynamicSmemBytes = 201 * 1024;
  config.blockDim = dim3(kThreads);
  EXPECT(cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(touch_dynamic), nullptr) ==
         cudaErrorInvalidValue);
  return "";
}

// Launches overlap from capability 9.0 on, and only then is wait_for_previous demanded.
std::string older_devices() {
  simt::Device turing;
  turing.major = 7;
  turing.minor = 5;
  simt::change_device(turing);
  launch_cache().forget();
  std::vector<float> out(kThreads);
  launch("never_waits", never_waits, Grid{1}, kThreads, 0, nullptr, out.data());
  EXPECT(out == std::vector<float>(kThreads, 1.0f));
  try {
    launch("touch_dynamic", touch_dynamic, Grid{1}, kThreads, 65 * 1024, nullptr, out.data(), 64);
    return "sm_75 granted 65 KB";
  } catch (const Error&) {
  }
  simt::change_device({});
  launch_cache().forget();
  try {
    launch("never_waits", never_waits, Grid{1}, kThreads, 0, nullptr, out.data());
    return "a kernel need not wait";
  } catch (const simt::KernelError&) {
  }
  EXPECT(simt::take_races().empty() != simt::instrumented);  // its stores
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

// Bytes that a launch moves; only the race build counts.
std::string traffic() {
  if (!simt::instrumented) return "";
  alignas(16) static uint4 in[2 * kThreads], out[kThreads];
  simt::track(in, sizeof(in));
  simt::take_traffic();
  launch("copies_twice", copies_twice, Grid{1}, kThreads, 0, nullptr, in, out);
  std::vector<simt::Traffic> counted = simt::take_traffic();
  EXPECT(counted.size() == 1 && counted[0].kernel == "copies_twice");
  EXPECT(counted[0].loaded == 2 * 16 * kThreads && counted[0].loaded_once == 16 * kThreads);
  EXPECT(counted[0].stored == 0 && counted[0].stored_once == 0);
  simt::track_nothing();
  Setting s;  // device allocations count by themselves
  launch("add", add, Grid{1}, kThreads, 0, nullptr, s.row, 1.0f);
  launch("add", add, Grid{2}, kThreads, 0, nullptr, s.row, 1.0f);
  counted = simt::take_traffic();
  EXPECT(counted.size() == 2 && counted[0].loaded_once == static_cast<int64_t>(kBytes));
  EXPECT(counted[1].stored == 2 * static_cast<int64_t>(kBytes));
  EXPECT(counted[1].stored_once == static_cast<int64_t>(kBytes));
  EXPECT(!simt::take_races().empty());  // two blocks that add to one row
  return "";
}

const std::vector<std::pair<const char*, std::string (*)()>> kCases = {
    {"work_is_late", work_is_late},
    {"random_moments", random_moments},
    {"graph_replay", graph_replay},
    {"spoilt_recording", spoilt_recording},
    {"fresh_memory_is_poisoned", fresh_memory_is_poisoned},
    {"copies_are_checked", copies_are_checked},
    {"late_errors", late_errors},
    {"planned_failures", planned_failures},
    {"shared_limits", shared_limits},
    {"older_devices", older_devices},
    {"events", events},
    {"traffic", traffic},
};

}  // namespace

int run_runtime_case(const std::string& name) {
  for (const auto& [known, run] : kCases) {
    if (name != known) continue;
    const std::string wrong = run();
    std::printf("%s\n", wrong.empty() ? "ok" : wrong.c_str());
    for (const std::string& race : simt::take_races()) std::printf("race: %s\n", race.c_str());
    return 0;
  }
  return 2;
}

}  // namespace gpt2f::cuda

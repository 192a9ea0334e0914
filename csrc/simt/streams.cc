// Streams, events, graphs and launches of the simulated runtime. Work runs late: when somebody
// waits for it, or under a random schedule at any moment. A missing wait, or host memory that
// changes too early, so shows. The null stream runs everything at once: tests of single kernels.
#include <algorithm>
#include <chrono>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <unordered_map>

#include "simt/host.h"
#include "simt/race.h"

struct CUgraph_st {
  std::vector<gpt2f::simt::Task> tasks;
};
struct CUgraphExec_st {
  std::vector<gpt2f::simt::Task> tasks;
};
struct CUstream_st {
  std::deque<gpt2f::simt::Task> waiting;
  std::unique_ptr<CUgraph_st> recording;
  bool spoilt = false;
};
struct CUevent_st {
  std::chrono::steady_clock::time_point time;
  cudaStream_t stream = nullptr;
  bool recorded = false;
  bool reached = false;
};

namespace gpt2f::simt {
namespace {

std::vector<std::unique_ptr<CUstream_st>>& streams() {
  static std::vector<std::unique_ptr<CUstream_st>> all;
  return all;
}
std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> all;
  return all;
}
std::unordered_map<const void*, size_t>& shared_limits() {
  static std::unordered_map<const void*, size_t> all;
  return all;
}
std::exception_ptr kept_error;

bool known(cudaStream_t stream) {
  return std::any_of(streams().begin(), streams().end(),
                     [&](const auto& s) { return s.get() == stream; });
}

void run(CUstream_st& stream, size_t most) {
  while (most-- > 0 && !stream.waiting.empty()) {
    const Task task = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    try {
      task();
    } catch (...) {
      stream.waiting.clear();
      throw;
    }
  }
}

void run_all() {
  for (const auto& stream : streams()) run(*stream, stream->waiting.size());
  if (kept_error) std::rethrow_exception(std::exchange(kept_error, nullptr));
}

// A launch with its arguments by value.
struct RecordedLaunch {
  const Kernel* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  bool overlaps;  // may begin before the launch in front of it has ended
  bool alone;     // on the null stream, where nothing overlaps
  std::vector<std::vector<std::max_align_t>> values;

  void run() {
    std::vector<void*> arguments;
    for (auto& value : values) arguments.push_back(value.data());
    if (alone) end_overlap();
    run_launch({kernel, grid, block, shared_bytes, arguments.data(), overlaps});
    check_guards(kernel->name);
  }
};

}  // namespace

void change_device(const Device& other) {
  const std::lock_guard<std::recursive_mutex> lock(runtime_lock());
  device() = other;
  shared_limits().clear();
}

const Kernel* find_kernel(const void* address) {
  const std::lock_guard<std::recursive_mutex> lock(runtime_lock());
  const auto found = kernels().find(address);
  return found == kernels().end() ? nullptr : &found->second;
}

void add_kernel(Kernel kernel) {
  const std::lock_guard<std::recursive_mutex> lock(runtime_lock());
  kernels().emplace(kernel.address, std::move(kernel));
}

bool spoil_recordings() {
  bool any = false;
  for (const auto& stream : streams()) {
    if (stream->recording == nullptr) continue;
    stream->spoilt = any = true;
  }
  return any;
}

void run_all_quietly() {
  try {
    run_all();
  } catch (...) {
    kept_error = std::current_exception();
  }
}

cudaError_t enqueue(cudaStream_t stream, Task task) {
  if (stream == nullptr) {
    task();
    return cudaSuccess;
  }
  if (!known(stream)) return cudaErrorInvalidResourceHandle;
  if (stream->recording != nullptr) {
    if (stream->spoilt) return cudaErrorStreamCaptureInvalidated;
    stream->recording->tasks.push_back(std::move(task));
    return cudaSuccess;
  }
  stream->waiting.push_back(std::move(task));
  static std::mt19937_64 random;
  if (schedule().order == Schedule::Order::kRandom && random() % 4 == 0) {
    run(*stream, random() % stream->waiting.size() + 1);
  }
  return cudaSuccess;
}

}  // namespace gpt2f::simt

using namespace gpt2f::simt;

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  const Call call("cudaStreamCreateWithFlags");
  if (call.failure() != cudaSuccess) return report(call.failure());
  streams().push_back(std::make_unique<CUstream_st>());
  *stream = streams().back().get();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Call call("cudaStreamDestroy");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (!known(stream)) return report(cudaErrorInvalidResourceHandle);
  run_all_quietly();
  std::erase_if(streams(), [&](const auto& s) { return s.get() == stream; });
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  const Call call("cudaStreamSynchronize");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (stream != nullptr && !known(stream)) return report(cudaErrorInvalidResourceHandle);
  if (stream != nullptr && stream->recording != nullptr) {
    stream->spoilt = true;
    return report(cudaErrorStreamCaptureUnsupported);
  }
  if (kept_error) std::rethrow_exception(std::exchange(kept_error, nullptr));
  if (stream != nullptr) run(*stream, stream->waiting.size());
  end_overlap();
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) {
  const Call call("cudaStreamQuery");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (!known(stream)) return report(cudaErrorInvalidResourceHandle);
  if (stream->recording != nullptr) {
    stream->spoilt = true;
    return report(cudaErrorStreamCaptureUnsupported);
  }
  run(*stream, 1);
  return stream->waiting.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaDeviceSynchronize() {
  const Call call("cudaDeviceSynchronize");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (spoil_recordings()) return report(cudaErrorStreamCaptureUnsupported);
  run_all();
  return cudaSuccess;
}

// ---- Recording ---------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  const Call call("cudaStreamBeginCapture");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (!known(stream)) return report(cudaErrorStreamCaptureUnsupported);
  if (stream->recording != nullptr) return report(cudaErrorInvalidValue);
  stream->recording = std::make_unique<CUgraph_st>();
  stream->spoilt = false;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Call call("cudaStreamEndCapture");
  *graph = nullptr;
  if (!known(stream) || stream->recording == nullptr) return report(cudaErrorInvalidValue);
  std::unique_ptr<CUgraph_st> recorded = std::move(stream->recording);
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (stream->spoilt) return report(cudaErrorStreamCaptureInvalidated);
  *graph = recorded.release();
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Call call("cudaStreamIsCapturing");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (!known(stream)) return report(cudaErrorInvalidResourceHandle);
  *status = stream->recording == nullptr ? cudaStreamCaptureStatusNone
            : stream->spoilt             ? cudaStreamCaptureStatusInvalidated
                                         : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  const Call call("cudaGraphInstantiate");
  if (call.failure() != cudaSuccess) return report(call.failure());
  *exec = new CUgraphExec_st{graph->tasks};
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  const Call call("cudaGraphLaunch");
  if (call.failure() != cudaSuccess) return report(call.failure());
  for (const Task& task : exec->tasks) {
    const cudaError_t error = enqueue(stream, task);
    if (error != cudaSuccess) return report(error);
  }
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Call call("cudaGraphDestroy");
  if (call.failure() != cudaSuccess) return report(call.failure());
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  const Call call("cudaGraphExecDestroy");
  if (call.failure() != cudaSuccess) return report(call.failure());
  delete exec;
  return cudaSuccess;
}

// ---- Events ------------------------------------------------------------------------------------

cudaError_t cudaEventCreate(cudaEvent_t* event) {
  const Call call("cudaEventCreate");
  if (call.failure() != cudaSuccess) return report(call.failure());
  *event = new CUevent_st;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Call call("cudaEventRecord");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (stream != nullptr && known(stream) && stream->recording != nullptr) {
    stream->spoilt = true;
    return report(cudaErrorStreamCaptureUnsupported);
  }
  event->stream = stream;
  event->recorded = true;
  event->reached = false;
  return report(enqueue(stream, [event] {
    event->time = std::chrono::steady_clock::now();
    event->reached = true;
  }));
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const Call call("cudaEventSynchronize");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (!event->recorded) return cudaSuccess;
  while (!event->reached) {
    if (!known(event->stream) || event->stream->waiting.empty()) return report(cudaErrorUnknown);
    run(*event->stream, 1);
  }
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const Call call("cudaEventQuery");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (event->recorded && !event->reached && known(event->stream)) run(*event->stream, 1);
  return event->recorded && !event->reached ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t start, cudaEvent_t end) {
  const Call call("cudaEventElapsedTime");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (!start->recorded || !end->recorded) return report(cudaErrorInvalidResourceHandle);
  if (!start->reached || !end->reached) return report(cudaErrorNotReady);
  *milliseconds = std::chrono::duration<float, std::milli>(end->time - start->time).count();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Call call("cudaEventDestroy");
  if (call.failure() != cudaSuccess) return report(call.failure());
  run_all_quietly();
  delete event;
  return cudaSuccess;
}

// ---- Launches ----------------------------------------------------------------------------------

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  const Call call("cudaFuncGetAttributes");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (find_kernel(kernel) == nullptr) return report(cudaErrorInvalidDeviceFunction);
  const Device& own = device();
  attributes->ptxVersion = own.compiled_for > 0 ? own.compiled_for : 10 * own.major + own.minor;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const Call call("cudaFuncSetAttribute");
  if (call.failure() != cudaSuccess) return report(call.failure());
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (find_kernel(kernel) == nullptr) return report(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > most) {
    return report(cudaErrorInvalidValue);
  }
  shared_limits()[kernel] = static_cast<size_t>(value);
  return cudaSuccess;
}

namespace {

cudaError_t launch_kernel(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  const Kernel* found = find_kernel(kernel);
  if (found == nullptr) return report(cudaErrorInvalidDeviceFunction);
  const auto limit = shared_limits().find(kernel);
  const size_t most = limit == shared_limits().end() ? 48 * 1024 : limit->second;
  if (config->dynamicSmemBytes > std::max<size_t>(most, 48 * 1024)) {
    return report(cudaErrorInvalidValue);
  }
  if (config->numAttrs > 0 && device().major < 9) return report(cudaErrorInvalidValue);
  const dim3 &grid = config->gridDim, &block = config->blockDim;
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
    return report(cudaErrorInvalidConfiguration);
  }
  auto recorded = std::make_shared<RecordedLaunch>();
  *recorded = {
      found, grid, block, config->dynamicSmemBytes, config->numAttrs > 0, config->stream == nullptr,
      {}};
  for (size_t i = 0; i < found->argument_bytes.size(); ++i) {
    const size_t bytes = found->argument_bytes[i];
    recorded->values.emplace_back(bytes / sizeof(std::max_align_t) + 1);
    std::copy_n(static_cast<const char*>(arguments[i]), bytes,
                reinterpret_cast<char*>(recorded->values.back().data()));
  }
  return report(enqueue(config->stream, [recorded] { recorded->run(); }));
}

}  // namespace

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments,
                             size_t shared_bytes, cudaStream_t stream) {
  const Call call("cudaLaunchKernel");
  if (call.failure() != cudaSuccess) return report(call.failure());
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return launch_kernel(&config, kernel, arguments);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  const Call call("cudaLaunchKernelExC");
  if (call.failure() != cudaSuccess) return report(call.failure());
  return launch_kernel(config, kernel, arguments);
}

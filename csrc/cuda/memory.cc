// Devices, their memory, streams and recorded steps, over the CUDA runtime.
#include <cuda_runtime.h>

#include <cstring>
#include <memory>

#include "core/error.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"

namespace gpt2f {

struct Device {
  int index = 0;
  cudaStream_t stream = nullptr;
};

struct Recording {
  cudaGraphExec_t graph = nullptr;
};

namespace cuda {
namespace {

int current_device() {
  int index = 0;
  check_cuda(cudaGetDevice(&index), "cudaGetDevice");
  return index;
}

int attribute(int index, cudaDeviceAttr which) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

int count() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaErrorInsufficientDriver || error == cudaErrorNoDevice) {
    cudaGetLastError();
    throw Error(ErrorKind::kDevice,
                cat("device 'cuda' is not available: ",
                    error == cudaErrorNoDevice
                        ? "the NVIDIA driver sees no GPU (is CUDA_VISIBLE_DEVICES set?)"
                        : "no NVIDIA driver answers, or it is older than this build's CUDA runtime",
                    " (cudaGetDeviceCount: ", cudaGetErrorName(error), ", ",
                    cudaGetErrorString(error), ")"));
  }
  check_cuda(error, "cudaGetDeviceCount");
  check(devices > 0, ErrorKind::kDevice,
        "device 'cuda' is not available: the NVIDIA driver sees no GPU (cudaGetDeviceCount: 0)");
  return devices;
}

DeviceFacts facts(int index) {
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  DeviceFacts out{};
  cat(properties.name).copy(out.name, sizeof out.name - 1);
  out.capability = properties.major * 10 + properties.minor;
  out.multiprocessors = properties.multiProcessorCount;
  out.memory = static_cast<int64_t>(properties.totalGlobalMem);
  return out;
}

int capability(int index) {
  return 10 * attribute(index, cudaDevAttrComputeCapabilityMajor) +
         attribute(index, cudaDevAttrComputeCapabilityMinor);
}

int index_of(Device* device) { return device->index; }

int enter(int index) {
  const int before = current_device();
  if (before != index) check_cuda(cudaSetDevice(index), "cudaSetDevice");
  return before;
}

void leave(int before) {
  int now = before;
  if (cudaGetDevice(&now) == cudaSuccess && now == before) return;
  cudaSetDevice(before);
}

Device* open(int index, Precision precision) {
  const int devices = count();
  check(index >= 0 && index < devices, ErrorKind::kDevice, "device 'cuda:", index,
        "': this machine has ", devices, devices == 1 ? " CUDA device" : " CUDA devices");
  const int major = capability(index) / 10, minor = capability(index) % 10;
  check(capability(index) >= 75, ErrorKind::kDevice, "device 'cuda:", index,
        "': compute capability ", major, ".", minor, "; the kernels need 7.5 or newer");
  check(major >= 8 || precision != Precision::kBf16, ErrorKind::kDevice, "device 'cuda:", index,
        "': compute capability ", major, ".", minor,
        " has no bfloat16 products; use precision 'fp16', 'int8' or 'int4'");
  auto device = std::make_unique<Device>();
  device->index = index;
  const int before = enter(index);
  const cudaError_t error = cudaStreamCreateWithFlags(&device->stream, cudaStreamNonBlocking);
  leave(before);
  check_cuda(error, "cudaStreamCreateWithFlags");
  return device.release();
}

void close(Device* device) {
  cudaStreamDestroy(device->stream);
  delete device;
}

void* stream(Device* device) { return device->stream; }

void* allocate(Device* device, int64_t bytes, const char* purpose) {
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw Error(ErrorKind::kCapacity, cat(purpose, ": no ", bytes, " bytes of memory on device ",
                                          device->index, " (cudaMalloc)"));
  }
  check_cuda(error, "cudaMalloc");
  const cudaError_t zeroed = cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), device->stream);
  if (zeroed != cudaSuccess) cudaFree(memory);
  check_cuda(zeroed, "cudaMemsetAsync");
  return memory;
}

void release(Device*, void* memory) { cudaFree(memory); }

void* allocate_host(Device*, int64_t bytes) {
  void* memory = nullptr;
  const cudaError_t error = cudaMallocHost(&memory, static_cast<size_t>(bytes));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    throw Error(ErrorKind::kCapacity,
                cat("control: no ", bytes, " bytes of page-locked memory (cudaMallocHost)"));
  }
  check_cuda(error, "cudaMallocHost");
  std::memset(memory, 0, static_cast<size_t>(bytes));
  return memory;
}

void release_host(Device*, void* memory) { cudaFreeHost(memory); }

void transfer(Device* device, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
  check_cuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), kind, device->stream),
             "cudaMemcpyAsync");
}

void upload(Device* device, void* to, const void* from, int64_t bytes) {
  transfer(device, to, from, bytes, cudaMemcpyHostToDevice);
}

void download(Device* device, void* to, const void* from, int64_t bytes) {
  transfer(device, to, from, bytes, cudaMemcpyDeviceToHost);
}

void copy(Device* device, void* to, const void* from, int64_t bytes) {
  transfer(device, to, from, bytes, cudaMemcpyDeviceToDevice);
}

void finish(Device* device) {
  check_cuda(cudaStreamSynchronize(device->stream), "cudaStreamSynchronize");
}

void begin(Device* device) {
  check_cuda(cudaStreamBeginCapture(device->stream, cudaStreamCaptureModeThreadLocal),
             "cudaStreamBeginCapture");
}

Recording* end(Device* device) {
  cudaGraph_t graph = nullptr;
  check_cuda(cudaStreamEndCapture(device->stream, &graph), "cudaStreamEndCapture");
  auto recording = std::make_unique<Recording>();
  const cudaError_t error = cudaGraphInstantiate(&recording->graph, graph, 0);
  cudaGraphDestroy(graph);
  check_cuda(error, "cudaGraphInstantiate");
  return recording.release();
}

void abandon(Device* device) {
  cudaGraph_t graph = nullptr;
  cudaStreamEndCapture(device->stream, &graph);
  if (graph != nullptr) cudaGraphDestroy(graph);
  cudaGetLastError();
}

void replay(Device* device, Recording* recording) {
  check_cuda(cudaGraphLaunch(recording->graph, device->stream), "cudaGraphLaunch");
}

void discard(Device*, Recording* recording) {
  cudaGraphExecDestroy(recording->graph);
  delete recording;
}

int64_t free_memory(Device*) {
  size_t free = 0, total = 0;
  check_cuda(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  return static_cast<int64_t>(free);
}

}  // namespace

const DeviceTable* device_table() {
  static const DeviceTable kTable = {
      count,  facts,    capability, open,          close,        stream,  index_of,   enter,
      leave,  allocate, release,    allocate_host, release_host, upload,  download,   copy,
      finish, begin,    end,        abandon,       replay,       discard, free_memory};
  return &kTable;
}

}  // namespace cuda
}  // namespace gpt2f

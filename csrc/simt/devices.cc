// Errors and devices of the simulated runtime, and the failures that tests ask for.
#include <algorithm>
#include <cstdio>
#include <map>

#include "simt/host.h"

namespace gpt2f::simt {
namespace {

struct Planned {
  cudaError_t error;
  int skip;
};
std::map<std::string, Planned>& planned() {
  static std::map<std::string, Planned> failures;
  return failures;
}

cudaError_t last_error = cudaSuccess;
thread_local int current_device = 0;

struct ErrorText {
  cudaError_t error;
  const char* name;
  const char* text;
};
// Texts as the CUDA runtime gives them.
constexpr ErrorText kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorMemoryAllocation, "cudaErrorMemoryAllocation", "out of memory"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration",
     "invalid configuration argument"},
    {cudaErrorInsufficientDriver, "cudaErrorInsufficientDriver",
     "CUDA driver version is insufficient for CUDA runtime version"},
    {cudaErrorDevicesUnavailable, "cudaErrorDevicesUnavailable",
     "CUDA-capable device(s) is/are busy or unavailable"},
    {cudaErrorInvalidDeviceFunction, "cudaErrorInvalidDeviceFunction", "invalid device function"},
    {cudaErrorNoDevice, "cudaErrorNoDevice", "no CUDA-capable device is detected"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorInvalidResourceHandle, "cudaErrorInvalidResourceHandle", "invalid resource handle"},
    {cudaErrorNotReady, "cudaErrorNotReady", "device not ready"},
    {cudaErrorIllegalAddress, "cudaErrorIllegalAddress",
     "an illegal memory access was encountered"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
    {cudaErrorStreamCaptureUnsupported, "cudaErrorStreamCaptureUnsupported",
     "operation not permitted when stream is capturing"},
    {cudaErrorStreamCaptureInvalidated, "cudaErrorStreamCaptureInvalidated",
     "operation failed due to a previous error during capture"},
    {cudaErrorUnknown, "cudaErrorUnknown", "unknown error"},
};

const ErrorText* find(cudaError_t error) {
  for (const ErrorText& entry : kErrors) {
    if (entry.error == error) return &entry;
  }
  return nullptr;
}

}  // namespace

Device& device() {
  static Device simulated;
  return simulated;
}

std::recursive_mutex& runtime_lock() {
  static std::recursive_mutex lock;
  return lock;
}

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

void fail_next(const std::string& function, cudaError_t error, int skip) {
  planned()[function] = {error, skip};
}
void forget_failures() { planned().clear(); }

Call::Call(const char* function) : lock_(runtime_lock()), failure_(device().missing) {
  const auto entry = planned().find(function);
  if (entry == planned().end() || entry->second.skip-- > 0) return;
  failure_ = entry->second.error;
  planned().erase(entry);
}

}  // namespace gpt2f::simt

using gpt2f::simt::Call;
using gpt2f::simt::device;
using gpt2f::simt::report;

const char* cudaGetErrorName(cudaError_t error) {
  const auto* entry = gpt2f::simt::find(error);
  return entry != nullptr ? entry->name : "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  const auto* entry = gpt2f::simt::find(error);
  return entry != nullptr ? entry->text : "unrecognized error code";
}

cudaError_t cudaGetLastError() {
  const std::lock_guard<std::recursive_mutex> lock(gpt2f::simt::runtime_lock());
  return std::exchange(gpt2f::simt::last_error, cudaSuccess);
}

cudaError_t cudaPeekAtLastError() {
  const std::lock_guard<std::recursive_mutex> lock(gpt2f::simt::runtime_lock());
  return gpt2f::simt::last_error;
}

// Leaves the count as it was where there is no device, like the runtime.
cudaError_t cudaGetDeviceCount(int* count) {
  const Call call("cudaGetDeviceCount");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (device().count == 0) return report(cudaErrorNoDevice);
  *count = device().count;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int index) {
  const Call call("cudaSetDevice");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (index < 0 || index >= device().count) return report(cudaErrorInvalidDevice);
  gpt2f::simt::current_device = index;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* index) {
  const Call call("cudaGetDevice");
  if (call.failure() != cudaSuccess) return report(call.failure());
  *index = gpt2f::simt::current_device;
  return cudaSuccess;
}

// Shared memory that one block may ask for, by compute capability (CUDA programming guide, table of
// technical specifications).
static size_t most_shared() {
  const int capability = device().major * 10 + device().minor;
  const int kilobytes = capability < 80                        ? 64
                        : capability == 80 || capability == 87 ? 163
                        : capability < 90 || capability >= 120 ? 99
                                                               : 227;
  return static_cast<size_t>(kilobytes) * 1024;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int index) {
  const Call call("cudaGetDeviceProperties");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (index < 0 || index >= device().count) return report(cudaErrorInvalidDevice);
  *properties = cudaDeviceProp{};
  std::snprintf(properties->name, sizeof(properties->name), "simt sm_%d%d", device().major,
                device().minor);
  properties->totalGlobalMem = device().memory;
  properties->major = device().major;
  properties->minor = device().minor;
  properties->multiProcessorCount = 16;
  properties->l2CacheSize = 4 << 20;
  properties->sharedMemPerBlockOptin = most_shared();
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  const Call call("cudaDeviceGetAttribute");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (index < 0 || index >= device().count) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = 48 * 1024;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 16;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 4 << 20;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().major;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().minor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(most_shared());
      return cudaSuccess;
  }
  return report(cudaErrorInvalidValue);
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}

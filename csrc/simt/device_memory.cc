// Device memory of the simulated runtime: ordinary memory, filled with 0xFF (NaN, -1), with guards
// on both sides that are checked after every kernel.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "simt/host.h"
#include "simt/race.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace gpt2f::simt {
namespace {

constexpr size_t kGuard = 256;  // also the alignment that cudaMalloc promises
constexpr int kGuardByte = 0xA5;

struct Allocation {
  size_t bytes;
  size_t whole;  // guards included
};
using Allocations = std::map<const char*, Allocation>;
Allocations& allocations() {
  static Allocations all;
  return all;
}
std::set<void*>& host_allocations() {
  static std::set<void*> all;
  return all;
}
size_t in_use = 0;

// The last allocation that begins at or before the address.
Allocations::iterator before(const void* address) {
  auto next = allocations().upper_bound(static_cast<const char*>(address));
  return next == allocations().begin() ? allocations().end() : std::prev(next);
}

}  // namespace

bool in_device_memory(const void* address, size_t bytes) {
  const auto found = before(address);
  if (found == allocations().end()) return false;
  const auto offset = static_cast<size_t>(static_cast<const char*>(address) - found->first);
  return offset <= found->second.bytes && bytes <= found->second.bytes - offset;
}

bool touches_device_memory(const void* address, size_t bytes) {
  const auto found = before(static_cast<const char*>(address) + bytes);
  return found != allocations().end() &&
         found->first + found->second.bytes > static_cast<const char*>(address);
}

std::string device_place(const void* address) {
  const auto found = before(address);
  if (found == allocations().end() || !in_device_memory(address, 1)) return cat(address);
  return cat("byte ", static_cast<const char*>(address) - found->first, " of a device buffer of ",
             found->second.bytes, " bytes");
}

size_t device_bytes_in_use() { return in_use; }

#if defined(__SANITIZE_ADDRESS__)
void check_guards(const char*) {}  // AddressSanitizer has stopped the program
#else
namespace {
bool intact(const char* guard, size_t bytes) {
  return std::all_of(guard, guard + bytes,
                     [](char c) { return static_cast<unsigned char>(c) == kGuardByte; });
}

}  // namespace

void check_guards(const char* writer) {
  for (const auto& [begin, size] : allocations()) {
    const char* end = begin + size.bytes;
    const size_t tail = size.whole - kGuard - size.bytes;
    const bool front = intact(begin - kGuard, kGuard);
    if (front && intact(end, tail)) continue;
    // Mended, so that the next check does not blame another kernel.
    std::memset(const_cast<char*>(begin) - kGuard, kGuardByte, kGuard);
    std::memset(const_cast<char*>(end), kGuardByte, tail);
    throw KernelError(cat("kernel ", writer, " writes ",
                          front ? "past the end of" : "before the begin of", " a device buffer of ",
                          size.bytes, " bytes"));
  }
}
#endif

}  // namespace gpt2f::simt

using namespace gpt2f::simt;

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  const Call call("cudaMalloc");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (spoil_recordings()) return report(cudaErrorStreamCaptureUnsupported);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  if (bytes > device().memory - std::min(in_use, device().memory)) {
    return report(cudaErrorMemoryAllocation);
  }
  const size_t whole = kGuard + (bytes + kGuard - 1) / kGuard * kGuard + kGuard;
  auto* memory = static_cast<char*>(std::aligned_alloc(kGuard, whole));
  if (memory == nullptr) return report(cudaErrorMemoryAllocation);
  std::memset(memory, kGuardByte, whole);
  std::memset(memory + kGuard, 0xFF, bytes);
  ASAN_POISON_MEMORY_REGION(memory, kGuard);
  ASAN_POISON_MEMORY_REGION(memory + kGuard + bytes, whole - kGuard - bytes);
  allocations()[memory + kGuard] = {bytes, whole};
  in_use += bytes;
  *pointer = memory + kGuard;
  return cudaSuccess;
}

// Waits for the device, as the runtime does.
cudaError_t cudaFree(void* pointer) {
  const Call call("cudaFree");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (pointer == nullptr) return cudaSuccess;
  if (spoil_recordings()) return report(cudaErrorStreamCaptureUnsupported);
  run_all_quietly();
  const auto found = allocations().find(static_cast<char*>(pointer));
  if (found == allocations().end()) return report(cudaErrorInvalidValue);
  char* memory = static_cast<char*>(pointer) - kGuard;
  ASAN_UNPOISON_MEMORY_REGION(memory, found->second.whole);
  std::memset(memory, 0xFF, found->second.whole);
  in_use -= found->second.bytes;
  allocations().erase(found);
  std::free(memory);
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
  const Call call("cudaMallocHost");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (spoil_recordings()) return report(cudaErrorStreamCaptureUnsupported);
  *pointer = nullptr;
  if (bytes == 0) return cudaSuccess;
  void* memory = std::malloc(bytes);
  if (memory == nullptr) return report(cudaErrorMemoryAllocation);
  std::memset(memory, 0xFF, bytes);
  host_allocations().insert(memory);
  *pointer = memory;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  const Call call("cudaFreeHost");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (pointer == nullptr) return cudaSuccess;
  run_all_quietly();
  if (host_allocations().erase(pointer) == 0) return report(cudaErrorInvalidValue);
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  const Call call("cudaMemGetInfo");
  if (call.failure() != cudaSuccess) return report(call.failure());
  *total = device().memory;
  *free = device().memory - std::min(in_use, device().memory);
  return cudaSuccess;
}

// The side of a copy that must be device memory lies in one allocation; the other touches none.
static bool side_is_right(const void* address, size_t bytes, bool on_device) {
  return on_device ? in_device_memory(address, bytes) : !touches_device_memory(address, bytes);
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const Call call("cudaMemcpyAsync");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (bytes == 0) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const auto right = [=] {
    return kind == cudaMemcpyDefault ||
           (side_is_right(to, bytes, to_device) && side_is_right(from, bytes, from_device));
  };
  if (!right()) return report(cudaErrorInvalidValue);
  return report(enqueue(stream, [=] {
    if (!right()) throw KernelError("cudaMemcpyAsync: device memory was freed before the copy ran");
    std::memmove(to, from, bytes);
    end_overlap();
  }));
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  const Call call("cudaMemsetAsync");
  if (call.failure() != cudaSuccess) return report(call.failure());
  if (bytes == 0) return cudaSuccess;
  if (!in_device_memory(to, bytes)) return report(cudaErrorInvalidValue);
  return report(enqueue(stream, [=] {
    if (!in_device_memory(to, bytes)) {
      throw KernelError("cudaMemsetAsync: device memory was freed before it ran");
    }
    std::memset(to, value, bytes);
    end_overlap();
  }));
}

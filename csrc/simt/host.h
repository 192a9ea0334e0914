// The host's side of the simulated device: what the CUDA runtime's functions (include/) work on.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <mutex>
#include <string>

#include "simt/launch.h"

namespace gpt2f::simt {

struct Device {
  int count = 1;
  cudaError_t missing = cudaSuccess;  // what every call returns where there is no driver or device
  int major = 9;
  int minor = 0;
  int compiled_for = 0;  // capability that the kernels' code is of, e.g. 80; 0: the device's own
  size_t memory = size_t{8} << 30;
};
Device& device();
// Puts another device in its place. Whoever keeps facts about it must forget them.
void change_device(const Device& device);

// All functions of the runtime take this lock: the simulated device has one user at a time.
std::recursive_mutex& runtime_lock();

// Every function of the runtime returns through here, so that cudaGetLastError knows.
cudaError_t report(cudaError_t error);

// Makes the call number `skip` + 1 of a function of the runtime return an error, once.
void fail_next(const std::string& function, cudaError_t error, int skip);
void forget_failures();

// Begins a function of the runtime: holds the lock, and knows whether it is to fail.
class Call {
 public:
  explicit Call(const char* function);
  cudaError_t failure() const { return failure_; }

 private:
  std::lock_guard<std::recursive_mutex> lock_;
  cudaError_t failure_;
};

// Work of a stream, with its arguments by value, so that it can be recorded and run again.
using Task = std::function<void()>;
cudaError_t enqueue(cudaStream_t stream, Task task);
// Runs everything that waits on any stream. Errors are kept and thrown by the next wait.
void run_all_quietly();
// True while any stream records; the recording is then worth nothing, as on the device.
bool spoil_recordings();

// Whether [address, address + bytes) lies in one device allocation.
bool in_device_memory(const void* address, size_t bytes);
// Whether it touches one.
bool touches_device_memory(const void* address, size_t bytes);
// Throws KernelError if what `writer` did has changed bytes around a device allocation.
void check_guards(const char* writer);
size_t device_bytes_in_use();
// "byte 12 of a device buffer of 64 bytes", or the address itself.
std::string device_place(const void* address);

}  // namespace gpt2f::simt

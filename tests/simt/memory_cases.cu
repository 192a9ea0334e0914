// Memory, planned failures, limits and traffic of the simulated CUDA runtime.
#include <cstring>

#include "cuda/device.cuh"
#include "cuda/launch.h"
#include "runtime_cases.h"
#include "simt/host.h"
#include "simt/race.h"

namespace gpt2f::cuda {
namespace {

KERNEL touch_dynamic(float* out, int count) {
  DYNAMIC_SHARED(float, scratch);
  wait_for_previous();
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kRow) scratch[i] = 1.0f;
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
  std::vector<float> out(kRow);
  const auto run = [&](int kilobytes) {
    launch("touch_dynamic", touch_dynamic, Grid{1}, kRow, kilobytes * 1024, nullptr, out.data(),
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
  config.blockDim = dim3(kRow);
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
  std::vector<float> out(kRow);
  launch("never_waits", never_waits, Grid{1}, kRow, 0, nullptr, out.data());
  EXPECT(out == std::vector<float>(kRow, 1.0f));
  try {
    launch("touch_dynamic", touch_dynamic, Grid{1}, kRow, 65 * 1024, nullptr, out.data(), 64);
    return "sm_75 granted 65 KB";
  } catch (const Error&) {
  }
  simt::change_device({});
  launch_cache().forget();
  try {
    launch("never_waits", never_waits, Grid{1}, kRow, 0, nullptr, out.data());
    return "a kernel need not wait";
  } catch (const simt::KernelError&) {
  }
  EXPECT(simt::take_races().empty() != simt::instrumented);  // its stores
  return "";
}

// Code for 8.0 on a device of 11.0, where a driver compiles it: nothing waits, so nothing overlaps.
std::string older_code() {
  simt::Device thor;
  thor.major = 11;
  thor.compiled_for = 80;
  simt::change_device(thor);
  launch_cache().forget();
  Setting s;
  add_to(s.row, 1.0f, 1, nullptr);
  launch("never_waits", never_waits, Grid{1}, kRow, 0, nullptr, s.row);
  EXPECT(simt::take_races().empty());
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = config.blockDim = dim3(1);
  config.attrs = &attribute;
  config.numAttrs = 1;
  float* row = s.row;
  void* pointers[] = {&row};
  try {
    cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(never_waits), pointers);
    cudaDeviceSynchronize();
    return "code that cannot wait may overlap";
  } catch (const simt::KernelError&) {
  }
  simt::take_races();
  simt::change_device({});
  launch_cache().forget();
  return "";
}

// A kernel whose attributes cannot be had is not launched, and asked about again.
std::string unknown_attributes() {
  launch_cache().forget();
  std::vector<float> out(kRow);
  const auto run = [&] {
    launch("never_waits", never_waits, Grid{1}, kRow, 0, nullptr, out.data());
  };
  simt::fail_next("cudaFuncGetAttributes", cudaErrorUnknown, 0);
  try {
    run();
    return "launched";
  } catch (const Error& error) {
    EXPECT(std::strstr(error.what(), "never_waits: cudaErrorUnknown") != nullptr);
  }
  try {
    run();
    return "the second launch does not overlap";
  } catch (const simt::KernelError&) {
  }
  simt::take_races();
  return "";
}

// Bytes that a launch moves; only the race build counts.
std::string traffic() {
  if (!simt::instrumented) return "";
  alignas(16) static uint4 in[2 * kRow], out[kRow];
  simt::track(in, sizeof(in));
  simt::take_traffic();
  launch("copies_twice", copies_twice, Grid{1}, kRow, 0, nullptr, in, out);
  std::vector<simt::Traffic> counted = simt::take_traffic();
  EXPECT(counted.size() == 1 && counted[0].kernel == "copies_twice");
  EXPECT(counted[0].loaded == 2 * 16 * kRow && counted[0].loaded_once == 16 * kRow);
  EXPECT(counted[0].stored == 0 && counted[0].stored_once == 0);
  simt::track_nothing();
  Setting s;  // device allocations count by themselves
  add_to(s.row, 1.0f, 1, nullptr);
  add_to(s.row, 1.0f, 2, nullptr);
  counted = simt::take_traffic();
  EXPECT(counted.size() == 2 && counted[0].loaded_once == static_cast<int64_t>(kBytes));
  EXPECT(counted[1].stored == 2 * static_cast<int64_t>(kBytes));
  EXPECT(counted[1].stored_once == static_cast<int64_t>(kBytes));
  EXPECT(!simt::take_races().empty());  // two blocks that add to one row
  return "";
}

}  // namespace

RuntimeCases memory_cases() {
  return {
      {"fresh_memory_is_poisoned", fresh_memory_is_poisoned},
      {"copies_are_checked", copies_are_checked},
      {"planned_failures", planned_failures},
      {"shared_limits", shared_limits},
      {"older_devices", older_devices},
      {"older_code", older_code},
      {"unknown_attributes", unknown_attributes},
      {"traffic", traffic},
  };
}

}  // namespace gpt2f::cuda

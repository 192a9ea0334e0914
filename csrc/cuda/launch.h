// Launching kernels. Errors name the kernel and what CUDA said.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>

#include "core/error.h"
#if defined(GPT2_FAST_SIMT)
#include "simt/launch.h"
#endif

namespace gpt2f::cuda {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would report it again
  throw Error(status == cudaErrorMemoryAllocation ? ErrorKind::kCapacity : ErrorKind::kDevice,
              cat(what, ": ", cudaGetErrorName(status), ": ", cudaGetErrorString(status)));
}

struct Grid {
  int64_t x = 1;
  int64_t y = 1;
  int64_t z = 1;
};

// Facts about devices that every launch needs, asked of the driver once.
class LaunchCache {
 public:
  LaunchCache() { overlaps_.fill(-1); }

  // Whether a kernel may start while the previous one of its stream ends.
  bool overlaps(int device) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (device >= kDevices) return false;
    int8_t& known = overlaps_[static_cast<size_t>(device)];
    if (known < 0) {
      int major = 0;
      check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
                 "cudaDeviceGetAttribute");
      known = major >= 9;
    }
    return known != 0;
  }

  // More than 48 KB of dynamic shared memory must be asked for, once per kernel and device.
  void allow_shared(int device, const void* kernel, const char* name, int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int64_t& largest = largest_.try_emplace({device, kernel}, kPlainShared).first->second;
    if (bytes <= largest) return;
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               name);
    largest = bytes;
  }

  // For tests, where the device can become another one.
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    overlaps_.fill(-1);
    largest_.clear();
  }

 private:
  static constexpr int64_t kPlainShared = 48 * 1024;
  static constexpr int kDevices = 64;
  std::mutex mutex_;
  std::array<int8_t, kDevices> overlaps_;  // -1: not asked yet
  std::map<std::pair<int, const void*>, int64_t> largest_;
};

inline LaunchCache& launch_cache() {
  static LaunchCache cache;
  return cache;
}

inline void launch_pointers(const char* name, const void* kernel, Grid grid, int threads,
                            int64_t shared_bytes, void* stream, void** arguments) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), name);
  launch_cache().allow_shared(device, kernel, name, shared_bytes);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  const dim3 block(static_cast<unsigned>(threads));
  const auto bytes = static_cast<size_t>(shared_bytes);
  const auto in_order = static_cast<cudaStream_t>(stream);
  if (!launch_cache().overlaps(device)) {
    check_cuda(cudaLaunchKernel(kernel, blocks, block, arguments, bytes, in_order), name);
    return;
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = block;
  config.dynamicSmemBytes = bytes;
  config.stream = in_order;
  config.attrs = &attribute;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), name);
}

// launch("ln_qkv", ln_qkv_kernel<T, 2>, Grid{blocks}, 256, shared_bytes, lane.stream, arguments...)
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, int threads,
            int64_t shared_bytes, void* stream, Arguments&&... arguments) {
  std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
#if defined(GPT2_FAST_SIMT)
  simt::register_kernel(name, kernel);
#endif
  std::apply(
      [&](Parameters&... value) {
        void* pointers[] = {static_cast<void*>(&value)..., nullptr};
        launch_pointers(name, reinterpret_cast<const void*>(kernel), grid, threads, shared_bytes,
                        stream, pointers);
      },
      values);
}

}  // namespace gpt2f::cuda

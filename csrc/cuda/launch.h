// Launching kernels. Errors name the kernel and what CUDA said.
#pragma once

#include <cuda_runtime.h>

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

// Facts about kernels that every launch needs, asked of the driver once for each device.
class LaunchCache {
 public:
  // Makes a kernel ready to be launched with so much dynamic shared memory: more than 48 KB must be
  // asked for. Gives whether the kernel may start while the previous one of its stream ends.
  bool prepare(int device, const void* kernel, const char* name, int64_t shared_bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto at = facts_.find({device, kernel});
    if (at == facts_.end()) {
      const Facts asked{waits_for_previous(kernel, name)};
      at = facts_.emplace(std::pair(device, kernel), asked).first;
    }
    Facts& facts = at->second;
    if (shared_bytes > facts.most_shared) {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 name);
      facts.most_shared = shared_bytes;
    }
    return facts.overlaps;
  }

  // For tests, where the device can become another one.
  void forget() {
    const std::lock_guard<std::mutex> lock(mutex_);
    facts_.clear();
  }

 private:
  struct Facts {
    bool overlaps;
    int64_t most_shared = 48 * 1024;
  };

  // A driver may compile a kernel's code for compute capability 8.0 on a device of 9.0 and newer.
  // wait_for_previous is empty then, whatever the device can do.
  static bool waits_for_previous(const void* kernel, const char* name) {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, kernel), name);
    return attributes.ptxVersion >= 90;
  }

  std::mutex mutex_;
  std::map<std::pair<int, const void*>, Facts> facts_;
};

inline LaunchCache& launch_cache() {
  static LaunchCache cache;
  return cache;
}

inline void launch_pointers(const char* name, const void* kernel, Grid grid, int threads,
                            int64_t shared_bytes, void* stream, void** arguments) {
  int device = 0;
  check_cuda(cudaGetDevice(&device), name);
  const bool overlaps = launch_cache().prepare(device, kernel, name, shared_bytes);
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
  const dim3 block(static_cast<unsigned>(threads));
  const auto bytes = static_cast<size_t>(shared_bytes);
  const auto in_order = static_cast<cudaStream_t>(stream);
  if (!overlaps) {
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

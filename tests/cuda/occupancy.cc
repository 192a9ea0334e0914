// Prints what NVIDIA's own formula says of resident blocks, a line for each case on standard input:
// compute capability (90), registers, threads, static and dynamic shared memory, limit of a block.
// Facts of processors come from the table of test_gates.py, rules of allocation from the header.
#include <cuda_occupancy.h>

#include <cstdio>

int main() {
  int capability, registers, threads, warps, shared, reserved, block_shared;
  unsigned long used;
  while (std::scanf("%d %d %d %lu %d %d %d %d", &capability, &registers, &threads, &used, &warps,
                    &shared, &reserved, &block_shared) == 8) {
    cudaOccDeviceProp device;
    device.computeMajor = capability / 10;
    device.computeMinor = capability % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = warps * 32;
    device.regsPerBlock = 65536;
    device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerMultiprocessor = static_cast<size_t>(shared);
    device.numSms = 100;
    device.sharedMemPerBlockOptin = static_cast<size_t>(block_shared);
    device.reservedSharedMemPerBlock = static_cast<size_t>(reserved);
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = 0;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = static_cast<size_t>(block_shared);
    function.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_SHARED;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, used);
    std::printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor
                                                  : -static_cast<int>(error));
  }
}

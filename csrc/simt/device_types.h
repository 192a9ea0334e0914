// What kernels and the runtime of simt share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <source_location>

// The names of CUDA, which kernels use.
extern dim3 blockDim;
extern dim3 gridDim;

namespace gpt2f::simt {

using Where = std::source_location;

// Where the running thread stands in the grid.
struct Index {
  uint3 thread;
  uint3 block;
};
extern Index* here;

// In the race build the compiler reports every load; these are not the kernel's.
#if defined(__SANITIZE_THREAD__)
#define GPT2F_NOT_REPORTED __attribute__((no_sanitize("thread"), noinline))
#else
#define GPT2F_NOT_REPORTED
#endif
GPT2F_NOT_REPORTED inline uint3 thread_index() { return here->thread; }
GPT2F_NOT_REPORTED inline uint3 block_index() { return here->block; }
GPT2F_NOT_REPORTED inline uint4 fetch(const void* address) {
  return *static_cast<const uint4*>(address);
}
GPT2F_NOT_REPORTED inline void put(void* address, const uint4& value) {
  *static_cast<uint4*>(address) = value;
}

enum class Collective : uint8_t {
  kSyncWarp,
  kShuffle,
  kBallot,
  kSum,
  kMax,
  kMmaBf16,
  kMmaFp16,
  kLdmatrix,
  kLdmatrixTransposed,
};

// What the 32 lanes bring to a collective, and one result for all.
struct Exchange {
  uint64_t lane[32];
  uint32_t result;
};

struct MmaOperands {
  float* c;
  const uint32_t* a;
  uint32_t b0, b1;
};
struct LdmatrixOperands {
  uint32_t* r;
  const void* row;
};

// All lanes of the warp bring a word; returns when all have come. The exchange holds until this
// lane's next collective.
const Exchange& meet(Collective kind, uint64_t word, const Where& where);

void sync_block(const Where& where);
void wait_for_previous();
void fence();
int atomic_add(int* address, int value);
void* shared_array(const void* key, const char* name, size_t bytes);
void* dynamic_shared();
void copy_async(void* to, const void* from, bool valid, const Where& where);
void commit_copies();
void wait_copies(uint32_t keep);
[[noreturn]] void misaligned(const char* what, const void* address, const Where& where);
// An access that the compiler's instrumentation does not see, or might leave out.
void note_access(const void* address, size_t bytes, bool store, const Where& where);

}  // namespace gpt2f::simt

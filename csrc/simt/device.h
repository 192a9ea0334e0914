// The names of cuda/device.cuh with C++ bodies. A thread of a kernel is a fiber; it runs until it
// must wait for others.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>

#include "simt/device_types.h"
#include "simt/half.h"

#define threadIdx (::gpt2f::simt::thread_index())
#define blockIdx (::gpt2f::simt::block_index())

#define DEVICE inline
#define KERNEL void
#define LAUNCH_BOUNDS(threads, blocks)
#define SHARED(T, name, dims)                                   \
  using name##_shared_type = T dims;                            \
  static const char name##_shared_key = 0;                      \
  name##_shared_type& name = *static_cast<name##_shared_type*>( \
      ::gpt2f::simt::shared_array(&name##_shared_key, #name, sizeof(name##_shared_type)))
#define DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::gpt2f::simt::dynamic_shared())

namespace gpt2f::cuda {

using simt::Collective;
using simt::Where;

DEVICE void sync_block(const Where& at = Where::current()) { simt::sync_block(at); }
DEVICE void sync_warp(const Where& at = Where::current()) {
  simt::meet(Collective::kSyncWarp, 0, at);
}
DEVICE void fence_device() { simt::fence(); }
DEVICE int atomic_add(int* address, int value) { return simt::atomic_add(address, value); }

// ---- Numbers -----------------------------------------------------------------------------------

DEVICE float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
DEVICE uint32_t mul_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) {
    y |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return y;
}
DEVICE uint32_t logic_or_and(uint32_t x, uint32_t mask, uint32_t or_) { return (x & mask) | or_; }
DEVICE float exp2_fast(float x) {
  const float y = ::exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
DEVICE float exp_accurate(float x) { return ::expf(x); }
DEVICE float log_accurate(float x) { return ::logf(x); }
DEVICE float rsqrt_accurate(float x) { return 1.0f / ::sqrtf(x); }

template <typename T>
DEVICE uint16_t from_float(float x) {
  return kIsBf16<T> ? simt::bf16_from_float(x) : simt::fp16_from_float(x);
}
template <typename T>
DEVICE float to_float(uint16_t bits) {
  return kIsBf16<T> ? simt::bf16_to_float(bits) : simt::fp16_to_float(bits);
}
template <typename T>
DEVICE uint32_t pack2(float low, float high) {
  return from_float<T>(low) | static_cast<uint32_t>(from_float<T>(high)) << 16;
}
template <typename T>
DEVICE float2 unpack2(uint32_t word) {
  return {to_float<T>(static_cast<uint16_t>(word)), to_float<T>(static_cast<uint16_t>(word >> 16))};
}
DEVICE uint32_t half2_add(uint32_t a, uint32_t b) { return simt::fp16x2_fma(a, 0x3C003C00, b); }
DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) { return simt::fp16x2_fma(a, b, c); }

// ---- Warp --------------------------------------------------------------------------------------

template <typename V>
DEVICE V shuffle(V value, int lane, const Where& at = Where::current()) {
  static_assert(sizeof(V) == 4);
  const simt::Exchange& all = simt::meet(Collective::kShuffle, std::bit_cast<uint32_t>(value), at);
  return std::bit_cast<V>(static_cast<uint32_t>(all.lane[lane & 31]));
}
template <typename V>
DEVICE V shuffle_xor(V value, int mask, const Where& at = Where::current()) {
  return cuda::shuffle(value, static_cast<int>(threadIdx.x & 31) ^ mask, at);
}
DEVICE uint32_t ballot(bool predicate, const Where& at = Where::current()) {
  return simt::meet(Collective::kBallot, predicate, at).result;
}
DEVICE float warp_sum(float value, const Where& at = Where::current()) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>(simt::meet(Collective::kSum, bits, at).result);
}
DEVICE float warp_max(float value, const Where& at = Where::current()) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return std::bit_cast<float>(simt::meet(Collective::kMax, bits, at).result);
}

template <typename T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                const Where& at = Where::current()) {
  const simt::MmaOperands mine{c, a, b0, b1};
  simt::meet(kIsBf16<T> ? Collective::kMmaBf16 : Collective::kMmaFp16,
             reinterpret_cast<uint64_t>(&mine), at);
}
DEVICE void load_matrices(uint32_t* r, const void* row, Collective kind, const Where& at) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::misaligned("ldmatrix", row, at);
  simt::note_access(row, 16, false, at);
  const simt::LdmatrixOperands mine{r, row};
  simt::meet(kind, reinterpret_cast<uint64_t>(&mine), at);
}
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row, const Where& at = Where::current()) {
  load_matrices(r, row, Collective::kLdmatrix, at);
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row,
                              const Where& at = Where::current()) {
  load_matrices(r, row, Collective::kLdmatrixTransposed, at);
}

// ---- Memory ------------------------------------------------------------------------------------

// The race build counts them one by one, also those that the compiler would merge.
DEVICE void check_access(const char* what, const void* address, bool store, const Where& at) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) simt::misaligned(what, address, at);
#if defined(__SANITIZE_THREAD__)
  simt::note_access(address, 16, store, at);
#else
  (void)store;
#endif
}
DEVICE uint4 load16(const void* address, const Where& at = Where::current()) {
  check_access("load16", address, false, at);
  return simt::fetch(address);
}
DEVICE uint4 load_global16(const void* address, const Where& at = Where::current()) {
  check_access("load_global16", address, false, at);
  return simt::fetch(address);
}
DEVICE uint4 load_stream16(const void* address, const Where& at = Where::current()) {
  check_access("load_stream16", address, false, at);
  return simt::fetch(address);
}
DEVICE void store16(void* address, uint4 value, const Where& at = Where::current()) {
  check_access("store16", address, true, at);
  simt::put(address, value);
}
DEVICE void cp_async16(void* shared, const void* global, bool valid,
                       const Where& at = Where::current()) {
  simt::copy_async(shared, global, valid, at);
}
DEVICE void cp_async_commit() { simt::commit_copies(); }
template <int N>
DEVICE void cp_async_wait() {
  simt::wait_copies(N);
}

DEVICE void wait_for_previous() { simt::wait_for_previous(); }
DEVICE void allow_next() {}

}  // namespace gpt2f::cuda

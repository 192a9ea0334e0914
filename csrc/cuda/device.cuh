// What kernels may use of the device: the only intrinsics and inline PTX of this project. Under
// nvcc each function is the instruction that its comment names; with GPT2_FAST_SIMT the same names
// have C++ bodies (simt/device.h), which run the kernels on the host and check them.
//
// Blocks are one-dimensional and a multiple of 32 threads. Warp-wide functions (mma, ldmatrix,
// shuffles, ballot, sums, sync_warp) must be reached by all 32 lanes together. Global memory that a
// kernel of the same step wrote must not be marked __restrict__: the compiler would read it through
// the non-coherent path, which overlapping kernels (wait_for_previous) do not refresh.
#pragma once

#include <cstdint>

namespace gpt2f::cuda {

struct Bf16 {};
struct Fp16 {};
template <typename T>
inline constexpr bool kIsBf16 = false;
template <>
inline constexpr bool kIsBf16<Bf16> = true;

}  // namespace gpt2f::cuda

#if defined(GPT2_FAST_SIMT)
#include "simt/device.h"
#else

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define KERNEL __global__ void
#define LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define SHARED(T, name, dims) __shared__ __align__(16) T name dims
#define DYNAMIC_SHARED(T, name)                                        \
  extern __shared__ __align__(128) unsigned char gpt2f_shared_bytes[]; \
  T* name = reinterpret_cast<T*>(gpt2f_shared_bytes)

namespace gpt2f::cuda {

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void fence_device() { __threadfence(); }
DEVICE int atomic_add(int* address, int value) { return atomicAdd(address, value); }

// ---- Numbers -----------------------------------------------------------------------------------

DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE uint32_t mul_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }
// Four bytes of b:a, chosen by the nibbles of `selector` (0 ... 7).
DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}
// (x & mask) | or_ in one instruction.
DEVICE uint32_t logic_or_and(uint32_t x, uint32_t mask, uint32_t or_) {
  uint32_t y;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(y) : "r"(x), "r"(mask), "r"(or_));
  return y;
}
// 2^x to 2 ulp; subnormal results are zero.
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float exp_accurate(float x) { return expf(x); }
DEVICE float log_accurate(float x) { return logf(x); }
DEVICE float rsqrt_accurate(float x) { return __frcp_rn(__fsqrt_rn(x)); }

// Rounds to the nearest, ties to even; NaN becomes 0x7FFF. sm_75 rounds to bfloat16 in software.
template <typename T>
DEVICE uint16_t from_float(float x) {
  uint16_t bits;
  if constexpr (!kIsBf16<T>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  } else {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
#else
    const uint32_t word = __float_as_uint(x);
    bits = x != x ? 0x7FFF : static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
#endif
  }
  return bits;
}

template <typename T>
DEVICE float to_float(uint16_t bits) {
  if constexpr (kIsBf16<T>) {
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
  } else {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
}

template <typename T>
DEVICE uint32_t pack2(float low, float high) {
#if __CUDA_ARCH__ >= 800
  uint32_t word;
  if constexpr (kIsBf16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return from_float<T>(low) | static_cast<uint32_t>(from_float<T>(high)) << 16;
#endif
}

template <typename T>
DEVICE float2 unpack2(uint32_t word) {
  if constexpr (kIsBf16<T>) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
  } else {
    return {to_float<T>(static_cast<uint16_t>(word)),
            to_float<T>(static_cast<uint16_t>(word >> 16))};
  }
}

// Two fp16 numbers at a time.
DEVICE uint32_t half2_add(uint32_t a, uint32_t b) {
  uint32_t y;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}
DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t y;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
  return y;
}

// ---- Warp --------------------------------------------------------------------------------------

template <typename V>
DEVICE V shuffle(V value, int lane) {
  return __shfl_sync(0xFFFFFFFFu, value, lane);
}
template <typename V>
DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }

// Butterflies over distances 16, 8, 4, 2, 1: one order, and every lane gets the same bits.
DEVICE float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}
DEVICE float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = fmaxf(value, shuffle_xor(value, distance));
  }
  return value;
}

// c += a b, m16n8k16, a by rows, b by columns. With lane = 4 g + t:
//   a0 = A[g][2t, 2t+1]    a1 = A[g+8][2t, 2t+1]    a2 = A[g][2t+8, 2t+9]    a3 = A[g+8][2t+8,
//   2t+9] b0 = B[2t, 2t+1][g]    b1 = B[2t+8, 2t+9][g]    c0, c1 = C[g][2t, 2t+1]  c2, c3 =
//   C[g+8][2t, 2t+1]
// sm_75 has m16n8k8 for fp16 only: two of them. It has none for bf16, and the engine refuses bf16
// there. Volatile, so that no compiler moves one into a branch that some lanes do not take.
template <typename T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kIsBf16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  if constexpr (kIsBf16<T>) {
    __trap();
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
  }
#endif
}

DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8 x 8 matrices of 16-bit elements. Lanes 8 i ... 8 i + 7 give the addresses of the rows of
// matrix i; lane 4 g + t gets in r[i] the elements [g][2t, 2t+1], transposed [2t, 2t+1][g].
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// ---- Memory ------------------------------------------------------------------------------------

// 16 bytes that are read once and that nothing writes while the model runs: weights.
// Volatile and, where kernels overlap, not .nc: ptxas moves .nc loads behind griddepcontrol.wait.
DEVICE uint4 load_stream16(const void* address) {
  uint4 v;
#if __CUDA_ARCH__ >= 900
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
#elif __CUDA_ARCH__ >= 800
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
#else
  asm("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(address));
#endif
  return v;
}
DEVICE uint4 load16(const void* address) { return *static_cast<const uint4*>(address); }
// The same where the compiler cannot see that the address, read from a table, is global memory.
DEVICE uint4 load_global16(const void* address) {
  __builtin_assume(__isGlobal(address));
  return *static_cast<const uint4*>(address);
}
DEVICE void store16(void* address, uint4 value) { *static_cast<uint4*>(address) = value; }

// Asynchronous copy of 16 bytes to shared memory, zeros if not valid. Copies belong to the group
// that the thread commits next; wait<N> returns when all but its N newest groups have landed, and
// other threads see them after a barrier. On sm_75 a plain copy.
DEVICE void cp_async16(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(valid ? 16 : 0)
      : "memory");
#else
  store16(shared, valid ? load16(global) : uint4{0, 0, 0, 0});
#endif
}
DEVICE void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int N>
DEVICE void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Programmatic dependent launch: every thread waits once, after it has asked for its weights and
// before it touches anything that a kernel writes.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace gpt2f::cuda
#endif  // GPT2_FAST_SIMT

namespace gpt2f::cuda {

DEVICE int lane_id() { return static_cast<int>(threadIdx.x & 31); }
DEVICE int warp_id() { return static_cast<int>(threadIdx.x >> 5); }

// The tanh form: x / 2 (1 + tanh u) = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3).
DEVICE float gelu(float x) {
  const float u = 0.79788456f * x * fma(0.044715f * x, x, 1.0f);
  return x / (1.0f + exp_accurate(-2.0f * u));
}

}  // namespace gpt2f::cuda

// Kernels with one fault each, and one without, to prove that the gates can fail.
#include "cuda/device.cuh"

namespace gpt2f::cuda {
namespace {

constexpr int kAhead = 8;  // loads of a lane in flight

template <int kLoads>
DEVICE void ask(uint4 (&v)[kLoads], const uint4* weights) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) v[i] = load_stream16(weights + i * 32);
}

template <int kLoads>
DEVICE void multiply(float (&c)[4], const uint4 (&v)[kLoads], const uint32_t* x) {
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    const uint32_t a[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
    mma<Fp16>(c, a, x[i * 64], x[i * 64 + 32]);
  }
}

DEVICE void finish(float* out, const float (&c)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[(blockIdx.x * blockDim.x + threadIdx.x) * 4 + i] = c[i];
}

template <typename T, int kLoads>
KERNEL LAUNCH_BOUNDS(256, 2) good(const uint4* weights, const uint32_t* x, float* out, int steps) {
  const uint4* mine = weights + (blockIdx.x * 8 + warp_id()) * steps * kLoads * 32 + lane_id();
  float c[4] = {};
  uint4 v[kLoads];
  ask(v, mine);
  wait_for_previous();
#pragma unroll 1
  for (int s = 1; s < steps; ++s) {
    uint4 next[kLoads];
    ask(next, mine += kLoads * 32);
    multiply(c, v, x + lane_id());
    x += kLoads * 64;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = next[i];
  }
  multiply(c, v, x + lane_id());
  finish(out, c);
}

KERNEL LAUNCH_BOUNDS(1024, 1) spill(const float* x, float* out) {
  float v[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
  sync_block();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 96; ++i) sum = fma(v[i], v[95 - i], sum);
#pragma unroll
  for (int i = 0; i < 96; ++i) out[i * 1024 + threadIdx.x] = v[i] + sum;
}

KERNEL LAUNCH_BOUNDS(128, 1) local_array(const float* x, const int* order, float* out, int n) {
  float v[64] = {};
  for (int i = 0; i < n; ++i) v[order[i] & 63] += x[i * 128 + threadIdx.x];
#pragma unroll
  for (int i = 0; i < 64; ++i) out[i * 128 + threadIdx.x] = v[i];
}

KERNEL LAUNCH_BOUNDS(128, 1) float_atomic(const float* x, float* out) {
  atomicAdd(out, x[threadIdx.x]);
}

KERNEL LAUNCH_BOUNDS(128, 1) shared_float_atomic(const float* x, float* out) {
  SHARED(float, sum, [1]);
  if (threadIdx.x == 0) sum[0] = 0;
  sync_block();
  atomicAdd(sum, x[threadIdx.x]);
  sync_block();
  out[threadIdx.x] = sum[0];
}

KERNEL LAUNCH_BOUNDS(128, 1) int_atomic(int* tickets) { atomic_add(tickets, 1); }

KERNEL LAUNCH_BOUNDS(256, 2) narrow(const uint32_t* weights, const uint32_t* x, float* out, int n) {
  float c[4] = {};
  for (int s = 0; s < n; ++s) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = __ldg(weights + (s * 4 + i) * 32 + lane_id());
    mma<Fp16>(c, a, x[lane_id()], x[lane_id() + 32]);
  }
  finish(out, c);
}

KERNEL LAUNCH_BOUNDS(128, 1) narrow_copy(const float* x, float* out) {
  SHARED(float, held, [128]);
  const uint32_t to = shared_address(held + threadIdx.x);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(x + threadIdx.x));
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  out[threadIdx.x] = held[threadIdx.x ^ 1];
}

// Weights of one load at a time: the next is asked for when the last has been used.
KERNEL LAUNCH_BOUNDS(256, 2)
    one_at_a_time(const uint4* weights, const uint32_t* x, float* out, int steps) {
  float c[4] = {};
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    uint4 v[1];
    ask(v, weights + s * 32 + lane_id());
    multiply(c, v, x + lane_id());
  }
  finish(out, c);
}

// Waits for the previous kernel before it asks for weights.
KERNEL LAUNCH_BOUNDS(256, 2) waits_first(const uint4* weights, const uint32_t* x, float* out) {
  float c[4] = {};
  uint4 v[kAhead];
  wait_for_previous();
  ask(v, weights + lane_id());
  multiply(c, v, x + lane_id());
  finish(out, c);
}

// Products by FMA, and so many instructions a byte that they and not the memory set the pace.
KERNEL LAUNCH_BOUNDS(256, 2) no_mma(const uint4* weights, const float* x, float* out, int steps) {
  float c[4] = {};
#pragma unroll 1
  for (int s = 0; s < steps; ++s) {
    const uint4 v = load_stream16(weights + s * 32 + lane_id());
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int b = 0; b < 32; b += 4) {
        c[i] = fma(static_cast<float>(words[i] >> b & 15), x[(i * 8 + b / 4) * 32], c[i]);
      }
    }
  }
  finish(out, c);
}

}  // namespace

void launch_planted(void* p) {
  float* const out = static_cast<float*>(p);
  const float* const x = out;
  const uint4* const w = static_cast<const uint4*>(p);
  const uint32_t* const u = static_cast<const uint32_t*>(p);
  good<Fp16, kAhead><<<1, 256>>>(w, u, out, 4);
  spill<<<1, 1024>>>(x, out);
  local_array<<<1, 128>>>(x, static_cast<const int*>(p), out, 4);
  float_atomic<<<1, 128>>>(x, out);
  shared_float_atomic<<<1, 128>>>(x, out);
  int_atomic<<<1, 128>>>(static_cast<int*>(p));
  narrow<<<1, 256>>>(u, u, out, 4);
  one_at_a_time<<<1, 256>>>(w, u, out, 4);
  narrow_copy<<<1, 128>>>(x, out);
  waits_first<<<1, 256>>>(w, u, out);
  no_mma<<<1, 256>>>(w, x, out, 4);
}

}  // namespace gpt2f::cuda

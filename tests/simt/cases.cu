// Kernels with planted faults inside one block: barriers, copies, bounds, warps.
#include "cases.h"

#include <cuda_runtime.h>

#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

// ---- Block barriers ----------------------------------------------------------------------------

KERNEL reverse(const float* in, float* out, bool faulty) {
  SHARED(float, row, [kThreads]);
  wait_for_previous();
  row[threadIdx.x] = in[threadIdx.x];
  if (!faulty) sync_block();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

std::vector<float> ramp(int count) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i);
  return values;
}

std::string missing_sync_block(bool faulty) {
  const std::vector<float> in = ramp(kThreads);
  std::vector<float> out(in.size()), mirrored(in.rbegin(), in.rend());
  launch("reverse", reverse, Grid{1}, kThreads, 0, nullptr, in.data(), out.data(), faulty);
  return right_if(out == mirrored);
}

KERNEL branches(float* out, bool faulty) {
  SHARED(float, row, [kThreads]);
  wait_for_previous();
  row[threadIdx.x] = 1.0f;
  if (faulty && warp_id() == 0) {
    sync_block();
  } else {
    sync_block();
  }
  out[threadIdx.x] = row[threadIdx.x ^ 32];
}

std::string divergent_barrier(bool faulty) {
  std::vector<float> out(kThreads);
  launch("branches", branches, Grid{1}, kThreads, 0, nullptr, out.data(), faulty);
  return right_if(out == std::vector<float>(kThreads, 1.0f));
}

KERNEL leaves_early(float* out, bool faulty) {
  wait_for_previous();
  if (faulty && warp_id() == 3) return;
  sync_block();
  out[threadIdx.x] = 1.0f;
}

std::string barrier_after_return(bool faulty) {
  std::vector<float> out(kThreads);
  launch("leaves_early", leaves_early, Grid{1}, kThreads, 0, nullptr, out.data(), faulty);
  return right_if(out == std::vector<float>(kThreads, 1.0f));
}

KERNEL waits_for_itself(float* out, bool faulty) {
  wait_for_previous();
  float value = 1.0f;
  if (faulty && lane_id() < 16) {
    sync_block();
    value = warp_sum(value);
  } else {
    value = warp_sum(value);
    sync_block();
  }
  out[threadIdx.x] = value;
}

std::string deadlock(bool faulty) {
  std::vector<float> out(kThreads);
  launch("waits_for_itself", waits_for_itself, Grid{1}, kThreads, 0, nullptr, out.data(), faulty);
  return right_if(out == std::vector<float>(kThreads, 32.0f));
}

// ---- Asynchronous copies -----------------------------------------------------------------------

// Sums tiles of 4 floats a thread through two buffers, the next tile on its way meanwhile.
template <int kKeep, bool kBarrier>
KERNEL pipeline(const float* in, float* out, int tiles) {
  DYNAMIC_SHARED(float, buffers);
  wait_for_previous();
  const int size = 4 * kThreads, mine = 4 * static_cast<int>(threadIdx.x);
  const int other = 4 * (kThreads - 1 - static_cast<int>(threadIdx.x));
  cp_async16(buffers + mine, in + mine, true);
  cp_async_commit();
  float sum = 0.0f;
  for (int tile = 0; tile < tiles; ++tile) {
    const bool more = tile + 1 < tiles;
    const int next = (tile + 1) % 2 * size + mine;
    cp_async16(buffers + next, in + (tile + 1) * size + mine, more);
    cp_async_commit();
    cp_async_wait<kKeep>();
    sync_block();
    for (int i = 0; i < 4; ++i) sum += buffers[tile % 2 * size + other + i];
    if (kBarrier) sync_block();
  }
  out[threadIdx.x] = sum;
}

template <typename Kernel>
std::string run_pipeline(Kernel kernel) {
  constexpr int kTiles = 5, kSize = 4 * kThreads;
  alignas(16) static float in[kTiles * kSize];
  std::vector<float> out(kThreads), wanted(kThreads);
  for (int i = 0; i < kTiles * kSize; ++i) {
    in[i] = static_cast<float>(i % 61);
    wanted[static_cast<size_t>(kThreads - 1 - i % kSize / 4)] += in[i];
  }
  launch("pipeline", kernel, Grid{1}, kThreads, 8 * kSize, nullptr, in, out.data(), kTiles);
  return right_if(out == wanted);
}

std::string wait_too_lax(bool faulty) {
  return faulty ? run_pipeline(pipeline<2, true>) : run_pipeline(pipeline<1, true>);
}
std::string missing_prefetch_barrier(bool faulty) {
  return faulty ? run_pipeline(pipeline<1, false>) : run_pipeline(pipeline<1, true>);
}

// ---- Bounds ------------------------------------------------------------------------------------

KERNEL shifts(float* out, bool faulty) {
  SHARED(float, row, [kThreads]);
  wait_for_previous();
  const unsigned to = threadIdx.x + 1;
  if (faulty || to < kThreads) row[to] = 1.0f;
  if (threadIdx.x == 0) row[0] = 1.0f;
  sync_block();
  out[threadIdx.x] = row[threadIdx.x];
}

std::string shared_past_end(bool faulty) {
  std::vector<float> out(kThreads);
  launch("shifts", shifts, Grid{1}, kThreads, 0, nullptr, out.data(), faulty);
  return right_if(out == std::vector<float>(kThreads, 1.0f));
}

KERNEL fills(float* out, int count) {
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = 1.0f;
}

std::string global_past_end(bool faulty) {
  void* memory = nullptr;
  check_cuda(cudaMalloc(&memory, 400), "cudaMalloc");
  launch("fills", fills, Grid{1}, kThreads, 0, nullptr, static_cast<float*>(memory),
         faulty ? 101 : 100);
  check_cuda(cudaFree(memory), "cudaFree");
  return "";
}

KERNEL loads_odd(const float* in, float* out, bool faulty) {
  wait_for_previous();
  const uint4 v = load16(in + 4 * threadIdx.x + (faulty ? 1 : 0));
  out[threadIdx.x] = static_cast<float>(v.x);
}

std::string misaligned(bool faulty) {
  alignas(16) static float in[4 * kThreads + 4];
  std::vector<float> out(kThreads, -1.0f);
  launch("loads_odd", loads_odd, Grid{1}, kThreads, 0, nullptr, in, out.data(), faulty);
  return right_if(out == std::vector<float>(kThreads, 0.0f));
}

// ---- Warps -------------------------------------------------------------------------------------

KERNEL exchanges(float* out, bool faulty) {
  wait_for_previous();
  float value = static_cast<float>(lane_id());
  if (faulty && lane_id() < 16) {
    value = shuffle_xor(value, 1);
  } else {
    value = shuffle_xor(value, 1);
  }
  out[threadIdx.x] = value;
}

std::string shuffle_in_branches(bool faulty) {
  std::vector<float> out(32);
  launch("exchanges", exchanges, Grid{1}, 32, 0, nullptr, out.data(), faulty);
  return right_if(out[0] == 1.0f && out[31] == 30.0f);
}

KERNEL adds(float* out, bool faulty) {
  wait_for_previous();
  if (faulty && threadIdx.x == 31) return;
  out[threadIdx.x] = warp_sum(1.0f);
}

std::string missing_lane(bool faulty) {
  std::vector<float> out(32);
  launch("adds", adds, Grid{1}, 32, 0, nullptr, out.data(), faulty);
  return right_if(out == std::vector<float>(32, 32.0f));
}

// One lane's word for the others of its warp, in shared memory: sync_warp must lie between.
KERNEL passes_on(float* out, bool faulty) {
  SHARED(float, word, [kThreads / 32]);
  wait_for_previous();
  if (lane_id() == 5) word[warp_id()] = static_cast<float>(warp_id());
  if (!faulty) sync_warp();
  out[threadIdx.x] = word[warp_id()];
}

std::string missing_sync_warp(bool faulty) {
  std::vector<float> out(kThreads);
  launch("passes_on", passes_on, Grid{1}, kThreads, 0, nullptr, out.data(), faulty);
  return right_if(out[0] == 0.0f && out[127] == 3.0f);
}

}  // namespace

std::vector<Case> block_cases() {
  return {
      {"missing_sync_block", missing_sync_block},
      {"divergent_barrier", divergent_barrier},
      {"barrier_after_return", barrier_after_return},
      {"deadlock", deadlock},
      {"wait_too_lax", wait_too_lax},
      {"missing_prefetch_barrier", missing_prefetch_barrier},
      {"shared_past_end", shared_past_end},
      {"global_past_end", global_past_end},
      {"misaligned", misaligned},
      {"shuffle_in_branches", shuffle_in_branches},
      {"missing_lane", missing_lane},
      {"missing_sync_warp", missing_sync_warp},
  };
}

}  // namespace gpt2f::cuda

// Kernels with planted faults. Every check of simt has one here that only it can find.
#include "cases.h"

#include <cuda_runtime.h>

#include <vector>

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

constexpr int kThreads = 128;

// ---- Block barriers ----------------------------------------------------------------------------

KERNEL reverse(const float* in, float* out, bool faulty) {
  SHARED(float, row, [kThreads]);
  wait_for_previous();
  row[threadIdx.x] = in[threadIdx.x];
  if (!faulty) sync_block();
  out[threadIdx.x] = row[kThreads - 1 - threadIdx.x];
}

std::string right_if(bool right) { return right ? "" : "wrong numbers"; }

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

// ---- Between blocks ----------------------------------------------------------------------------

enum class Arrival { kRight, kNoBarrier, kNoFence, kNoTicket };

// The last block to arrive adds up what all have written.
KERNEL last_arriver(float* partials, float* out, int* ticket, Arrival how) {
  SHARED(int, arrived, [1]);
  wait_for_previous();
  const unsigned me = blockIdx.x * blockDim.x + threadIdx.x;
  partials[me] = 1.0f;
  if (how != Arrival::kNoFence) fence_device();
  if (how != Arrival::kNoBarrier) sync_block();
  if (threadIdx.x == 0) arrived[0] = atomic_add(ticket, 1);
  sync_block();
  const bool last = arrived[0] == static_cast<int>(gridDim.x) - 1;
  if (!last && how != Arrival::kNoTicket) return;
  fence_device();
  float sum = 0.0f;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    sum += partials[block * blockDim.x + threadIdx.x];
  }
  if (!last) return;
  out[threadIdx.x] = sum;
  if (threadIdx.x == 0) *ticket = 0;
}

std::string run_last_arriver(Arrival how) {
  constexpr int kBlocks = 5;
  std::vector<float> partials(kBlocks * kThreads), out(kThreads);
  int ticket = 0;
  launch("last_arriver", last_arriver, Grid{kBlocks}, kThreads, 0, nullptr, partials.data(),
         out.data(), &ticket, how);
  return right_if(ticket == 0 && out == std::vector<float>(kThreads, kBlocks));
}

std::string arrival_without_barrier(bool faulty) {
  return run_last_arriver(faulty ? Arrival::kNoBarrier : Arrival::kRight);
}
std::string arrival_without_fence(bool faulty) {
  return run_last_arriver(faulty ? Arrival::kNoFence : Arrival::kRight);
}
std::string merge_without_ticket(bool faulty) {
  return run_last_arriver(faulty ? Arrival::kNoTicket : Arrival::kRight);
}

KERNEL overlapping(float* out, int step) {
  wait_for_previous();
  out[blockIdx.x * static_cast<unsigned>(step) + threadIdx.x] = 1.0f;
}

std::string blocks_write_the_same(bool faulty) {
  std::vector<float> out(2 * kThreads);
  launch("overlapping", overlapping, Grid{2}, kThreads, 0, nullptr, out.data(),
         faulty ? kThreads - 1 : kThreads);
  return "";
}

// ---- Launches that overlap ---------------------------------------------------------------------

KERNEL writes(float* out) {
  wait_for_previous();
  out[threadIdx.x] = 1.0f;
}
KERNEL reads(const float* in, float* out, bool faulty) {
  float value = 0.0f;
  if (faulty) value = in[threadIdx.x];
  wait_for_previous();
  if (!faulty) value = in[threadIdx.x];
  out[threadIdx.x] = value;
}

std::string reads_before_waiting(bool faulty) {
  cudaStream_t stream = nullptr;
  check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
  std::vector<float> in(kThreads), out(kThreads);
  launch("writes", writes, Grid{1}, kThreads, 0, stream, in.data());
  launch("reads", reads, Grid{1}, kThreads, 0, stream, in.data(), out.data(), faulty);
  check_cuda(cudaStreamSynchronize(stream), "synchronize");
  check_cuda(cudaStreamDestroy(stream), "destroy");
  return right_if(out == std::vector<float>(kThreads, 1.0f));
}

KERNEL impatient(float* out, bool faulty) {
  if (!faulty) wait_for_previous();
  out[threadIdx.x] = 1.0f;
}

std::string never_waits(bool faulty) {
  std::vector<float> out(kThreads);
  launch("impatient", impatient, Grid{1}, kThreads, 0, nullptr, out.data(), faulty);
  return right_if(out == std::vector<float>(kThreads, 1.0f));
}

// ---- What must raise no alarm ------------------------------------------------------------------

// Neighbours own the halves of a word, in shared and in global memory.
KERNEL halves(uint16_t* global) {
  SHARED(uint16_t, shared, [kThreads]);
  wait_for_previous();
  shared[threadIdx.x] = global[threadIdx.x];
  shared[threadIdx.x] = static_cast<uint16_t>(shared[threadIdx.x] + 1);
  global[threadIdx.x] = shared[threadIdx.x];
}

std::string halves_of_words(bool) {
  std::vector<uint16_t> values(kThreads, 1);
  launch("halves", halves, Grid{1}, kThreads, 0, nullptr, values.data());
  return right_if(values == std::vector<uint16_t>(kThreads, 2));
}

}  // namespace

const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
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
      {"arrival_without_barrier", arrival_without_barrier},
      {"arrival_without_fence", arrival_without_fence},
      {"merge_without_ticket", merge_without_ticket},
      {"blocks_write_the_same", blocks_write_the_same},
      {"reads_before_waiting", reads_before_waiting},
      {"never_waits", never_waits},
      {"halves_of_words", halves_of_words},
  };
  return all;
}

}  // namespace gpt2f::cuda

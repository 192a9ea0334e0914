// Kernels with planted faults between blocks and between launches, and what must raise no alarm.
#include <cuda_runtime.h>

#include <vector>

#include "cases.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

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

std::vector<Case> order_cases() {
  return {
      {"arrival_without_barrier", arrival_without_barrier},
      {"arrival_without_fence", arrival_without_fence},
      {"merge_without_ticket", merge_without_ticket},
      {"blocks_write_the_same", blocks_write_the_same},
      {"reads_before_waiting", reads_before_waiting},
      {"never_waits", never_waits},
      {"halves_of_words", halves_of_words},
  };
}

}  // namespace gpt2f::cuda

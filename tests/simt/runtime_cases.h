// Checks of the simulated CUDA runtime: streams, graphs, memory, errors.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "cuda/launch.h"

namespace gpt2f::cuda {

// Name, and a function that returns "" or what was wrong.
using RuntimeCases = std::vector<std::pair<const char*, std::string (*)()>>;
RuntimeCases stream_cases();
RuntimeCases memory_cases();

constexpr int kRow = 64;
constexpr size_t kBytes = kRow * sizeof(float);
using Row = std::array<float, kRow>;

// Adds a number to each element of a row, in each of `blocks` blocks.
void add_to(float* row, float term, int blocks, void* stream);

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) return cat("line ", __LINE__, ": not ", #condition); \
  } while (false)

// A stream and one row of device memory.
struct Setting {
  cudaStream_t stream = nullptr;
  float* row = nullptr;

  Setting() {
    check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    void* memory = nullptr;
    check_cuda(cudaMalloc(&memory, kBytes), "malloc");
    row = static_cast<float*>(memory);
  }
  ~Setting() {
    cudaFree(row);
    cudaStreamDestroy(stream);
  }
  void add_to_row(float term) { add_to(row, term, 1, stream); }
  cudaError_t upload(const Row& from) {
    return cudaMemcpyAsync(row, from.data(), kBytes, cudaMemcpyHostToDevice, stream);
  }
  cudaError_t download(Row& to) {
    return cudaMemcpyAsync(to.data(), row, kBytes, cudaMemcpyDeviceToHost, stream);
  }
};

inline Row filled(float value) {
  Row row;
  row.fill(value);
  return row;
}

}  // namespace gpt2f::cuda

// How a kernel is run: one of `size` host threads that execute the same step together (CPU), or a
// stream (CUDA). Kernels split their work by rank and meet at sync().
#pragma once

#include <atomic>
#include <cstdint>

namespace gpt2f {

// Threads of a step meet here. Spins a little, then sleeps in the kernel, so that a machine with
// fewer free processors than threads still makes progress.
class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait();

 private:
  const uint32_t size_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

struct Lane {
  int rank = 0;
  int size = 1;
  Barrier* barrier = nullptr;  // null when size == 1
  void* stream = nullptr;      // CUDA stream; null on the CPU

  void sync() const {
    if (barrier != nullptr) barrier->wait();
  }
};

struct Range {
  int64_t begin;
  int64_t end;
};

// The part of [0, count) that `lane` owns, in multiples of `unit`; parts differ by one unit at
// most.
inline Range share(int64_t count, int64_t unit, const Lane& lane) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t begin = units * lane.rank / lane.size * unit;
  const int64_t end = units * (lane.rank + 1) / lane.size * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

}  // namespace gpt2f

// How a kernel is run: one of `size` host threads that execute the same step together (CPU), or a
// stream (CUDA). Kernels split their work by rank and meet at sync().
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace gpt2f {

// Threads of a step meet here. In round k a thread signals the one 2^k places behind itself and
// waits for the one 2^k places in front: each line of memory has one writer and one reader, and two
// threads need one message each way. Spins a little, then sleeps in the kernel, so that a machine
// with fewer free processors than threads still makes progress.
//
// Source   Hensgen, Finkel and Manber 1988, Two algorithms for barrier synchronization, section 3.
class Barrier {
 public:
  explicit Barrier(int size);
  void wait(int rank);  // of 0 ... size - 1, each from one thread

 private:
  struct alignas(64) Signal {
    std::atomic<uint32_t> meeting{0};  // the last one that the sender has come to
  };
  struct alignas(64) Place {
    uint32_t meetings = 0;
  };
  const int size_;
  int rounds_ = 0;
  std::vector<Signal> signals_;  // [rank][round]
  std::vector<Place> places_;
};

// Work that lanes take piece by piece, so that one that is slowed down (another tenant of the
// machine, a slower core) does not hold up the rest. All lanes open the same sequence of jobs with
// a sync() between any two, so a queue needs no reset: its first visitor in a job finds the old
// job's number.
struct alignas(64) WorkQueue {
  std::atomic<uint64_t> taken{0};  // number of the job, then pieces taken of it
  uint32_t job = 0;                // the owner's own count of jobs
};

struct Lane {
  int rank = 0;
  int size = 1;
  Barrier* barrier = nullptr;  // null when size == 1
  WorkQueue* queues = nullptr; // one per lane; null when size == 1
  void* stream = nullptr;      // CUDA stream; null on the CPU

  void sync() const {
    if (barrier != nullptr) barrier->wait(rank);
  }
};

// The next piece of queue `owner` in this job: 0, 1, 2, ... each given out once, then `count`. Who
// finds nothing leaves the line to its owner.
static inline int64_t take_piece(WorkQueue& owner, uint32_t job, int64_t count) {
  uint64_t seen = owner.taken.load(std::memory_order_relaxed);
  for (;;) {
    const uint64_t piece = (seen >> 32) == job ? seen & 0xFFFFFFFFu : 0;
    if (static_cast<int64_t>(piece) >= count) return count;
    const uint64_t next = uint64_t{job} << 32 | (piece + 1);
    if (owner.taken.compare_exchange_weak(seen, next, std::memory_order_relaxed)) {
      return static_cast<int64_t>(piece);
    }
  }
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The part of [0, count) that `lane` owns, in multiples of `unit`; parts differ by one unit at
// most.
static inline Range share(int64_t count, int64_t unit, const Lane& lane) {
  const int64_t units = (count + unit - 1) / unit;
  const int64_t begin = units * lane.rank / lane.size * unit;
  const int64_t end = units * (lane.rank + 1) / lane.size * unit;
  return {begin < count ? begin : count, end < count ? end : count};
}

// Calls work(piece) for pieces 0 ... count - 1, each on some lane.
template <typename Work>
static inline void take_pieces(int64_t count, const Lane& lane, const Work& work) {
  if (lane.queues == nullptr) {
    for (int64_t piece = 0; piece < count; ++piece) work(piece);
    return;
  }
  const uint32_t job = ++lane.queues[lane.rank].job;
  for (int64_t p; (p = take_piece(lane.queues[0], job, count)) < count;) work(p);
}

// Calls work(begin, end) for parts of [0, count) of at most `unit`. Every lane begins with its own
// share, in order, so that it reads one stream of memory; whoever is done helps the others.
template <typename Work>
static inline void take_shares(int64_t count, int64_t unit, const Lane& lane, const Work& work) {
  if (lane.queues == nullptr) {
    work(int64_t{0}, count);
    return;
  }
  const uint32_t job = ++lane.queues[lane.rank].job;
  for (int i = 0; i < lane.size; ++i) {
    Lane owner = lane;
    owner.rank = (lane.rank + i) % lane.size;
    const Range theirs = share(count, unit, owner);
    const int64_t pieces = (theirs.end - theirs.begin + unit - 1) / unit;
    for (int64_t p; (p = take_piece(lane.queues[owner.rank], job, pieces)) < pieces;) {
      const int64_t begin = theirs.begin + p * unit;
      work(begin, begin + unit < theirs.end ? begin + unit : theirs.end);
    }
  }
}

}  // namespace gpt2f

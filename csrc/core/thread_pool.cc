#include "core/thread_pool.h"

#include <sched.h>
#include <unistd.h>

#include <system_error>
#include <thread>
#include <vector>

#include "core/error.h"
#include "core/fp_state.h"

namespace gpt2f {
namespace {

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How long a thread polls before it sleeps in the kernel. Waking a sleeper costs 50 us and more on
// a virtual machine, several times what a stage of GPT-2 small takes, so within a step a thread
// polls for about a millisecond: it sleeps only when another one has lost its processor. Between
// steps it polls about as long as a caller needs to ask for the next token. After the first
// microseconds each poll offers the processor to whoever else wants it.
constexpr int kQuickPolls = 1000;
constexpr int kBarrierPolls = 2000;
constexpr int kIdlePolls = 400;

void wait_change(std::atomic<uint32_t>& value, uint32_t old, int polls) {
  for (int i = 0; i < kQuickPolls; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  for (int i = 0; i < polls; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    sched_yield();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Barrier::Barrier(int size) : size_(size), places_(static_cast<size_t>(size)) {
  while ((1 << rounds_) < size) ++rounds_;
  signals_ = std::vector<Signal>(static_cast<size_t>(size * rounds_));
}

void Barrier::wait(int rank) {
  const uint32_t now = ++places_[static_cast<size_t>(rank)].meetings;
  const auto signal = [this](int of, int round) -> std::atomic<uint32_t>& {
    return signals_[static_cast<size_t>(of * rounds_ + round)].meeting;
  };
  for (int round = 0; round < rounds_; ++round) {
    std::atomic<uint32_t>& next = signal((rank + (1 << round)) % size_, round);
    next.store(now);  // in one order with the look whether somebody sleeps
    next.notify_one();
    // The sender is at most one meeting ahead.
    wait_change(signal(rank, round), now - 1, kBarrierPolls);
  }
}

struct ThreadPool::State {
  explicit State(int size) : barrier(size), done(size), queues(static_cast<size_t>(size)) {}

  void work(Lane lane) {
    uint32_t seen = 0;
    for (;;) {
      wait_change(job, seen, kIdlePolls);
      ++seen;
      if (stop.load(std::memory_order_relaxed)) return;
      {
        const FpState fp;
        function(data, lane);
      }
      done.wait(lane.rank);
    }
  }

  Barrier barrier;  // between the stages of one function
  Barrier done;     // at its end
  std::vector<WorkQueue> queues;
  alignas(64) std::atomic<uint32_t> job{0};
  std::atomic<bool> stop{false};
  Raw function = nullptr;
  const void* data = nullptr;
  std::vector<std::thread> threads;
};

ThreadPool::ThreadPool(int threads) : size_(threads) {
  check(threads >= 1 && threads <= 1024, ErrorKind::kParameter, "threads must be in 1..1024, got ",
        threads);
  start();
}

void ThreadPool::start() {
  owner_ = getpid();
  state_ = std::make_unique<State>(size_);
  try {
    for (int rank = 1; rank < size_; ++rank) {
      const Lane lane{rank, size_, &state_->barrier, state_->queues.data(), nullptr};
      state_->threads.emplace_back([state = state_.get(), lane] { state->work(lane); });
    }
  } catch (const std::system_error& error) {
    const size_t started = state_->threads.size();
    state_->stop.store(true, std::memory_order_relaxed);
    state_->job.fetch_add(1, std::memory_order_release);
    state_->job.notify_all();
    for (std::thread& thread : state_->threads) thread.join();
    state_->threads.clear();
    throw Error(ErrorKind::kCapacity, cat("threads: wanted ", size_, ", the system started only ",
                                          started + 1, " (", error.what(), ")"));
  }
}

ThreadPool::~ThreadPool() {
  if (owner_ != getpid()) {
    (void)state_.release();  // a forked child has no such threads to join
    return;
  }
  state_->stop.store(true, std::memory_order_relaxed);
  state_->job.fetch_add(1, std::memory_order_release);
  state_->job.notify_all();
  for (std::thread& thread : state_->threads) thread.join();
}

void ThreadPool::run_raw(Raw function, const void* data) {
  if (owner_ != getpid()) {
    (void)state_.release();
    start();
  }
  State& state = *state_;
  const bool alone = size_ == 1;
  const Lane lane{0, size_, alone ? nullptr : &state.barrier, alone ? nullptr : state.queues.data(),
                  nullptr};
  if (size_ == 1) {
    const FpState fp;
    function(data, lane);
    return;
  }
  state.function = function;
  state.data = data;
  state.job.fetch_add(1, std::memory_order_release);
  state.job.notify_all();
  {
    const FpState fp;
    function(data, lane);
  }
  state.done.wait(0);
}

}  // namespace gpt2f

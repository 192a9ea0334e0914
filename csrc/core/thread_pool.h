// A fork-join pool of plain threads: run() executes one function on every lane, the caller being
// lane 0. Every lane computes with denormals flushed and rounding to nearest, whatever state the
// caller or another library left, and the caller's own state is restored.
#pragma once

#include <sys/types.h>

#include <memory>

#include "core/lane.h"

namespace gpt2f {

class ThreadPool {
 public:
  explicit ThreadPool(int threads);  // throws Error (kCapacity) when threads cannot be started
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }

  // Calls function(lane) on every lane and returns when all are done. Not reentrant: callers
  // serialise. After fork() the child's first run() starts threads of its own.
  template <typename Function>
  void run(const Function& function) {
    run_raw([](const void* data, const Lane& lane) { (*static_cast<const Function*>(data))(lane); },
            &function);
  }

 private:
  using Raw = void (*)(const void*, const Lane&);
  struct State;
  void run_raw(Raw function, const void* data);
  void start();

  const int size_;
  pid_t owner_ = 0;
  std::unique_ptr<State> state_;
};

}  // namespace gpt2f

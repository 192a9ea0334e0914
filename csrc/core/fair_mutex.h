// A mutex that is had in the order of asking. With std::mutex a thread that lets go and asks again
// at once, as one that decodes does, leaves nothing to those who wait.
#pragma once

#include <atomic>
#include <cstdint>

namespace gpt2f {

class FairMutex {
 public:
  void lock() {
    const uint32_t mine = asked_.fetch_add(1, std::memory_order_relaxed);
    for (uint32_t now; (now = served_.load(std::memory_order_acquire)) != mine;) {
      served_.wait(now, std::memory_order_acquire);
    }
  }
  void unlock() {
    served_.fetch_add(1, std::memory_order_release);
    served_.notify_all();
  }

 private:
  std::atomic<uint32_t> asked_{0};
  std::atomic<uint32_t> served_{0};
};

}  // namespace gpt2f

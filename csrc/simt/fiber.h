// Fibers: stacks and the switch between them. No system call is made when one hands over.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

namespace gpt2f::simt {

struct Fiber {
  void* stack_pointer = nullptr;  // while it does not run
  char* stack = nullptr;          // lowest address; null for the host's own
  size_t stack_bytes = 0;
  void* sanitizer = nullptr;      // AddressSanitizer's state while it does not run
};

// Stacks of one size, each with a guard page below it. Never shrinks: launches reuse them.
class Stacks {
 public:
  ~Stacks();
  // Makes `fiber` one that begins in `entry` on stack number `index`.
  void prepare(Fiber& fiber, size_t index, void (*entry)());

 private:
  static constexpr size_t kSlab = 64;  // stacks of one mapping
  std::vector<char*> slabs_;
};

// Goes on in `to`; returns when somebody switches back to `from`. `last`: from never runs again.
void switch_fiber(Fiber& from, Fiber& to, bool last = false);
// First thing a new fiber does.
void enter_fiber();

}  // namespace gpt2f::simt

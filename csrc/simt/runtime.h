// The simulated processor: threads, warps and blocks of one launch, who runs next, and the checks.
// Inside simt only; kernels see device.h.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <source_location>
#include <string>
#include <vector>

#include "simt/device_types.h"
#include "simt/fiber.h"
#include "simt/launch.h"
#include "simt/marks.h"

namespace gpt2f::simt {

// In which order threads run and how long an asynchronous copy takes. The result of a correct
// kernel depends on neither.
struct Schedule {
  enum class Order : uint8_t { kForward, kReverse, kRandom };
  Order order = Order::kForward;
  bool late_copies = true;  // cp.async lands when it is waited for; else at once
  int resident = 1;         // blocks that run side by side
  uint64_t seed = 0;
};
Schedule& schedule();
Schedule named_schedule(const std::string& name);  // throws Error (kParameter)

struct Stats {
  int64_t launches, blocks, threads, switches, barriers, collectives, async_copies;
};
Stats& stats();

struct Block;

struct Warp {
  Exchange exchange[2];  // by turns: nobody is two turns ahead of a lane that still reads
  Collective kind{};
  Where where;
  uint32_t arrived = 0;  // lanes
  uint32_t left = 0;     // lanes that have left the kernel
  uint32_t turn = 0;
  uint32_t interval = 0;  // sync_warps so far, for the race checker
};

struct AsyncCopy {
  void* to;
  const void* from;
  bool valid;
  uint32_t group;
  Where where;
};

enum class State : uint8_t { kReady, kBarrier, kWarp, kLeft };

struct Thread : Index {
  Block* home = nullptr;
  Warp* warp = nullptr;
  uint32_t number = 0;
  uint32_t lane = 0;
  State state = State::kLeft;
  bool waited_for_previous = false;
  Where where;  // the last synchronisation it reached
  Fiber fiber;
  std::vector<AsyncCopy> copies;
  uint32_t groups = 0;  // committed
};

// Shared memory of a block: the dynamic part, then each static array when it is first met, with
// gaps that nobody may write.
struct SharedArray {
  const void* key;
  const char* name;
  size_t offset, bytes;
};

struct Block {
  uint32_t number = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  size_t arriving = 0;    // threads at the barrier
  size_t left = 0;        // threads that have left the kernel
  uint32_t interval = 0;  // between barriers, counted from 1, for the race checker
  uint32_t epoch = 0;     // the same, counted over all blocks and launches
  std::vector<Cell> cells;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory;
  char* arena = nullptr;  // the same
  size_t used = 0;        // bytes of the arena, gaps included
  size_t shared = 0;      // bytes a kernel may use
  std::vector<SharedArray> arrays;
};

struct Launch {
  const Kernel* kernel;
  dim3 grid, block;
  size_t shared_bytes;
  void* const* arguments;
  bool overlaps;  // with the launch before it, until it waits
};

// Runs every block of the grid to its end; throws KernelError.
void run_launch(const Launch& launch);
bool inside_kernel();
// True while a kernel's own code runs. What the runtime does on a kernel's stack is no access of
// the kernel's, though it may be done by a copy of a template that was compiled with the kernel.
// Nor is what another of the host's threads does meanwhile.
extern constinit thread_local bool kernel_code __attribute__((tls_model("initial-exec")));
class InRuntime {
 public:
  InRuntime() : before_(kernel_code) { kernel_code = false; }
  ~InRuntime() { kernel_code = before_; }
  InRuntime(const InRuntime&) = delete;
  InRuntime& operator=(const InRuntime&) = delete;

 private:
  bool before_;
};
inline Thread& running() { return *static_cast<Thread*>(here); }

// The running thread waits until somebody makes it ready.
void yield(State state, const Where& where);
void make_ready(Thread& thread);
// The running thread lets others go first.
void step_aside();
// Makes the threads ready in the order of the schedule.
void release(Thread* const* threads, size_t count);
// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const std::string& message);
// The same, where no single thread is to blame.
[[noreturn]] void fail_launch(const std::string& message);
std::string describe(const Thread& thread);
std::string describe(const Where& where);
const char* file_name(const Where& where);
uint64_t random_number();
const char* kernel_name();

void leave_warp(Thread& thread);
void complete(Exchange& exchange, Collective kind);  // of a warp whose lanes have all arrived
void land_copies(Thread& thread, uint32_t groups);

void prepare_shared(Block& block, size_t dynamic_bytes);
void check_shared(const Block& block);
// "sums byte 12", or "" for an address outside the block's shared memory.
std::string shared_place(const Block& block, const void* address);

}  // namespace gpt2f::simt

// Runs the blocks of a launch. A thread that must wait switches straight to the next one that is
// ready; the host's own stack only starts blocks and hears of their end.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>

#include "simt/race.h"

dim3 blockDim;
dim3 gridDim;

namespace gpt2f::simt {

Index* here = nullptr;
constinit thread_local bool kernel_code = false;

namespace {

// Threads that may run, first come first served unless the schedule is random.
class Queue {
 public:
  void reset(size_t capacity) {
    if (slots_.size() < capacity) slots_.resize(std::bit_ceil(capacity));
    first_ = count_ = 0;
  }
  bool empty() const { return count_ == 0; }
  void push(Thread* thread) { at(count_++) = thread; }
  Thread* pop(bool random) {
    if (random && count_ > 1) std::swap(at(0), at(random_number() % count_));
    Thread* thread = at(0);
    ++first_;
    --count_;
    return thread;
  }

 private:
  Thread*& at(size_t i) { return slots_[(first_ + i) & (slots_.size() - 1)]; }
  std::vector<Thread*> slots_;
  size_t first_ = 0, count_ = 0;
};

struct Processor {
  const Launch* launch = nullptr;
  Queue queue;
  Stacks stacks;
  std::vector<std::unique_ptr<Block>> blocks;  // those resident, reused
  std::vector<Block*> finished;
  Fiber host;
  std::string error;
  bool failed = false;
  std::mt19937_64 random;
};
Processor processor;

Thread* next_thread() { return processor.queue.pop(schedule().order == Schedule::Order::kRandom); }

void switch_from(Thread& thread, bool last) {
  if (processor.queue.empty() || processor.failed || (last && !processor.finished.empty())) {
    switch_fiber(thread.fiber, processor.host, last);
    return;
  }
  Thread* next = next_thread();
  if (next == &thread) return;
  ++stats().switches;
  here = next;
  switch_fiber(thread.fiber, next->fiber, last);
}

void leave_block(Thread& thread) {
  Block& block = *thread.home;
  if (processor.launch->overlaps && !thread.waited_for_previous) {
    fail("leaves the kernel without wait_for_previous");
  }
  leave_warp(thread);
  if (block.arriving > 0) {
    const auto waits = [](const Thread& t) { return t.state == State::kBarrier; };
    const auto other = std::find_if(block.threads.begin(), block.threads.end(), waits);
    fail("leaves the kernel while " + describe(*other) + " waits in " + describe(other->where));
  }
  if (++block.left < block.threads.size()) return;
  check_shared(block);
  processor.finished.push_back(&block);
}

void run_thread() {
  enter_fiber();
  Thread& thread = running();
  const Launch& launch = *processor.launch;
  kernel_code = true;
  launch.kernel->call(launch.kernel->address, launch.arguments);
  kernel_code = false;
  land_copies(thread, thread.groups + 1);
  thread.state = State::kLeft;
  leave_block(thread);
  switch_from(thread, true);
  __builtin_unreachable();
}

// The block number `number` in the place of one that has ended.
void start_block(Block& block, size_t slot, uint32_t number) {
  const Launch& launch = *processor.launch;
  const size_t count = launch.block.x;
  block.number = number;
  block.threads.resize(count);
  block.warps.assign(count / 32, Warp{});
  block.arriving = block.left = 0;
  block.interval = 0;
  begin_interval(block);
  prepare_shared(block, launch.shared_bytes);
  const uint3 index{number % gridDim.x, number / gridDim.x % gridDim.y,
                    number / gridDim.x / gridDim.y};
  std::vector<Thread*> threads(count);
  for (uint32_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.thread = {i, 0, 0};
    thread.block = index;
    thread.home = &block;
    thread.warp = &block.warps[i / 32];
    thread.number = i;
    thread.lane = i % 32;
    thread.waited_for_previous = false;
    thread.where = Where();
    thread.copies.clear();
    thread.groups = 0;
    processor.stacks.prepare(thread.fiber, slot * 1024 + i, run_thread);
    threads[i] = &thread;
  }
  stats().threads += static_cast<int64_t>(count);
  ++stats().blocks;
  release(threads.data(), count);
}

[[noreturn]] void fail_stuck() {
  std::map<std::string, std::pair<int, const Thread*>> places;
  for (const auto& block : processor.blocks) {
    for (const Thread& thread : block->threads) {
      if (thread.state == State::kLeft) continue;
      auto& place = places[describe(thread.where)];
      if (place.first++ == 0) place.second = &thread;
    }
  }
  std::string message = "deadlock:";
  for (const auto& [where, who] : places) {
    message +=
        cat(" ", who.first, " threads wait in ", where, ", first ", describe(*who.second), ";");
  }
  message.pop_back();
  fail_launch(message);
}

void check_configuration(const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  if (block.y != 1 || block.z != 1 || block.x % 32 != 0 || block.x == 0 || block.x > 1024) {
    fail_launch(cat("blocks must be one-dimensional, of 32 ... 1024 threads in whole warps, got ",
                    block.x, " x ", block.y, " x ", block.z));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFF || grid.y > 65535 ||
      grid.z > 65535) {
    fail_launch(cat("no such grid: ", grid.x, " x ", grid.y, " x ", grid.z));
  }
}

std::vector<uint32_t> block_order(size_t count) {
  std::vector<uint32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (schedule().order == Schedule::Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule().order == Schedule::Order::kRandom) {
    std::shuffle(order.begin(), order.end(), processor.random);
  }
  return order;
}

void run_blocks() {
  const size_t total = size_t{gridDim.x} * gridDim.y * gridDim.z;
  const size_t resident = std::min<size_t>(total, static_cast<size_t>(schedule().resident));
  processor.queue.reset(resident * blockDim.x);
  processor.blocks.resize(std::max(processor.blocks.size(), resident));
  const std::vector<uint32_t> order = block_order(total);
  size_t started = 0, ended = 0;
  for (; started < resident; ++started) {
    auto& block = processor.blocks[started];
    if (block == nullptr) block = std::make_unique<Block>();
    start_block(*block, started, order[started]);
  }
  while (ended < total) {
    if (processor.queue.empty()) {
      here = nullptr;
      fail_stuck();
    }
    Thread* thread = next_thread();
    ++stats().switches;
    here = thread;
    switch_fiber(processor.host, thread->fiber);
    if (processor.failed) throw KernelError(processor.error);
    for (Block* block : std::exchange(processor.finished, {})) {
      ++ended;
      if (started == total) continue;
      size_t slot = 0;
      while (processor.blocks[slot].get() != block) ++slot;
      start_block(*block, slot, order[started++]);
    }
  }
}

}  // namespace

Stats& stats() {
  static Stats counts{};
  return counts;
}

bool inside_kernel() { return here != nullptr; }
uint64_t random_number() { return processor.random(); }
const char* kernel_name() { return processor.launch->kernel->name; }

void make_ready(Thread& thread) {
  thread.state = State::kReady;
  processor.queue.push(&thread);
}

void release(Thread* const* threads, size_t count) {
  const bool reverse = schedule().order == Schedule::Order::kReverse;
  for (size_t i = 0; i < count; ++i) make_ready(*threads[reverse ? count - 1 - i : i]);
}

void yield(State state, const Where& where) {
  Thread& me = running();
  me.state = state;
  me.where = where;
  switch_from(me, false);
}

void step_aside() {
  Thread& me = running();
  make_ready(me);
  switch_from(me, false);
}

std::string describe(const Thread& thread) {
  return cat("block (", thread.block.x, ", ", thread.block.y, ", ", thread.block.z, ") thread ",
             thread.number, " (warp ", thread.number / 32, ", lane ", thread.lane, ")");
}

void fail_launch(const std::string& message) {
  const std::string whole = cat("kernel ", kernel_name(), ": ", message);
  if (!inside_kernel()) throw KernelError(whole);
  // The fibers of the launch are dropped as they stand: they own nothing.
  kernel_code = false;
  processor.error = whole;
  processor.failed = true;
  switch_fiber(running().fiber, processor.host, true);
  __builtin_unreachable();
}

void fail(const std::string& message) { fail_launch(describe(running()) + " " + message); }

void sync_block(const Where& where) {
  const InRuntime guard;
  Thread& me = running();
  Block& block = *me.home;
  const char* name = "sync_block";
  if (block.left > 0) {
    fail(cat("reaches ", name, " at ", describe(where), " after ", block.left,
             " threads have left the kernel"));
  }
  me.where = where;
  if (++block.arriving < block.threads.size()) {
    yield(State::kBarrier, where);
    return;
  }
  std::vector<Thread*> others;
  others.reserve(block.threads.size());
  for (Thread& thread : block.threads) {
    if (&thread == &me) continue;
    if (thread.where.line() != where.line() ||
        std::strcmp(thread.where.file_name(), where.file_name()) != 0) {
      fail(cat("divergent barrier: it waits at ", describe(where), ", but ", describe(thread),
               " at ", describe(thread.where)));
    }
    others.push_back(&thread);
  }
  ++stats().barriers;
  begin_interval(block);
  block.arriving = 0;
  release(others.data(), others.size());
}

void run_launch(const Launch& launch) {
  if (inside_kernel()) throw KernelError("a kernel launches a kernel");
  processor.launch = &launch;
  check_configuration(launch);
  processor.failed = false;
  processor.host = Fiber{};
  processor.finished.clear();
  processor.random.seed(schedule().seed);
  blockDim = launch.block;
  gridDim = launch.grid;
  ++stats().launches;
  begin_launch(launch.overlaps);
  try {
    run_blocks();
  } catch (...) {
    here = nullptr;
    throw;
  }
  here = nullptr;
}

}  // namespace gpt2f::simt

// Who touched which byte last, and whether a later access may come so soon. Works in the race
// build, where kernels are compiled with -fsanitize=thread and linked without it: the compiler's
// calls (instrumentation.cc) report every load and store.
//
// Two accesses race when different threads make them, one is a store, and nothing orders them: a
// barrier of their block, a sync_warp of their warp or, between blocks, an atomic_add of both on
// one counter, after the first has fenced and before the second goes on behind a barrier.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/marks.h"
#include "simt/runtime.h"

namespace gpt2f::simt {

// Marks and traffic of 1 KB of global memory.
struct Page {
  static constexpr uintptr_t kBytes = 1024;
  std::array<Cell, kBytes / 2> cells;
  uint32_t launch = 0;  // whose bits the following are
  enum class Counted : uint8_t { kNone, kSome, kAll } counted = Counted::kNone;
  std::array<uint64_t, kBytes / 64> loaded{}, stored{};
};

struct Traffic {
  std::string kernel;
  int64_t loaded = 0, loaded_once = 0;  // bytes; each byte counted once
  int64_t stored = 0, stored_once = 0;
};

// True once an instrumented object has been loaded.
extern bool instrumented;

std::vector<std::string> take_races();
std::vector<Traffic> take_traffic();
// Counts traffic of these bytes, instead of that of device allocations.
void track(const void* begin, size_t bytes);
void track_nothing();

// Called by the scheduler and the runtime.
void begin_launch(bool overlaps);
void begin_interval(Block& block);
void end_overlap();  // work before now is complete before later work begins
// `code`: the address of the instruction.
void check_access(const void* address, size_t bytes, bool store, const void* code);

}  // namespace gpt2f::simt

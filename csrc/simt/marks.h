// What the race checker remembers of each two bytes. See race.h.
#pragma once

#include <cstdint>

namespace gpt2f::simt {

// One access: which thread, in which interval between barriers, to which of two bytes.
struct Mark {
  uint32_t epoch = 0;  // number of (block, interval), counted over all launches
  uint16_t warp_interval = 0;
  uint16_t thread : 10 = 0;
  uint16_t bytes : 2 = 0;
  // Of readers that one mark stands for:
  uint16_t several_lanes : 1 = 0;
  uint16_t several_warps : 1 = 0;
  uint16_t several_blocks : 1 = 0;
};
struct Cell {
  Mark store;
  Mark load;
};

}  // namespace gpt2f::simt

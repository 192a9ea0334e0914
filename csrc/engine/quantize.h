// Group quantisation of weights, defined once for every backend: what the integers and scales of a
// matrix are. Backends only reorder them.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gpt2f {

// Inputs (elements along K) that share one scale. K is padded to a multiple of 64 with zeros.
constexpr int64_t kInt8Group = 64;
constexpr int64_t kInt4Group = 32;
constexpr int64_t group_size(Precision p) {
  return p == Precision::kInt8 ? kInt8Group : kInt4Group;
}

}  // namespace gpt2f

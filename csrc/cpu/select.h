// Which kernel tables this processor can run.
#pragma once

#include <string>
#include <vector>

#include "core/kernels.h"

namespace gpt2f {

std::vector<std::string> compiled_isas();

// Tables this machine runs, worst first. avx512_bf16 is among them only if its dot product gives
// the bits that every other instruction set computes, which is tried once.
const std::vector<const KernelTable*>& runnable_tables();

// The table called `name`, or the best one when `name` is empty. Throws Error (kDevice) naming the
// choices.
const KernelTable* find_table(const std::string& name);

}  // namespace gpt2f

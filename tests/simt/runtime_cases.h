// Checks of the simulated CUDA runtime: streams, graphs, memory, errors.
#pragma once

#include <string>

namespace gpt2f::cuda {

// Prints "ok", or what was wrong; 2 if there is no such case.
int run_runtime_case(const std::string& name);

}  // namespace gpt2f::cuda

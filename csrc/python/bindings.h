// The parts of the module _C.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace gpt2f {

// GPT2_FAST_ISA and GPT2_FAST_THREADS, or the best this machine has and what it allows.
std::string default_isa();
int default_threads();

void bind_info(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace gpt2f

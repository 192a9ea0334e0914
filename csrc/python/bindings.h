// The parts of the module _C.
#pragma once

#include <pybind11/pybind11.h>

namespace gpt2f {

void bind_info(pybind11::module_& module);
void bind_ops(pybind11::module_& module);
void bind_engine(pybind11::module_& module);

}  // namespace gpt2f

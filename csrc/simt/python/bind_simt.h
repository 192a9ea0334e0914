// The submodule _C.simt.
#pragma once

#include <pybind11/pybind11.h>

namespace gpt2f::simt {

void bind_simt(pybind11::module_& m);

}  // namespace gpt2f::simt

// Kernel-level functions over numpy arrays for tests: the submodule _C.simt.
#pragma once

#include <pybind11/pybind11.h>

namespace gpt2f::simt {

void bind_simt(pybind11::module_& m);
void bind_norms(pybind11::module_& m);
void bind_products(pybind11::module_& m);
void bind_gemm(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_head(pybind11::module_& m);

}  // namespace gpt2f::simt

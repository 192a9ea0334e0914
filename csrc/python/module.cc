#include <pybind11/pybind11.h>

#include "core/error.h"
#include "python/bindings.h"
#if defined(GPT2_FAST_SIMT)
#include "simt/python/bindings.h"
#endif

namespace py = pybind11;

namespace gpt2f {
namespace {

const char* class_of(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kParameter:
      return "ParameterError";
    case ErrorKind::kCheckpoint:
      return "CheckpointError";
    case ErrorKind::kCapacity:
      return "CapacityError";
    case ErrorKind::kDevice:
      return "DeviceError";
  }
  return "Gpt2FastError";
}

void translate(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const Error& error) {
    const py::object errors = py::module_::import("gpt2_fast.errors");
    py::set_error(errors.attr(class_of(error.kind())), error.what());
  }
}

}  // namespace
}  // namespace gpt2f

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native kernels and engine of gpt2_fast. Private: use gpt2_fast.";
  py::register_exception_translator(gpt2f::translate);
  gpt2f::bind_info(module);
  gpt2f::bind_ops(module);
  gpt2f::bind_engine(module);
  gpt2f::bind_quantize(module);
  gpt2f::bind_tokens(module);
#if defined(GPT2_FAST_SIMT)
  py::module_ simt = module.def_submodule("simt", "Kernels on the simulated device, for tests.");
  gpt2f::simt::bind_simt(simt);
  gpt2f::simt::bind_norms(simt);
  gpt2f::simt::bind_products(simt);
  gpt2f::simt::bind_gemm(simt);
  gpt2f::simt::bind_attention(simt);
  gpt2f::simt::bind_head(simt);
#endif
}

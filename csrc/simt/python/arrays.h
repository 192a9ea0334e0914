// Arguments of the kernel-level functions: numpy arrays whose memory is the device's, and names.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "core/dtype.h"
#include "core/error.h"

namespace gpt2f::simt {

// The memory of a C-contiguous array of elements as wide as T; null for None.
template <typename T>
T* data(const pybind11::object& object) {
  if (object.is_none()) return nullptr;
  const auto array = object.cast<pybind11::array>();
  check((array.flags() & pybind11::array::c_style) != 0 && array.itemsize() == sizeof(T),
        ErrorKind::kParameter, "array: must be contiguous, of ", sizeof(T), " bytes an element");
  return static_cast<T*>(const_cast<void*>(array.data()));
}

inline Precision precision_of(const std::string& name) {
  if (name == "bf16") return Precision::kBf16;
  if (name == "fp16") return Precision::kFp16;
  check(name == "int8" || name == "int4", ErrorKind::kParameter, "precision: ", name);
  return name == "int8" ? Precision::kInt8 : Precision::kInt4;
}

}  // namespace gpt2f::simt

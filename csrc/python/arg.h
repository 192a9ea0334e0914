// One tensor argument of an operation: a Python object read in place, with checks whose messages
// name operation, argument, wanted and got.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/error.h"

namespace gpt2f {

enum class Kind { kF32, kBF16, kF16, kI32, kI64, kU16, kOther };

enum class Where { kCpu, kCuda };

class Arg {
 public:
  // Takes numpy arrays and anything else with the buffer protocol, and tensors through DLPack; on
  // CUDA the latter only.
  Arg(const char* op, const char* name, pybind11::handle object, Where where = Where::kCpu);
  ~Arg();
  Arg(const Arg&) = delete;
  Arg& operator=(const Arg&) = delete;

  const Arg& kind(Kind wanted) const;
  const Arg& floating() const;  // float32 or bfloat16, on CUDA also float16
  const Arg& half() const;      // bfloat16 or float16
  const Arg& same_kind(const Arg& other) const;
  const Arg& shape(const std::vector<int64_t>& wanted) const;
  const Arg& rank(size_t wanted) const;
  const Arg& rank_at_least(size_t wanted) const;
  const Arg& writable() const;

  Kind kind() const { return kind_; }
  int device() const { return device_; }
  DType dtype() const;  // of a float32, bfloat16 or float16 argument
  const std::vector<int64_t>& sizes() const { return shape_; }
  int64_t size(int i) const;  // negative i counts from the end
  int64_t count() const;      // elements
  int64_t rows() const;       // elements / size(-1)
  template <typename T = void>
  T* data() const {
    return static_cast<T*>(data_);
  }

  template <typename... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    throw Error(ErrorKind::kParameter, cat(op_, ": ", name_, " ", parts...));
  }

 private:
  bool from_exchange_api(pybind11::handle object);
  bool from_buffer(pybind11::handle object);
  bool from_capsule(pybind11::handle object);
  void read(const void* tensor);  // a dlpack::Tensor
  void require_contiguous(const int64_t* strides) const;

  const char* op_;
  const char* name_;
  const Where where_;
  int device_ = 0;  // number of the CUDA device
  void* data_ = nullptr;
  Kind kind_ = Kind::kOther;
  std::string kind_text_;
  std::vector<int64_t> shape_;
  bool readonly_ = false;
  Py_buffer buffer_{};       // held while obj is set
  pybind11::object capsule_;  // held while used
  void* managed_ = nullptr;
};

}  // namespace gpt2f

#include "python/arg.h"

#include "core/error.h"
#include "core/numbers.h"
#include "python/dlpack_abi.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

const char* text_of(Kind kind) {
  switch (kind) {
    case Kind::kF32:
      return "float32";
    case Kind::kBF16:
      return "bfloat16";
    case Kind::kF16:
      return "float16";
    case Kind::kI32:
      return "int32";
    case Kind::kI64:
      return "int64";
    case Kind::kU16:
      return "uint16";
    case Kind::kOther:
      break;
  }
  return "another type";
}

Kind kind_of(const dlpack::DataType& type) {
  if (type.lanes != 1) return Kind::kOther;
  if (type.code == dlpack::kFloat) {
    return type.bits == 32 ? Kind::kF32 : type.bits == 16 ? Kind::kF16 : Kind::kOther;
  }
  if (type.code == dlpack::kBfloat && type.bits == 16) return Kind::kBF16;
  if (type.code == dlpack::kInt) {
    return type.bits == 64 ? Kind::kI64 : type.bits == 32 ? Kind::kI32 : Kind::kOther;
  }
  return type.code == dlpack::kUint && type.bits == 16 ? Kind::kU16 : Kind::kOther;
}

Kind kind_of(const std::string& format, Py_ssize_t bytes) {
  if (format == "f") return Kind::kF32;
  if (format == "e") return Kind::kF16;
  if (format == "H") return Kind::kU16;
  if (format == "i" || format == "l" || format == "q") {
    return bytes == 8 ? Kind::kI64 : bytes == 4 ? Kind::kI32 : Kind::kOther;
  }
  return Kind::kOther;
}

}  // namespace

Arg::Arg(const char* op, const char* name, py::handle object, Where where)
    : op_(op), name_(name), where_(where) {
  if (!from_exchange_api(object) && !from_buffer(object) && !from_capsule(object)) {
    fail("must be ", where == Where::kCpu ? "a numpy array or a CPU tensor" : "a CUDA tensor",
         ", got ", std::string(py::str(py::type::handle_of(object).attr("__name__"))));
  }
}

Arg::~Arg() {
  if (buffer_.obj != nullptr) PyBuffer_Release(&buffer_);
  auto* const managed = static_cast<dlpack::ManagedTensor*>(managed_);
  if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
}

bool Arg::from_exchange_api(py::handle object) {
  const py::handle type = py::type::handle_of(object);
  if (!py::hasattr(type, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api") == 0) return false;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (api != nullptr && api->version.major != dlpack::kMajorVersion) api = api->previous;
  if (api == nullptr || api->tensor_from_object == nullptr) return false;
  dlpack::Tensor tensor{};
  if (api->tensor_from_object(object.ptr(), &tensor) != 0) throw py::error_already_set();
  read(&tensor);
  return true;
}

bool Arg::from_buffer(py::handle object) {
  if (where_ != Where::kCpu || PyObject_CheckBuffer(object.ptr()) == 0) return false;
  if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_RECORDS_RO) != 0) {
    PyErr_Clear();
    return false;
  }
  const std::string format = buffer_.format == nullptr ? "B" : buffer_.format;
  kind_ = kind_of(format, buffer_.itemsize);
  kind_text_ = kind_ == Kind::kOther ? "format '" + format + "'" : text_of(kind_);
  readonly_ = buffer_.readonly != 0;
  data_ = buffer_.buf;
  shape_.assign(buffer_.shape, buffer_.shape + buffer_.ndim);
  std::vector<int64_t> strides(shape_.size());
  for (size_t i = 0; i < shape_.size(); ++i) strides[i] = buffer_.strides[i] / buffer_.itemsize;
  require_contiguous(strides.data());
  return true;
}

bool Arg::from_capsule(py::handle object) {
  if (!py::hasattr(object, "__dlpack__")) return false;
  capsule_ = object.attr("__dlpack__")();
  if (PyCapsule_IsValid(capsule_.ptr(), "dltensor") == 0) return false;
  auto* const managed =
      static_cast<dlpack::ManagedTensor*>(PyCapsule_GetPointer(capsule_.ptr(), "dltensor"));
  PyCapsule_SetName(capsule_.ptr(), "used_dltensor");
  managed_ = managed;
  read(&managed->tensor);
  return true;
}

void Arg::read(const void* from) {
  const auto& tensor = *static_cast<const dlpack::Tensor*>(from);
  if (tensor.device.type != (where_ == Where::kCpu ? dlpack::kCpu : dlpack::kCuda)) {
    fail("must be on ", where_ == Where::kCpu ? "the CPU" : "a CUDA device",
         ", got DLPack device type ", tensor.device.type);
  }
  device_ = tensor.device.id;
  kind_ = kind_of(tensor.dtype);
  kind_text_ = kind_ == Kind::kOther ? cat("DLPack type ", int{tensor.dtype.code}, " of ",
                                           int{tensor.dtype.bits}, " bits")
                                     : text_of(kind_);
  data_ = static_cast<std::byte*>(tensor.data) + tensor.byte_offset;
  shape_.assign(tensor.shape, tensor.shape + tensor.ndim);
  if (tensor.strides != nullptr) require_contiguous(tensor.strides);
}

void Arg::require_contiguous(const int64_t* strides) const {
  int64_t expected = 1;
  for (size_t i = shape_.size(); i-- > 0;) {
    if (shape_[i] != 1 && strides[i] != expected && count() != 0) {
      fail("must be contiguous, got shape ", shape_text(shape_), " with strides ",
           shape_text(std::vector<int64_t>(strides, strides + shape_.size())));
    }
    expected *= shape_[i];
  }
}

const Arg& Arg::kind(Kind wanted) const {
  if (kind_ != wanted) fail("must be ", text_of(wanted), ", got ", kind_text_);
  return *this;
}

const Arg& Arg::floating() const {
  const bool f16 = where_ == Where::kCuda && kind_ == Kind::kF16;
  if (kind_ != Kind::kF32 && kind_ != Kind::kBF16 && !f16) {
    fail("must be float32", where_ == Where::kCuda ? ", float16" : "", " or bfloat16, got ",
         kind_text_);
  }
  return *this;
}

const Arg& Arg::half() const {
  if (kind_ != Kind::kBF16 && kind_ != Kind::kF16) {
    fail("must be float16 or bfloat16 on CUDA, got ", kind_text_);
  }
  return *this;
}

const Arg& Arg::same_kind(const Arg& other) const {
  if (kind_ != other.kind_) {
    fail("must be ", other.kind_text_, " like ", other.name_, ", got ", kind_text_);
  }
  return *this;
}

const Arg& Arg::shape(const std::vector<int64_t>& wanted) const {
  if (shape_ != wanted) fail("must have shape ", shape_text(wanted), ", got ", shape_text(shape_));
  return *this;
}

const Arg& Arg::rank(size_t wanted) const {
  if (shape_.size() != wanted) {
    fail("must have ", wanted, " dimensions, got shape ", shape_text(shape_));
  }
  return *this;
}

const Arg& Arg::rank_at_least(size_t wanted) const {
  if (shape_.size() < wanted) {
    fail("must have at least ", wanted, " dimensions, got shape ", shape_text(shape_));
  }
  return *this;
}

const Arg& Arg::writable() const {
  if (readonly_) fail("must be writable, got a read-only array");
  return *this;
}

DType Arg::dtype() const {
  return kind_ == Kind::kF32 ? DType::kF32 : kind_ == Kind::kBF16 ? DType::kBF16 : DType::kF16;
}

int64_t Arg::size(int i) const {
  const auto index = static_cast<size_t>(i < 0 ? static_cast<int>(shape_.size()) + i : i);
  return shape_.at(index);
}

int64_t Arg::count() const {
  int64_t product = 1;
  for (const int64_t size : shape_) product *= size;
  return product;
}

int64_t Arg::rows() const { return size(-1) == 0 ? 0 : count() / size(-1); }

}  // namespace gpt2f

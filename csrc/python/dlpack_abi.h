// The few structs of DLPack's C exchange interface that this module reads. Their layout is fixed by
// dmlc/dlpack, include/dlpack/dlpack.h, version 1.x; the version is checked before use.
#pragma once

#include <cstdint>

namespace gpt2f::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1, kCuda = 2;  // DLDeviceType

enum Code : uint8_t { kInt = 0, kUint = 1, kFloat = 2, kBfloat = 4 };

struct Version {
  uint32_t major, minor;
};

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null when contiguous
  uint64_t byte_offset;
};

struct ManagedTensor {  // what an unversioned capsule "dltensor" holds
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor*);
};

// What type(tensor).__dlpack_c_exchange_api__ holds. Its first fields are stable across versions.
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*tensor_from_object)(void* object, Tensor* out);  // may be null; borrows, no synchronisation
  void* current_stream;
};

}  // namespace gpt2f::dlpack

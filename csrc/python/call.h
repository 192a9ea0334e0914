// Where a single operation runs and gets its scratch memory: on threads of our own, or on the
// caller's CUDA stream with memory from the caller's allocator.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "core/buffer.h"
#include "core/kernels.h"
#include "core/thread_pool.h"
#include "python/arg.h"
#include "python/bindings.h"

namespace gpt2f {

// What operations on the CPU run on; the engine has its own.
struct OpBackend;
void set_op_backend(const std::string& isa, int threads);

class Call {
 public:
  // cuda: None for the CPU, or (stream as an integer, allocate(bytes) -> CUDA tensor).
  Call(const char* op, const pybind11::object& cuda);

  Where where() const { return where_; }
  bool cuda() const { return where_ == Where::kCuda; }
  const KernelTable& table() const;
  int64_t lanes() const;

  // Zeroed on the CPU, as the allocator leaves it on CUDA.
  template <typename T>
  T* take(int64_t bytes) {
    return static_cast<T*>(take_bytes(bytes));
  }

  // Refuses a product of a type that the device of `x` does not multiply.
  void check_product(const Arg& x) const;

  // Runs function(table, lane) on every lane, or once on the device that holds the arguments (null:
  // not given); what it launches there is in order with the caller's other work.
  template <typename Function>
  void run(std::initializer_list<const Arg*> arguments, const Function& function) {
    const auto work = [](const void* data, const KernelTable& table, const Lane& lane) {
      (*static_cast<const Function*>(data))(table, lane);
    };
    run_raw(device_of(arguments), work, &function);
  }

 private:
  using Work = void (*)(const void*, const KernelTable&, const Lane&);
  void* take_bytes(int64_t bytes);
  static int device_of(std::initializer_list<const Arg*> arguments);
  void run_raw(int device, Work work, const void* data);

  const char* const op_;
  Where where_ = Where::kCpu;
  std::shared_ptr<OpBackend> backend_;  // CPU
  void* stream_ = nullptr;
  pybind11::object allocate_;
  std::vector<Buffer> buffers_;
  std::vector<pybind11::object> tensors_;
};

}  // namespace gpt2f

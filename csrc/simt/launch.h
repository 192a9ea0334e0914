// What csrc/cuda/launch.h tells simt: which function stands behind a kernel's address, and how to
// call it with arguments that were copied when it was launched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"

namespace gpt2f::simt {

// A kernel did what a GPU would not forgive. The message names kernel, block, thread and line.
class KernelError : public Error {
 public:
  explicit KernelError(const std::string& message) : Error(ErrorKind::kDevice, message) {}
};

struct Kernel {
  const char* name = nullptr;
  const void* address = nullptr;
  std::vector<size_t> argument_bytes;
  void (*call)(const void* address, void* const* arguments) = nullptr;
};

const Kernel* find_kernel(const void* address);
void add_kernel(Kernel kernel);

// Not instrumented in the race build: the copies of the arguments are no memory of the kernel's.
template <typename... Parameters, size_t... I>
__attribute__((no_sanitize("thread"))) void call_kernel(const void* address, void* const* arguments,
                                                        std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Parameters...)>(const_cast<void*>(address))(
      *static_cast<Parameters*>(arguments[I])...);
}

template <typename... Parameters>
void register_kernel(const char* name, void (*kernel)(Parameters...)) {
  const void* address = reinterpret_cast<const void*>(kernel);
  if (find_kernel(address) != nullptr) return;
  add_kernel({name, address, {sizeof(Parameters)...}, [](const void* at, void* const* arguments) {
                call_kernel<Parameters...>(at, arguments, std::index_sequence_for<Parameters...>{});
              }});
}

}  // namespace gpt2f::simt

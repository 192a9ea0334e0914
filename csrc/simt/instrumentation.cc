// What the compiler calls for each load and store of code compiled with -fsanitize=thread. The
// program is linked without that sanitizer: its pass serves as instrumentation only.
#include <cstddef>
#include <cstdint>

#include "simt/race.h"

namespace {
void access(const void* address, size_t bytes, bool store, const void* code) {
  if (gpt2f::simt::kernel_code) gpt2f::simt::check_access(address, bytes, store, code);
}
}  // namespace

#define GPT2F_ACCESSES(bytes)                                                                \
  void __tsan_read##bytes(void* p) { access(p, bytes, false, __builtin_return_address(0)); } \
  void __tsan_write##bytes(void* p) { access(p, bytes, true, __builtin_return_address(0)); } \
  void __tsan_volatile_read##bytes(void* p) {                                                \
    access(p, bytes, false, __builtin_return_address(0));                                    \
  }                                                                                          \
  void __tsan_volatile_write##bytes(void* p) {                                               \
    access(p, bytes, true, __builtin_return_address(0));                                     \
  }                                                                                          \
  void __tsan_unaligned_read##bytes(void* p) {                                               \
    access(p, bytes, false, __builtin_return_address(0));                                    \
  }                                                                                          \
  void __tsan_unaligned_write##bytes(void* p) {                                              \
    access(p, bytes, true, __builtin_return_address(0));                                     \
  }

extern "C" {
void __tsan_init() { gpt2f::simt::instrumented = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
GPT2F_ACCESSES(1)
GPT2F_ACCESSES(2)
GPT2F_ACCESSES(4)
GPT2F_ACCESSES(8)
GPT2F_ACCESSES(16)
void __tsan_read_range(void* p, size_t bytes) {
  access(p, bytes, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t bytes) {
  access(p, bytes, true, __builtin_return_address(0));
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

// The guards of static variables in host code (launch caches).
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
uint32_t __tsan_atomic32_load(const volatile uint32_t* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
}

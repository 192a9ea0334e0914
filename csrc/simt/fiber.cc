#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

extern "C" void gpt2f_simt_switch(void** save, void* load);

// Saves what a function must leave as it found it, and takes up what the other fiber saved.
#if defined(__x86_64__)
asm(R"(
.text
.hidden gpt2f_simt_switch
.globl gpt2f_simt_switch
.type gpt2f_simt_switch,@function
gpt2f_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gpt2f_simt_switch,.-gpt2f_simt_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.hidden gpt2f_simt_switch
.globl gpt2f_simt_switch
.type gpt2f_simt_switch,%function
gpt2f_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size gpt2f_simt_switch,.-gpt2f_simt_switch
)");
#else
#error "simt has no context switch for this machine"
#endif

namespace gpt2f::simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 * 1024;  // its frames are several times larger
Fiber* left = nullptr;                      // the fiber that the running one came from
#else
constexpr size_t kStackBytes = 64 * 1024;
#endif
const size_t kPage = static_cast<size_t>(sysconf(_SC_PAGESIZE));

}  // namespace

Stacks::~Stacks() {
  for (char* slab : slabs_) munmap(slab, kSlab * (kStackBytes + kPage));
}

void Stacks::prepare(Fiber& fiber, size_t index, void (*entry)()) {
  while (slabs_.size() <= index / kSlab) {
    void* slab = mmap(nullptr, kSlab * (kStackBytes + kPage), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (slab == MAP_FAILED) throw std::bad_alloc();
    slabs_.push_back(static_cast<char*>(slab));
    for (size_t i = 0; i < kSlab; ++i) {
      if (mprotect(slabs_.back() + i * (kStackBytes + kPage), kPage, PROT_NONE) != 0) {
        throw std::bad_alloc();
      }
    }
  }
  fiber.stack = slabs_[index / kSlab] + index % kSlab * (kStackBytes + kPage) + kPage;
  fiber.stack_bytes = kStackBytes;
  fiber.sanitizer = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
  // Stacks that all began at the same place of a page would share a few lines of the L1 cache.
  const size_t colour = index * 5 % 32 * 64;
  auto* top = reinterpret_cast<uintptr_t*>(fiber.stack + kStackBytes - colour);
#if defined(__x86_64__)
  top -= 8;  // six registers, the entry, and no return address: aligned as behind a call
  for (int i = 0; i < 8; ++i) top[i] = 0;
  top[6] = reinterpret_cast<uintptr_t>(entry);
#else
  top -= 20;
  for (int i = 0; i < 20; ++i) top[i] = 0;
  top[11] = reinterpret_cast<uintptr_t>(entry);  // x30
#endif
  fiber.stack_pointer = top;
}

#if defined(__SANITIZE_ADDRESS__)
namespace {
// AddressSanitizer must know on which stack the program is. It also tells the bounds of the stack
// that the program came from: the host's own are learnt so.
void arrive(void* state) {
  const void* bottom = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(state, &bottom, &bytes);
  if (left->stack == nullptr) {
    left->stack = static_cast<char*>(const_cast<void*>(bottom));
    left->stack_bytes = bytes;
  }
}
}  // namespace

void switch_fiber(Fiber& from, Fiber& to, bool last) {
  left = &from;
  __sanitizer_start_switch_fiber(last ? nullptr : &from.sanitizer, to.stack, to.stack_bytes);
  gpt2f_simt_switch(&from.stack_pointer, to.stack_pointer);
  arrive(from.sanitizer);
}
void enter_fiber() { arrive(nullptr); }
#else
void switch_fiber(Fiber& from, Fiber& to, bool) {
  gpt2f_simt_switch(&from.stack_pointer, to.stack_pointer);
}
void enter_fiber() {}
#endif

}  // namespace gpt2f::simt

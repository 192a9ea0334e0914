// The floating-point state every kernel runs under: round to nearest even, denormals read and
// written as zero, no traps. VDPBF16PS works like that whatever the control register says, so the
// other instruction sets must as well; and weights full of denormals stay as fast as any other.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gpt2f {

class FpState {
 public:
#if defined(__x86_64__)
  FpState() : saved_(_mm_getcsr()) { _mm_setcsr(0x9FC0); }
  ~FpState() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
#elif defined(__aarch64__)
  FpState() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    const uint64_t flush = uint64_t{1} << 24;
    asm volatile("msr fpcr, %0" : : "r"(flush));
  }
  ~FpState() { asm volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_ = 0;
#else
  FpState() = default;

 private:
#endif
  FpState(const FpState&) = delete;
  FpState& operator=(const FpState&) = delete;
};

}  // namespace gpt2f

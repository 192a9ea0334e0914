// Rows of floats or bfloat16 behind one set of functions, so that kernels are written once.
#pragma once

namespace {

using gpt2f::DType;
using gpt2f::kLanes;
using gpt2f::Lane;
using gpt2f::Precision;
using gpt2f::Range;
using gpt2f::round_up;
using gpt2f::share;

constexpr Precision kFp32 = Precision::kFp32;
constexpr Precision kBf16 = Precision::kBf16;

template <Precision P>
struct OperandOf;
template <>
struct OperandOf<kFp32> {
  using Element = float;
};
template <>
struct OperandOf<kBf16> {
  using Element = uint16_t;
};
template <Precision P>
using Element = typename OperandOf<P>::Element;

template <Precision P>
inline Element<P>* at(void* base, int64_t index) {
  return static_cast<Element<P>*>(base) + index;
}
template <Precision P>
inline const Element<P>* at(const void* base, int64_t index) {
  return static_cast<const Element<P>*>(base) + index;
}

inline F load16(const float* p) { return fload(p); }
inline F load16(const uint16_t* p) { return bf16_load(p); }
inline void store16(float* p, F x) { fstore(p, x); }
inline void store16(uint16_t* p, F x) { bf16_store(p, x); }

// The same for the first n of 16 elements, without touching those behind; missing lanes are zero.
inline F load16(const float* p, int64_t n) { return fload(p, n > 16 ? 16 : static_cast<int>(n)); }
inline F load16(const uint16_t* p, int64_t n) {
  if (n >= 16) return bf16_load(p);
  uint16_t padded[16] = {};
  for (int64_t i = 0; i < n; ++i) padded[i] = p[i];
  return bf16_load(padded);
}
inline void store16(float* p, F x, int64_t n) { fstore(p, x, n > 16 ? 16 : static_cast<int>(n)); }
inline void store16(uint16_t* p, F x, int64_t n) {
  if (n >= 16) return store16(p, x);
  uint16_t padded[16];
  store16(padded, x);
  for (int64_t i = 0; i < n; ++i) p[i] = padded[i];
}

inline M first_clamped(int64_t n) { return first(n < 0 ? 0 : n > 16 ? 16 : static_cast<int>(n)); }

// acc + one operand word of each side.
template <Precision P>
inline F mac(F acc, U a, U b) {
  if constexpr (P == kFp32) {
    return ffma(as_f(a), as_f(b), acc);
  } else {
    return dot_pair(acc, a, b);
  }
}

// Asks for memory to come to the first cache.
[[gnu::always_inline]] inline void ask_for(const void* from, int64_t words) {
  const char* const line = static_cast<const char*>(from);
  for (int64_t i = 0; i < words * 4; i += 64) __builtin_prefetch(line + i);
}

}  // namespace

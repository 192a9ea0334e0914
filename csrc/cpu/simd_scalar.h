// Sixteen lanes in plain C++, for any processor. Same operations and results as the other simd_*.h:
// every float operation is the IEEE one, the fused multiply-add is the C library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

struct F {
  float v[16];
};
struct U {
  uint32_t v[16];
};
struct M {
  uint32_t v[16];  // all ones or zero
};

constexpr int kTileRows = 2;
constexpr int kTilePanelsOne = 1;
constexpr int kTilePanels = 1;
constexpr int kDotRows = 2;
constexpr int kFewRows = 2;
constexpr int kDotPanelsOne = 1;
constexpr int kDotPanels = 1;
constexpr int kDotPanelsBytes = 1;
constexpr int kAheadOne = 4096;
constexpr bool kDotAsks = false;
constexpr bool kDot16 = false;
constexpr bool kDotPair = false;

#define GPT2F_EACH(type, expression)                  \
  type out;                                           \
  for (int i = 0; i < 16; ++i) out.v[i] = expression; \
  return out

inline M first(int n) { GPT2F_EACH(M, i < n ? ~0u : 0u); }

inline F fset(float x) { GPT2F_EACH(F, x); }
inline F fload(const float* p) { GPT2F_EACH(F, p[i]); }
inline F fload(const float* p, int n) { GPT2F_EACH(F, i < n ? p[i] : 0.0f); }
inline void fstore(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline void fstore(float* p, F x, int n) { std::memcpy(p, x.v, sizeof(float) * (n > 16 ? 16 : n)); }
inline F fadd(F a, F b) { GPT2F_EACH(F, a.v[i] + b.v[i]); }
inline F fsub(F a, F b) { GPT2F_EACH(F, a.v[i] - b.v[i]); }
inline F fmul(F a, F b) { GPT2F_EACH(F, a.v[i] * b.v[i]); }
inline F fdiv(F a, F b) { GPT2F_EACH(F, a.v[i] / b.v[i]); }
inline F ffma(F a, F b, F c) { GPT2F_EACH(F, __builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
inline F fmax(F a, F b) { GPT2F_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline F fmin(F a, F b) { GPT2F_EACH(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline F fround(F a) { GPT2F_EACH(F, __builtin_nearbyintf(a.v[i])); }

inline U uset(uint32_t x) { GPT2F_EACH(U, x); }
inline U uload(const uint32_t* p) { GPT2F_EACH(U, p[i]); }
inline U uload(const uint32_t* p, int n) { GPT2F_EACH(U, i < n ? p[i] : 0u); }
inline void ustore(uint32_t* p, U x) { std::memcpy(p, x.v, sizeof x.v); }
inline U uadd(U a, U b) { GPT2F_EACH(U, a.v[i] + b.v[i]); }
inline U usub(U a, U b) { GPT2F_EACH(U, a.v[i] - b.v[i]); }
inline U uand(U a, U b) { GPT2F_EACH(U, a.v[i] & b.v[i]); }
inline U uor(U a, U b) { GPT2F_EACH(U, a.v[i] | b.v[i]); }
inline U uxor(U a, U b) { GPT2F_EACH(U, a.v[i] ^ b.v[i]); }
template <int kBits>
inline U ushl(U a) {
  GPT2F_EACH(U, a.v[i] << kBits);
}
template <int kBits>
inline U ushr(U a) {
  GPT2F_EACH(U, a.v[i] >> kBits);
}
inline U umul(U a, U b) { GPT2F_EACH(U, a.v[i] * b.v[i]); }
inline U umulhi(U a, U b) { GPT2F_EACH(U, uint32_t((uint64_t{a.v[i]} * b.v[i]) >> 32)); }
inline U uiota() { GPT2F_EACH(U, uint32_t(i)); }

inline U as_u(F a) {
  U out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
inline F as_f(U a) {
  F out;
  std::memcpy(out.v, a.v, sizeof out.v);
  return out;
}
// Out-of-range and NaN convert to the word the vector instructions give.
inline uint32_t to_word(float x) {
  return x >= -2147483648.0f && x < 2147483648.0f ? uint32_t(int32_t(x)) : 0x80000000u;
}
inline U to_u(F a) { GPT2F_EACH(U, to_word(a.v[i])); }
inline F to_f(U a) { GPT2F_EACH(F, float(int32_t(a.v[i]))); }

inline M fge(F a, F b) { GPT2F_EACH(M, a.v[i] >= b.v[i] ? ~0u : 0u); }
inline M fgt(F a, F b) { GPT2F_EACH(M, a.v[i] > b.v[i] ? ~0u : 0u); }
inline M fnan(F a) { GPT2F_EACH(M, a.v[i] != a.v[i] ? ~0u : 0u); }
inline M ueq(U a, U b) { GPT2F_EACH(M, a.v[i] == b.v[i] ? ~0u : 0u); }
inline M mand(M a, M b) { GPT2F_EACH(M, a.v[i] & b.v[i]); }
inline uint32_t bits(M m) {
  uint32_t out = 0;
  for (int i = 0; i < 16; ++i) out |= (m.v[i] & 1u) << i;
  return out;
}
inline F fselect(M m, F yes, F no) { GPT2F_EACH(F, m.v[i] ? yes.v[i] : no.v[i]); }
inline U uselect(M m, U yes, U no) { GPT2F_EACH(U, m.v[i] ? yes.v[i] : no.v[i]); }

// p 2^n for integral n in -127 ... 128, below the smallest normal float 0; NaN if p and n are.
inline F fscale(F p, F n) {
  const U both = uadd(to_u(n), uset(2 * 127));  // in two steps: 2^128 is no float
  const U one = ushr<1>(both);
  return fmul(fmul(p, as_f(ushl<23>(one))), as_f(ushl<23>(usub(both, one))));
}

inline F bf16_load(const uint16_t* p) {
  U x;
  for (int i = 0; i < 16; ++i) x.v[i] = uint32_t{p[i]} << 16;
  return as_f(x);
}
inline void bf16_store_words(uint16_t* p, U upper) {
  for (int i = 0; i < 16; ++i) p[i] = uint16_t(upper.v[i] >> 16);
}

inline F dot_pair(F acc, U a, U b) {
  const U upper = uset(0xFFFF0000u);
  acc = ffma(as_f(uand(a, upper)), as_f(uand(b, upper)), acc);
  return ffma(as_f(ushl<16>(a)), as_f(ushl<16>(b)), acc);
}

inline void store_bytes(uint8_t* p, U a) {
  for (int i = 0; i < 16; ++i) p[i] = uint8_t(a.v[i]);
}

inline F load_bytes(const int8_t* p) {
  F out;
  for (int i = 0; i < 16; ++i) out.v[i] = float(p[i]);
  return out;
}

// out += u . x over four neighbours in K of sixteen outputs.
template <int kShift, int kMask>
inline void dot_four(U& out, const uint8_t* w, const uint32_t* x) {
  int8_t four[4];
  std::memcpy(four, x, sizeof four);
  for (int i = 0; i < 16; ++i) {
    int sum = 0;
    for (int k = 0; k < 4; ++k) sum += (w[4 * i + k] >> kShift & kMask) * four[k];
    out.v[i] += uint32_t(sum);
  }
}

template <int R, int N>
inline void dot_bytes(const uint8_t* w, const uint32_t* x, int64_t x_row, U (&out)[R][N]) {
  for (int s = 0; s < 16; ++s) {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) {
        dot_four<0, 255>(out[r][n], w + n * 1024 + s * 64, x + r * x_row + s);
      }
    }
  }
}

template <int R, int N>
inline void dot_nibbles(const uint8_t* w, const uint32_t* x, int64_t x_row, U (&out)[R][N]) {
  for (int s = 0; s < 4; ++s) {
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) {
        dot_four<0, 15>(out[r][n], w + n * 256 + s * 64, x + r * x_row + 2 * s);
        dot_four<4, 15>(out[r][n], w + n * 256 + s * 64, x + r * x_row + 2 * s + 1);
      }
    }
  }
}

inline void lanes(F a, float out[16]) { fstore(out, a); }

inline float fsum(F a) {
  for (int half = 8; half >= 1; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] + a.v[i + half];
  }
  return a.v[0];
}

inline float fmost(F a) {
  float most = a.v[0];
  for (int i = 1; i < 16; ++i) most = a.v[i] > most ? a.v[i] : most;
  return most;
}
#undef GPT2F_EACH

}  // namespace

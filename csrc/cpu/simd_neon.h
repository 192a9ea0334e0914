// Sixteen lanes in four NEON registers. Same operations and results as the other simd_*.h.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct F {
  float32x4_t v[4];
};
struct U {
  uint32x4_t v[4];
};
struct M {
  uint32x4_t v[4];  // all ones or zero
};

constexpr int kTileRows = 6;
constexpr int kTilePanelsOne = 4;
constexpr int kTilePanels = 1;
constexpr int kDotRows = 4;
constexpr int kFewRows = 4;
constexpr int kDotPanelsOne = 1;
constexpr int kDotPanels = 1;
constexpr int kDotPanelsBytes = 1;
constexpr int kAheadOne = 4096;
constexpr bool kDotAsks = false;
constexpr bool kDot16 = false;
constexpr bool kDotPair = false;

#define GPT2F_EACH(type, expression)                 \
  type out;                                          \
  for (int i = 0; i < 4; ++i) out.v[i] = expression; \
  return out

inline U uiota() {
  alignas(16) static constexpr uint32_t kFirst[4] = {0, 1, 2, 3};
  GPT2F_EACH(U, vaddq_u32(vld1q_u32(kFirst), vdupq_n_u32(4u * unsigned(i))));
}
inline M first(int n) {
  const U lane = uiota();
  GPT2F_EACH(M, vcltq_u32(lane.v[i], vdupq_n_u32(unsigned(n))));
}

inline F fset(float x) { GPT2F_EACH(F, vdupq_n_f32(x)); }
inline F fload(const float* p) { GPT2F_EACH(F, vld1q_f32(p + 4 * i)); }
inline F fload(const float* p, int n) {
  if (n >= 16) return fload(p);
  float padded[16] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return fload(padded);
}
inline void fstore(float* p, F x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
}
inline void fstore(float* p, F x, int n) {
  if (n >= 16) return fstore(p, x);
  float all[16];
  fstore(all, x);
  for (int i = 0; i < n; ++i) p[i] = all[i];
}
inline F fadd(F a, F b) { GPT2F_EACH(F, vaddq_f32(a.v[i], b.v[i])); }
inline F fsub(F a, F b) { GPT2F_EACH(F, vsubq_f32(a.v[i], b.v[i])); }
inline F fmul(F a, F b) { GPT2F_EACH(F, vmulq_f32(a.v[i], b.v[i])); }
inline F fdiv(F a, F b) { GPT2F_EACH(F, vdivq_f32(a.v[i], b.v[i])); }
inline F ffma(F a, F b, F c) { GPT2F_EACH(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
// a > b ? a : b, and a < b ? a : b, also when one is NaN: vmaxq would return the NaN.
inline F fmax(F a, F b) { GPT2F_EACH(F, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline F fmin(F a, F b) { GPT2F_EACH(F, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
inline F fround(F a) { GPT2F_EACH(F, vrndnq_f32(a.v[i])); }

inline U uset(uint32_t x) { GPT2F_EACH(U, vdupq_n_u32(x)); }
inline U uload(const uint32_t* p) { GPT2F_EACH(U, vld1q_u32(p + 4 * i)); }
inline U uload(const uint32_t* p, int n) {
  uint32_t padded[16] = {};
  for (int i = 0; i < n && i < 16; ++i) padded[i] = p[i];
  return uload(padded);
}
inline void ustore(uint32_t* p, U x) {
  for (int i = 0; i < 4; ++i) vst1q_u32(p + 4 * i, x.v[i]);
}
inline U uadd(U a, U b) { GPT2F_EACH(U, vaddq_u32(a.v[i], b.v[i])); }
inline U usub(U a, U b) { GPT2F_EACH(U, vsubq_u32(a.v[i], b.v[i])); }
inline U uand(U a, U b) { GPT2F_EACH(U, vandq_u32(a.v[i], b.v[i])); }
inline U uor(U a, U b) { GPT2F_EACH(U, vorrq_u32(a.v[i], b.v[i])); }
inline U uxor(U a, U b) { GPT2F_EACH(U, veorq_u32(a.v[i], b.v[i])); }
template <int kBits>
inline U ushl(U a) {
  GPT2F_EACH(U, vshlq_n_u32(a.v[i], kBits));
}
template <int kBits>
inline U ushr(U a) {
  GPT2F_EACH(U, vshrq_n_u32(a.v[i], kBits));
}
inline U umul(U a, U b) { GPT2F_EACH(U, vmulq_u32(a.v[i], b.v[i])); }
inline uint32x4_t umulhi4(uint32x4_t a, uint32x4_t b) {
  const uint64x2_t low = vmull_u32(vget_low_u32(a), vget_low_u32(b));
  const uint64x2_t high = vmull_high_u32(a, b);
  return vcombine_u32(vshrn_n_u64(low, 32), vshrn_n_u64(high, 32));
}
inline U umulhi(U a, U b) { GPT2F_EACH(U, umulhi4(a.v[i], b.v[i])); }

inline U as_u(F a) { GPT2F_EACH(U, vreinterpretq_u32_f32(a.v[i])); }
inline F as_f(U a) { GPT2F_EACH(F, vreinterpretq_f32_u32(a.v[i])); }
// Integral floats below 2^31. NaN gives 0 here and 0x80000000 elsewhere: both shift out in fscale.
inline U to_u(F a) { GPT2F_EACH(U, vreinterpretq_u32_s32(vcvtnq_s32_f32(a.v[i]))); }
inline F to_f(U a) { GPT2F_EACH(F, vcvtq_f32_s32(vreinterpretq_s32_u32(a.v[i]))); }

inline M fge(F a, F b) { GPT2F_EACH(M, vcgeq_f32(a.v[i], b.v[i])); }
inline M fgt(F a, F b) { GPT2F_EACH(M, vcgtq_f32(a.v[i], b.v[i])); }
inline M fnan(F a) { GPT2F_EACH(M, vmvnq_u32(vceqq_f32(a.v[i], a.v[i]))); }
inline M ueq(U a, U b) { GPT2F_EACH(M, vceqq_u32(a.v[i], b.v[i])); }
inline M mand(M a, M b) { GPT2F_EACH(M, vandq_u32(a.v[i], b.v[i])); }
inline uint32_t bits(M m) {
  uint32_t each[16], out = 0;
  for (int i = 0; i < 4; ++i) vst1q_u32(each + 4 * i, m.v[i]);
  for (int i = 0; i < 16; ++i) out |= (each[i] & 1u) << i;
  return out;
}
inline F fselect(M m, F yes, F no) { GPT2F_EACH(F, vbslq_f32(m.v[i], yes.v[i], no.v[i])); }
inline U uselect(M m, U yes, U no) { GPT2F_EACH(U, vbslq_u32(m.v[i], yes.v[i], no.v[i])); }

// p 2^n for integral n in -127 ... 128, below the smallest normal float 0; NaN if p and n are.
inline F fscale(F p, F n) {
  const U both = uadd(to_u(n), uset(2 * 127));  // in two steps: 2^128 is no float
  const U one = ushr<1>(both);
  return fmul(fmul(p, as_f(ushl<23>(one))), as_f(ushl<23>(usub(both, one))));
}

inline F bf16_load(const uint16_t* p) {
  GPT2F_EACH(F, vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)));
}
inline void bf16_store_words(uint16_t* p, U upper) {
  for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vshrn_n_u32(upper.v[i], 16));
}

inline F dot_pair(F acc, U a, U b) {
  const U upper = uset(0xFFFF0000u);
  acc = ffma(as_f(uand(a, upper)), as_f(uand(b, upper)), acc);
  return ffma(as_f(ushl<16>(a)), as_f(ushl<16>(b)), acc);
}

inline void store_bytes(uint8_t* p, U a) {
  for (int i = 0; i < 4; i += 2) {
    const uint16x8_t shorts = vcombine_u16(vmovn_u32(a.v[i]), vmovn_u32(a.v[i + 1]));
    vst1_u8(p + 4 * i, vmovn_u16(shorts));
  }
}

inline F load_bytes(const int8_t* p) {
  F out;
  for (int i = 0; i < 4; i += 2) {
    const int16x8_t shorts = vmovl_s8(vld1_s8(p + 4 * i));
    out.v[i] = vcvtq_f32_s32(vmovl_s16(vget_low_s16(shorts)));
    out.v[i + 1] = vcvtq_f32_s32(vmovl_high_s16(shorts));
  }
  return out;
}

// Sums of four outputs from their bytes, signed, and four activations: pairs of products fit into
// 16 bits.
inline uint32x4_t dot_quarter(int8x16_t w, uint32_t x) {
  const int8x8_t four = vreinterpret_s8_u32(vdup_n_u32(x));
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), four));
  const int32x4_t high = vpaddlq_s16(vmull_s8(vget_high_s8(w), four));
  return vreinterpretq_u32_s32(vpaddq_s32(low, high));
}

// The products are taken with u - 128, which is what `out` corrects for where bytes are unsigned.
template <int R, int N>
inline void dot_bytes(const uint8_t* w, const uint32_t* x, int64_t x_row, U (&out)[R][N]) {
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) out[r][n] = uset(0);
  }
  for (int s = 0; s < 16; ++s) {
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t u = vld1q_u8(w + n * 1024 + s * 64 + i * 16);
        const int8x16_t v = vreinterpretq_s8_u8(veorq_u8(u, vdupq_n_u8(128)));
        for (int r = 0; r < R; ++r) {
          out[r][n].v[i] = vaddq_u32(out[r][n].v[i], dot_quarter(v, x[r * x_row + s]));
        }
      }
    }
  }
}

template <int R, int N>
inline void dot_nibbles(const uint8_t* w, const uint32_t* x, int64_t x_row, U (&out)[R][N]) {
  for (int s = 0; s < 4; ++s) {
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < 4; ++i) {
        const uint8x16_t u = vld1q_u8(w + n * 256 + s * 64 + i * 16);
        const int8x16_t low = vreinterpretq_s8_u8(vandq_u8(u, vdupq_n_u8(15)));
        const int8x16_t high = vreinterpretq_s8_u8(vshrq_n_u8(u, 4));
        for (int r = 0; r < R; ++r) {
          const uint32_t* const four = x + r * x_row + 2 * s;
          const uint32x4_t sum = vaddq_u32(dot_quarter(low, four[0]), dot_quarter(high, four[1]));
          out[r][n].v[i] = vaddq_u32(out[r][n].v[i], sum);
        }
      }
    }
  }
}

inline void lanes(F a, float out[16]) { fstore(out, a); }

// The tree of the other instruction sets: lane i + lane i+8, then +4, +2, +1.
inline float fsum(F a) {
  const float32x4_t x4 = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  const float32x2_t x2 = vadd_f32(vget_low_f32(x4), vget_high_f32(x4));
  return vget_lane_f32(x2, 0) + vget_lane_f32(x2, 1);
}

inline float fmost(F a) {
  return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[2]), vmaxq_f32(a.v[1], a.v[3])));
}
#undef GPT2F_EACH

}  // namespace

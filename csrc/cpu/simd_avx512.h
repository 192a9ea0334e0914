// Sixteen lanes in one AVX-512 register. The operations, and only these, are what kernels use;
// every simd_*.h has the same ones with the same results, bit for bit.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

using F = __m512;     // 16 floats
using U = __m512i;    // 16 32-bit words
using M = __mmask16;  // 16 conditions

constexpr int kTileRows = 6;      // rows a product keeps in registers
constexpr int kTilePanelsOne = 4; // panels beside one row
constexpr int kTilePanels = 4;    // panels beside several rows
// The same for integer products, which hold the sums of a group beside the sums of the row.
constexpr int kDotRows = 6;
constexpr int kFewRows = 12;  // beside one panel, where memory sets the pace
constexpr int kDotPanelsOne = 4;
constexpr int kDotPanels = 2;
constexpr int kAheadOne = 4096;  // bytes that a product of one row asks for before it comes to them
#if defined(__AVX512VNNI__)
constexpr bool kDot16 = false;  // activations beside 8-bit weights are bytes, or 16 bits wide
constexpr bool kDotAsks = true;  // dot_bytes asks for memory on its way
// Panels of 8-bit weights beside several rows. With four, the sums of the rows do not fit beside
// those of the group and wait on the stack: 38 instructions for 24 products instead of 23 for 12.
// Processors that issue four a cycle, of which two may be products, gain by that; later ones issue
// more, and on Zen 5 every store of 64 bytes costs a product and a half.
#if defined(__AVX512BF16__)
constexpr int kDotPanelsBytes = kDotPanels;
#else
constexpr int kDotPanelsBytes = 4;
#endif
#else
constexpr int kDotPanelsBytes = kDotPanels;
constexpr bool kDot16 = true;
constexpr bool kDotAsks = false;
#endif
#if defined(__AVX512BF16__)
constexpr bool kDotPair = true;  // dot_pair is one instruction
#else
constexpr bool kDotPair = false;
#endif

inline M first(int n) { return n >= 16 ? M(0xFFFF) : M((1u << n) - 1); }

inline F fset(float x) { return _mm512_set1_ps(x); }
inline F fload(const float* p) { return _mm512_loadu_ps(p); }
inline F fload(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }
inline void fstore(float* p, F x) { _mm512_storeu_ps(p, x); }
inline void fstore(float* p, F x, int n) { _mm512_mask_storeu_ps(p, first(n), x); }
inline F fadd(F a, F b) { return _mm512_add_ps(a, b); }
inline F fsub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F fmul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fdiv(F a, F b) { return _mm512_div_ps(a, b); }
inline F ffma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F fmax(F a, F b) { return _mm512_max_ps(a, b); }  // a > b ? a : b
inline F fmin(F a, F b) { return _mm512_min_ps(a, b); }  // a < b ? a : b
inline F fround(F a) { return _mm512_roundscale_ps(a, 8); }  // to nearest even integer

inline U uset(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline U uload(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline U uload(const uint32_t* p, int n) { return _mm512_maskz_loadu_epi32(first(n), p); }
inline void ustore(uint32_t* p, U x) { _mm512_storeu_si512(p, x); }
inline U uadd(U a, U b) { return _mm512_add_epi32(a, b); }
inline U usub(U a, U b) { return _mm512_sub_epi32(a, b); }
inline U uand(U a, U b) { return _mm512_and_si512(a, b); }
inline U uor(U a, U b) { return _mm512_or_si512(a, b); }
inline U uxor(U a, U b) { return _mm512_xor_si512(a, b); }
template <int kBits>
inline U ushl(U a) {
  return _mm512_slli_epi32(a, kBits);
}
template <int kBits>
inline U ushr(U a) {
  return _mm512_srli_epi32(a, kBits);
}
inline U umul(U a, U b) { return _mm512_mullo_epi32(a, b); }
inline U umulhi(U a, U b) {  // upper half of the 64-bit product
  const U even = _mm512_srli_epi64(_mm512_mul_epu32(a, b), 32);
  const U odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), _mm512_srli_epi64(b, 32));
  return _mm512_mask_blend_epi32(0xAAAA, even, odd);
}
inline U uiota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }

inline U as_u(F a) { return _mm512_castps_si512(a); }
inline F as_f(U a) { return _mm512_castsi512_ps(a); }
inline U to_u(F a) { return _mm512_cvtps_epi32(a); }  // integral floats below 2^31
inline F to_f(U a) { return _mm512_cvtepi32_ps(a); }  // words below 2^31

// p 2^n for integral n in -127 ... 128, below the smallest normal float 0; NaN if p and n are.
inline F fscale(F p, F n) { return _mm512_scalef_ps(p, n); }

inline M fge(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline M fgt(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline M fnan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
inline M ueq(U a, U b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline M mand(M a, M b) { return M(a & b); }
inline uint32_t bits(M m) { return m; }
inline F fselect(M m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
inline U uselect(M m, U yes, U no) { return _mm512_mask_blend_epi32(m, no, yes); }

// 16 bfloat16 as floats, and back (round to nearest even; the caller keeps NaN out or quiet).
inline F bf16_load(const uint16_t* p) {
  return as_f(ushl<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p))));
}
inline void bf16_store_words(uint16_t* p, U upper) {  // upper halves of the words
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper, 16)));
}
#if defined(__AVX512BF16__)
// Sixteen numbers that are not denormal as bfloat16; every NaN the same.
inline __m256i bf16_halves(F a) {
  return _mm256_mask_mov_epi16((__m256i)_mm512_cvtneps_pbh(a),
                               _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), _mm256_set1_epi16(0x7FC0));
}
#endif

// acc + the product of two pairs of bfloat16: fma of the odd pair first, then of the even pair,
// each rounded to float, denormals flushed.
inline F dot_pair(F acc, U a, U b) {
#if defined(__AVX512BF16__)
  return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
#else
  const U upper = uset(0xFFFF0000u);
  acc = ffma(as_f(uand(a, upper)), as_f(uand(b, upper)), acc);
  return ffma(as_f(ushl<16>(a)), as_f(ushl<16>(b)), acc);
#endif
}

inline void store_bytes(uint8_t* p, U a) {  // low bytes of the words
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a));
}

inline F load_bytes(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}

// A sum that GCC is to keep in one register, in the order written: it regroups sums of integers
// until it runs out of registers.
inline void hold([[maybe_unused]] U& sum) {
#if defined(__AVX512F__)
  asm("" : "+v"(sum));
#endif
}

// Loads of memory before and behind this stay there. GCC mixes those of neighbouring panels, and
// the processor stops fetching ahead: one row of int8 then takes twice as long.
inline void keep_load_order() {
#if defined(__AVX512F__)
  asm volatile("" ::: "memory");
#endif
}

#if !defined(__AVX512VNNI__)
// Sums of neighbours of a, then of b, within each 128 bits: the four sums of outputs in order.
inline U add_neighbours(U a, U b) {
  const F x = as_f(a), y = as_f(b);
  return uadd(as_u(_mm512_shuffle_ps(x, y, 0x88)), as_u(_mm512_shuffle_ps(x, y, 0xDD)));
}
#endif

// out[r][n] += sum of u_k x_k over a group of 64; u bytes [16][16 outputs][4] of panels 1024 bytes
// apart, x as kDot16 says. On the way kAsked bytes from `ahead` are asked for.
template <int R, int N, int kAsked = 0>
[[gnu::always_inline]] inline void dot_bytes(const uint8_t* w, const uint32_t* x, int64_t x_row,
                                             U (&out)[R][N],
                                             [[maybe_unused]] const uint32_t* ahead = nullptr) {
#if defined(__AVX512VNNI__)
  if constexpr (R == 1) {  // in the order of memory
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
      for (int s = 0; s < 16; ++s) {
        __builtin_prefetch(w + n * 1024 + s * 64 + kAheadOne);
        const U panel = _mm512_loadu_si512(w + n * 1024 + s * 64);
        out[0][n] = _mm512_dpbusd_epi32(out[0][n], panel, uset(x[s]));
      }
      keep_load_order();
    }
    return;
  }
  for (int s = 0; s < 16; ++s) {
    if constexpr (kAsked > 0) {
      __builtin_prefetch(reinterpret_cast<const uint8_t*>(ahead) + s * (kAsked / 16));
    }
    U panel[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) panel[n] = _mm512_loadu_si512(w + n * 1024 + s * 64);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const U xs = uset(x[r * x_row + s]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        out[r][n] = _mm512_dpbusd_epi32(out[r][n], panel[n], xs);
        hold(out[r][n]);
      }
    }
  }
#else
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    U low[R], high[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) low[r] = high[r] = uset(0);
    for (int s = 0; s < 16; ++s) {
      if constexpr (R == 1) __builtin_prefetch(w + n * 1024 + s * 64 + kAheadOne);
      const U v = _mm512_loadu_si512(w + n * 1024 + s * 64);
      const U v0 = _mm512_unpacklo_epi8(v, uset(0)), v1 = _mm512_unpackhi_epi8(v, uset(0));
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        long long pair;
        __builtin_memcpy(&pair, x + r * x_row + 2 * s, sizeof pair);
        const U xs = _mm512_set1_epi64(pair);
        low[r] = uadd(low[r], _mm512_madd_epi16(v0, xs));
        high[r] = uadd(high[r], _mm512_madd_epi16(v1, xs));
        hold(low[r]);
        hold(high[r]);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) out[r][n] = uadd(out[r][n], add_neighbours(low[r], high[r]));
  }
#endif
}

// The same over a group of 32; u nibbles, bytes [4][16 outputs][4] of panels 256 bytes apart: the
// low halves come first. x bytes.
template <int R, int N>
[[gnu::always_inline]] inline void dot_nibbles(const uint8_t* w, const uint32_t* x, int64_t x_row,
                                               U (&out)[R][N]) {
  const U mask = uset(0x0F0F0F0Fu);
#if defined(__AVX512VNNI__)
  if constexpr (R == 1) {  // in the order of memory
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 4
      for (int s = 0; s < 4; ++s) {
        __builtin_prefetch(w + n * 256 + s * 64 + kAheadOne);
        const U v = _mm512_loadu_si512(w + n * 256 + s * 64);
        out[0][n] = _mm512_dpbusd_epi32(out[0][n], uand(v, mask), uset(x[2 * s]));
        out[0][n] = _mm512_dpbusd_epi32(out[0][n], uand(ushr<4>(v), mask), uset(x[2 * s + 1]));
      }
      keep_load_order();
    }
    return;
  }
#else
  U sums[R][N];  // 16-bit: sixteen products of at most 15 * 127 stay below 2^15
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = uset(0);
  }
#endif
  for (int s = 0; s < 4; ++s) {
    U low[N], high[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if constexpr (R == 1) __builtin_prefetch(w + n * 256 + s * 64 + kAheadOne);
      const U v = _mm512_loadu_si512(w + n * 256 + s * 64);
      low[n] = uand(v, mask);
      high[n] = uand(ushr<4>(v), mask);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const U x0 = uset(x[r * x_row + 2 * s]), x1 = uset(x[r * x_row + 2 * s + 1]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
#if defined(__AVX512VNNI__)
        out[r][n] = _mm512_dpbusd_epi32(out[r][n], low[n], x0);
        out[r][n] = _mm512_dpbusd_epi32(out[r][n], high[n], x1);
        hold(out[r][n]);
#else
        sums[r][n] = _mm512_add_epi16(sums[r][n], _mm512_maddubs_epi16(low[n], x0));
        sums[r][n] = _mm512_add_epi16(sums[r][n], _mm512_maddubs_epi16(high[n], x1));
        hold(sums[r][n]);
#endif
      }
    }
  }
#if !defined(__AVX512VNNI__)
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      out[r][n] = uadd(out[r][n], _mm512_madd_epi16(sums[r][n], _mm512_set1_epi16(1)));
    }
  }
#endif
}

inline void lanes(F a, float out[16]) { _mm512_storeu_ps(out, a); }

// The tree every sum over lanes uses: lane i + lane i+8, then +4, +2, +1.
inline float fsum(F a) {
  const __m256 x8 = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_add_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}

// The largest; none may be NaN.
inline float fmost(F a) {
  const __m256 x8 = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_max_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}

}  // namespace

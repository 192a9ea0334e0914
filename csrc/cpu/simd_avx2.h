// Sixteen lanes in two AVX registers. Same operations and results as the other simd_*.h.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct F {
  __m256 lo, hi;
};
struct U {
  __m256i lo, hi;
};
struct M {
  __m256 lo, hi;
};

constexpr int kTileRows = 6;
constexpr int kTilePanelsOne = 4;
constexpr int kTilePanels = 1;

inline __m256i first8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline M first(int n) {
  return {_mm256_castsi256_ps(first8(n)), _mm256_castsi256_ps(first8(n - 8))};
}

inline F fset(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F fload(const float* p, int n) {
  if (n >= 16) return fload(p);
  if (n <= 8) return {_mm256_maskload_ps(p, first8(n)), _mm256_setzero_ps()};
  return {_mm256_loadu_ps(p), _mm256_maskload_ps(p + 8, first8(n - 8))};
}
inline void fstore(float* p, F x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
inline void fstore(float* p, F x, int n) {
  if (n >= 16) return fstore(p, x);
  _mm256_maskstore_ps(p, first8(n), x.lo);
  if (n > 8) _mm256_maskstore_ps(p + 8, first8(n - 8), x.hi);
}
#define GPT2F_BOTH(name, type, op, a, b) \
  inline type name(type a, type b) { return {op(a.lo, b.lo), op(a.hi, b.hi)}; }
GPT2F_BOTH(fadd, F, _mm256_add_ps, a, b)
GPT2F_BOTH(fsub, F, _mm256_sub_ps, a, b)
GPT2F_BOTH(fmul, F, _mm256_mul_ps, a, b)
GPT2F_BOTH(fdiv, F, _mm256_div_ps, a, b)
GPT2F_BOTH(fmax, F, _mm256_max_ps, a, b)
GPT2F_BOTH(fmin, F, _mm256_min_ps, a, b)
GPT2F_BOTH(uadd, U, _mm256_add_epi32, a, b)
GPT2F_BOTH(usub, U, _mm256_sub_epi32, a, b)
GPT2F_BOTH(uand, U, _mm256_and_si256, a, b)
GPT2F_BOTH(uor, U, _mm256_or_si256, a, b)
GPT2F_BOTH(uxor, U, _mm256_xor_si256, a, b)
GPT2F_BOTH(umul, U, _mm256_mullo_epi32, a, b)
GPT2F_BOTH(mand, M, _mm256_and_ps, a, b)
#undef GPT2F_BOTH
inline F ffma(F a, F b, F c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F fround(F a) { return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)}; }

inline U uset(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
inline U uload(const uint32_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))};
}
inline U uload(const uint32_t* p, int n) {
  const F x = fload(reinterpret_cast<const float*>(p), n);
  return {_mm256_castps_si256(x.lo), _mm256_castps_si256(x.hi)};
}
inline void ustore(uint32_t* p, U x) {
  _mm256_storeu_si256((__m256i*)p, x.lo);
  _mm256_storeu_si256((__m256i*)(p + 8), x.hi);
}
template <int kBits>
inline U ushl(U a) {
  return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)};
}
template <int kBits>
inline U ushr(U a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
inline __m256i umulhi8(__m256i a, __m256i b) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a, b), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), _mm256_srli_epi64(b, 32));
  return _mm256_blend_epi32(even, odd, 0xAA);
}
inline U umulhi(U a, U b) { return {umulhi8(a.lo, b.lo), umulhi8(a.hi, b.hi)}; }
inline U uiota() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
          _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}

inline U as_u(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
inline F as_f(U a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
inline U to_u(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F to_f(U a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }

inline M fge(F a, F b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GE_OQ)};
}
inline M fgt(F a, F b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_GT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_GT_OQ)};
}
inline M fnan(F a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline M ueq(U a, U b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.lo, b.lo)),
          _mm256_castsi256_ps(_mm256_cmpeq_epi32(a.hi, b.hi))};
}
inline uint32_t bits(M m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) |
         static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
inline F fselect(M m, F yes, F no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
inline U uselect(M m, U yes, U no) { return as_u(fselect(m, as_f(yes), as_f(no))); }

inline F bf16_load(const uint16_t* p) {
  const U x = {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)),
               _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8)))};
  return as_f(ushl<16>(x));
}
inline void bf16_store_words(uint16_t* p, U upper) {
  const U x = ushr<16>(upper);
  const __m256i packed = _mm256_packus_epi32(x.lo, x.hi);  // lo0 hi0 lo1 hi1
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xD8));
}

inline F dot_pair(F acc, U a, U b) {
  const U upper = uset(0xFFFF0000u);
  acc = ffma(as_f(uand(a, upper)), as_f(uand(b, upper)), acc);
  return ffma(as_f(ushl<16>(a)), as_f(ushl<16>(b)), acc);
}

inline void lanes(F a, float out[16]) { fstore(out, a); }

inline float fsum(F a) {
  const __m256 x8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_add_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}

}  // namespace

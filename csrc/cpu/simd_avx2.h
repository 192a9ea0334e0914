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
constexpr int kDotRows = 6;
constexpr int kFewRows = 6;
constexpr int kDotPanelsOne = 4;
constexpr int kDotPanels = 1;
constexpr int kDotPanelsBytes = 1;
constexpr int kAheadOne = 4096;
constexpr bool kDotAsks = false;
constexpr bool kDotPair = false;
#if defined(__AVXVNNI__)
constexpr bool kDot16 = false;
#else
constexpr bool kDot16 = true;
#endif

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

// p 2^n for integral n in -127 ... 128, below the smallest normal float 0; NaN if p and n are.
inline F fscale(F p, F n) {
  const U both = uadd(to_u(n), uset(2 * 127));  // in two steps: 2^128 is no float
  const U one = ushr<1>(both);
  return fmul(fmul(p, as_f(ushl<23>(one))), as_f(ushl<23>(usub(both, one))));
}

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

inline void store_bytes(uint8_t* p, U a) {
  const __m256i byte = _mm256_set1_epi32(0xFF);
  const __m256i shorts = _mm256_packus_epi32(_mm256_and_si256(a.lo, byte),
                                             _mm256_and_si256(a.hi, byte));  // lo0 hi0 lo1 hi1
  const __m256i in_order = _mm256_permute4x64_epi64(shorts, 0xD8);
  _mm_storeu_si128((__m128i*)p, _mm_packus_epi16(_mm256_castsi256_si128(in_order),
                                                 _mm256_extracti128_si256(in_order, 1)));
}

inline F load_bytes(const int8_t* p) {
  const __m128i low = _mm_loadl_epi64((const __m128i*)p);
  const __m128i high = _mm_loadl_epi64((const __m128i*)(p + 8));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high))};
}

#if defined(__AVXVNNI__)
// H times eight outputs of a panel; many rows as few.
constexpr bool kHalvesTogether = true;

// out[h][r] += products of the weights v[h] and a word of row r.
template <int R, int H>
[[gnu::always_inline]] inline void dot_add(const __m256i (&v)[H], const uint32_t* x, int64_t x_row,
                                           __m256i (&out)[H][R]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const __m256i xs = _mm256_set1_epi32(static_cast<int>(x[r * x_row]));
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      out[h][r] = _mm256_dpbusd_avx_epi32(out[h][r], v[h], xs);
      asm("" : "+x"(out[h][r]));  // in the order written: GCC would keep copies of the sums
    }
  }
}

template <int R, int H>
[[gnu::always_inline]] inline void clear(__m256i (&out)[H][R]) {
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) out[h][r] = _mm256_setzero_si256();
  }
}

template <int R, int H>
[[gnu::always_inline]] inline void dot_bytes_part(const uint8_t* w, const uint32_t* x,
                                                  int64_t x_row, __m256i (&out)[H][R]) {
  clear(out);
#pragma GCC unroll 1
  for (int s = 0; s < 16; ++s) {
    if constexpr (R == 1) __builtin_prefetch(w + s * 64 + kAheadOne);
    __m256i v[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) v[h] = _mm256_loadu_si256((const __m256i*)(w + s * 64 + h * 32));
    dot_add(v, x + s, x_row, out);
  }
}

template <int R, int H>
[[gnu::always_inline]] inline void dot_nibbles_part(const uint8_t* w, const uint32_t* x,
                                                    int64_t x_row, __m256i (&out)[H][R]) {
  const __m256i mask = _mm256_set1_epi8(15);
  clear(out);
#pragma GCC unroll 1
  for (int s = 0; s < 4; ++s) {
    if constexpr (R == 1) __builtin_prefetch(w + s * 64 + kAheadOne);
    // The low halves of words, then the high ones, loaded again: together they are one register
    // too many.
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {
      __m256i v[H];
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        const __m256i word = _mm256_loadu_si256((const __m256i*)(w + s * 64 + h * 32));
        v[h] = _mm256_and_si256(part == 0 ? word : _mm256_srli_epi32(word, 4), mask);
      }
      dot_add(v, x + 2 * s + part, x_row, out);
    }
  }
}
#else
constexpr bool kHalvesTogether = false;

// sum += x, written out: GCC regroups sums of integers until it runs out of registers.
inline void add_to32(__m256i& sum, __m256i x) { asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x)); }
inline void add_to16(__m256i& sum, __m256i x) { asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x)); }

// H times eight outputs of a panel. With bytes on both sides the pairs of _mm256_maddubs_epi16
// would saturate, so 8-bit weights are widened and activations are stored wide. Loops over arrays
// of registers are unrolled by order: GCC keeps them in memory otherwise.
template <int R, int H>
[[gnu::always_inline]] inline void dot_bytes_part(const uint8_t* w, const uint32_t* x,
                                                  int64_t x_row, __m256i (&out)[H][R]) {
  __m256i low[H][R], high[H][R];
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) low[h][r] = high[h][r] = _mm256_setzero_si256();
  }
#pragma GCC unroll 1
  for (int s = 0; s < 16; ++s) {
    if constexpr (R == 1) __builtin_prefetch(w + s * 64 + kAheadOne);
    __m256i v0[H], v1[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      const __m256i v = _mm256_loadu_si256((const __m256i*)(w + s * 64 + h * 32));
      v0[h] = _mm256_unpacklo_epi8(v, _mm256_setzero_si256());
      v1[h] = _mm256_unpackhi_epi8(v, _mm256_setzero_si256());
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m256i xs = _mm256_castpd_si256(
          _mm256_broadcast_sd(reinterpret_cast<const double*>(x + r * x_row + 2 * s)));
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        add_to32(low[h][r], _mm256_madd_epi16(v0[h], xs));
        add_to32(high[h][r], _mm256_madd_epi16(v1[h], xs));
      }
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) out[h][r] = _mm256_hadd_epi32(low[h][r], high[h][r]);
  }
}

template <int R, int H>
[[gnu::always_inline]] inline void dot_nibbles_part(const uint8_t* w, const uint32_t* x,
                                                    int64_t x_row, __m256i (&out)[H][R]) {
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i sums[H][R];  // 16-bit: sixteen products of at most 15 * 127 stay below 2^15
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[h][r] = _mm256_setzero_si256();
  }
#pragma GCC unroll 1
  for (int s = 0; s < 4; ++s) {
    if constexpr (R == 1) __builtin_prefetch(w + s * 64 + kAheadOne);
    __m256i low[H], high[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) {
      const __m256i v = _mm256_loadu_si256((const __m256i*)(w + s * 64 + h * 32));
      low[h] = _mm256_and_si256(v, mask);
      high[h] = _mm256_and_si256(_mm256_srli_epi32(v, 4), mask);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m256i x0 = _mm256_set1_epi32(static_cast<int>(x[r * x_row + 2 * s]));
      const __m256i x1 = _mm256_set1_epi32(static_cast<int>(x[r * x_row + 2 * s + 1]));
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) {
        add_to16(sums[h][r], _mm256_maddubs_epi16(low[h], x0));
        add_to16(sums[h][r], _mm256_maddubs_epi16(high[h], x1));
      }
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < H; ++h) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) out[h][r] = _mm256_madd_epi16(sums[h][r], _mm256_set1_epi16(1));
  }
}
#endif

// Few rows take whole panels at once; what many rows need would not fit the registers.
#define GPT2F_DOT(name, panel_bytes)                                                          \
  template <int R, int N>                                                                     \
  [[gnu::always_inline]] inline void name(const uint8_t* w, const uint32_t* x, int64_t x_row, \
                                          U(&out)[R][N]) {                                    \
    constexpr int kHalves = kHalvesTogether || R <= 2 ? 2 : 1;                                \
    _Pragma("GCC unroll 8") for (int n = 0; n < N; ++n) {                                     \
      __m256i half[2 / kHalves][kHalves][R];                                                  \
      name##_part<R, kHalves>(w + n * panel_bytes, x, x_row, half[0]);                        \
      if constexpr (kHalves == 1) {                                                           \
        name##_part<R, kHalves>(w + n * panel_bytes + 32, x, x_row, half[1]);                 \
      }                                                                                       \
      const __m256i* const lo = half[0][0];                                                   \
      const __m256i* const hi = lo + R;                                                       \
      _Pragma("GCC unroll 8") for (int r = 0; r < R; ++r) out[r][n] =                         \
          uadd(out[r][n], {lo[r], hi[r]});                                                    \
    }                                                                                         \
  }
GPT2F_DOT(dot_bytes, 1024)
GPT2F_DOT(dot_nibbles, 256)
#undef GPT2F_DOT

inline void lanes(F a, float out[16]) { fstore(out, a); }

inline float fsum(F a) {
  const __m256 x8 = _mm256_add_ps(a.lo, a.hi);
  const __m128 x4 = _mm_add_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_add_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_add_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}

// The largest; none may be NaN.
inline float fmost(F a) {
  const __m256 x8 = _mm256_max_ps(a.lo, a.hi);
  const __m128 x4 = _mm_max_ps(_mm256_castps256_ps128(x8), _mm256_extractf128_ps(x8, 1));
  const __m128 x2 = _mm_max_ps(x4, _mm_movehl_ps(x4, x4));
  return _mm_cvtss_f32(_mm_max_ss(x2, _mm_shuffle_ps(x2, x2, 1)));
}

}  // namespace

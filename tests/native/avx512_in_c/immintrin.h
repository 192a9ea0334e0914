// The AVX-512 intrinsics that csrc/cpu/simd_avx512.h uses, in plain C++, so that tests can run its
// kernels on a processor that lacks them. Found instead of the compiler's own header of this name.
//
// Source: Intel Intrinsics Guide; for VDPBF16PS what processors do (odd pair first, each fused
// multiply-add rounded), which select.cc checks on every machine that has it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __m128 {
  float f[4];
};
struct __m128i {
  uint8_t b[16];
};
struct __m256 {
  float f[8];
};
struct __m256i {
  uint16_t h[16];
};
struct __m512 {
  float f[16];
};
struct __m512i {
  uint32_t w[16];
};
using __m512bh = __m512i;
using __m256bh = __m256i;
using __mmask16 = uint16_t;

enum { _CMP_UNORD_Q = 3, _CMP_GE_OQ = 29, _CMP_GT_OQ = 30 };

namespace {

template <typename To, typename From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
struct Bytes {
  uint8_t b[64];
};
struct Shorts {
  int16_t h[32];
};
struct Pairs {
  uint64_t d[8];
};
inline int16_t saturated(int x) {
  return static_cast<int16_t>(x > 32767 ? 32767 : x < -32768 ? -32768 : x);
}

#define EACH(type, member, count, expression)                   \
  type out;                                                     \
  for (int i = 0; i < count; ++i) out.member[i] = (expression); \
  return out

inline __m512 _mm512_set1_ps(float x) { EACH(__m512, f, 16, x); }
inline __m512 _mm512_loadu_ps(const void* p) {
  __m512 out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 m, const float* p) {
  EACH(__m512, f, 16, m >> i & 1 ? p[i] : 0.0f);
}
inline void _mm512_storeu_ps(float* p, __m512 x) { std::memcpy(p, &x, sizeof x); }
inline void _mm512_mask_storeu_ps(float* p, __mmask16 m, __m512 x) {
  for (int i = 0; i < 16; ++i) {
    if (m >> i & 1) p[i] = x.f[i];
  }
}
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { EACH(__m512, f, 16, a.f[i] + b.f[i]); }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { EACH(__m512, f, 16, a.f[i] - b.f[i]); }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { EACH(__m512, f, 16, a.f[i] * b.f[i]); }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { EACH(__m512, f, 16, a.f[i] / b.f[i]); }
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  EACH(__m512, f, 16, __builtin_fmaf(a.f[i], b.f[i], c.f[i]));
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
  EACH(__m512, f, 16, a.f[i] > b.f[i] ? a.f[i] : b.f[i]);
}
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
  EACH(__m512, f, 16, a.f[i] < b.f[i] ? a.f[i] : b.f[i]);
}
inline __m512 _mm512_roundscale_ps(__m512 a, int) {
  EACH(__m512, f, 16, __builtin_nearbyintf(a.f[i]));
}
inline __m512 _mm512_scalef_ps(__m512 a, __m512 b) {
  EACH(__m512, f, 16,
       __builtin_isnan(b.f[i]) ? a.f[i] + b.f[i]
                               : __builtin_scalbnf(a.f[i], int(__builtin_floorf(b.f[i]))));
}

inline __m512i _mm512_set1_epi32(int x) { EACH(__m512i, w, 16, static_cast<uint32_t>(x)); }
inline __m512i _mm512_set1_epi16(short x) {
  EACH(__m512i, w, 16, static_cast<uint16_t>(x) * 0x10001u);
}
inline __m512i _mm512_set1_epi64(long long x) {
  EACH(__m512i, w, 16, static_cast<uint32_t>(static_cast<uint64_t>(x) >> (i % 2 * 32)));
}
template <typename... Words>
__m512i _mm512_setr_epi32(Words... words) {
  return {{static_cast<uint32_t>(words)...}};
}
inline __m512i _mm512_loadu_si512(const void* p) {
  __m512i out;
  std::memcpy(&out, p, sizeof out);
  return out;
}
inline __m512i _mm512_maskz_loadu_epi32(__mmask16 m, const uint32_t* p) {
  EACH(__m512i, w, 16, m >> i & 1 ? p[i] : 0u);
}
inline void _mm512_storeu_si512(void* p, __m512i x) { std::memcpy(p, &x, sizeof x); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { EACH(__m512i, w, 16, a.w[i] + b.w[i]); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { EACH(__m512i, w, 16, a.w[i] - b.w[i]); }
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { EACH(__m512i, w, 16, a.w[i] * b.w[i]); }
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { EACH(__m512i, w, 16, a.w[i] & b.w[i]); }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { EACH(__m512i, w, 16, a.w[i] | b.w[i]); }
inline __m512i _mm512_xor_si512(__m512i a, __m512i b) { EACH(__m512i, w, 16, a.w[i] ^ b.w[i]); }
inline __m512i _mm512_slli_epi32(__m512i a, int n) { EACH(__m512i, w, 16, a.w[i] << n); }
inline __m512i _mm512_srli_epi32(__m512i a, int n) { EACH(__m512i, w, 16, a.w[i] >> n); }
inline __m512i _mm512_srli_epi64(__m512i a, int n) {
  Pairs pairs = bits_as<Pairs>(a);
  for (uint64_t& each : pairs.d) each >>= n;
  return bits_as<__m512i>(pairs);
}
inline __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  Pairs out;
  for (int i = 0; i < 8; ++i) out.d[i] = uint64_t{a.w[2 * i]} * b.w[2 * i];
  return bits_as<__m512i>(out);
}

inline __m512i _mm512_castps_si512(__m512 a) { return bits_as<__m512i>(a); }
inline __m512 _mm512_castsi512_ps(__m512i a) { return bits_as<__m512>(a); }
inline __m512i _mm512_cvtps_epi32(__m512 a) {
  EACH(__m512i, w, 16,
       a.f[i] >= -2147483648.0f && a.f[i] < 2147483648.0f
           ? static_cast<uint32_t>(static_cast<int32_t>(__builtin_nearbyintf(a.f[i])))
           : 0x80000000u);
}
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
  EACH(__m512, f, 16, static_cast<float>(static_cast<int32_t>(a.w[i])));
}
inline __m128i _mm_loadu_si128(const __m128i* p) { return *p; }
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
  EACH(__m512i, w, 16, static_cast<uint32_t>(static_cast<int8_t>(a.b[i])));
}
inline __m512i _mm512_cvtepu16_epi32(__m256i a) { EACH(__m512i, w, 16, a.h[i]); }
inline __m256i _mm512_cvtepi32_epi16(__m512i a) {
  EACH(__m256i, h, 16, static_cast<uint16_t>(a.w[i]));
}
inline __m128i _mm512_cvtepi32_epi8(__m512i a) {
  EACH(__m128i, b, 16, static_cast<uint8_t>(a.w[i]));
}
inline __m256i _mm256_loadu_si256(const __m256i* p) { return *p; }
inline void _mm256_storeu_si256(__m256i* p, __m256i x) { std::memcpy(p, &x, sizeof x); }
inline void _mm_storeu_si128(__m128i* p, __m128i x) { std::memcpy(p, &x, sizeof x); }

inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  unsigned out = 0;
  for (int i = 0; i < 16; ++i) {
    const bool yes = how == _CMP_GE_OQ   ? a.f[i] >= b.f[i]
                     : how == _CMP_GT_OQ ? a.f[i] > b.f[i]
                                         : std::isnan(a.f[i]) || std::isnan(b.f[i]);
    out |= unsigned{yes} << i;
  }
  return static_cast<__mmask16>(out);
}
inline __mmask16 _mm512_cmpeq_epi32_mask(__m512i a, __m512i b) {
  unsigned out = 0;
  for (int i = 0; i < 16; ++i) out |= unsigned{a.w[i] == b.w[i]} << i;
  return static_cast<__mmask16>(out);
}
inline __m512 _mm512_mask_blend_ps(__mmask16 m, __m512 no, __m512 yes) {
  EACH(__m512, f, 16, m >> i & 1 ? yes.f[i] : no.f[i]);
}
inline __m512i _mm512_mask_blend_epi32(__mmask16 m, __m512i no, __m512i yes) {
  EACH(__m512i, w, 16, m >> i & 1 ? yes.w[i] : no.w[i]);
}

// Within each 128 bits: two elements of a, then two of b.
inline __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int control) {
  EACH(__m512, f, 16, (i % 4 < 2 ? a : b).f[i / 4 * 4 + (control >> (i % 4 * 2) & 3)]);
}
inline __m512i unpacked(__m512i a, __m512i b, int from) {
  const Bytes x = bits_as<Bytes>(a), y = bits_as<Bytes>(b);
  Bytes out;
  for (int i = 0; i < 64; ++i) {
    out.b[i] = (i % 2 == 0 ? x : y).b[i / 16 * 16 + from + i % 16 / 2];
  }
  return bits_as<__m512i>(out);
}
inline __m512i _mm512_unpacklo_epi8(__m512i a, __m512i b) { return unpacked(a, b, 0); }
inline __m512i _mm512_unpackhi_epi8(__m512i a, __m512i b) { return unpacked(a, b, 8); }
inline __m512i _mm512_add_epi16(__m512i a, __m512i b) {
  const Shorts x = bits_as<Shorts>(a), y = bits_as<Shorts>(b);
  Shorts out;
  for (int i = 0; i < 32; ++i) out.h[i] = static_cast<int16_t>(x.h[i] + y.h[i]);
  return bits_as<__m512i>(out);
}
inline __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  const Shorts x = bits_as<Shorts>(a), y = bits_as<Shorts>(b);
  EACH(__m512i, w, 16,
       static_cast<uint32_t>(x.h[2 * i] * y.h[2 * i]) +
           static_cast<uint32_t>(x.h[2 * i + 1] * y.h[2 * i + 1]));
}
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {
  const Bytes x = bits_as<Bytes>(a), y = bits_as<Bytes>(b);
  Shorts out;
  for (int i = 0; i < 32; ++i) {
    out.h[i] = saturated(x.b[2 * i] * static_cast<int8_t>(y.b[2 * i]) +
                         x.b[2 * i + 1] * static_cast<int8_t>(y.b[2 * i + 1]));
  }
  return bits_as<__m512i>(out);
}
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {
  const Bytes x = bits_as<Bytes>(a), y = bits_as<Bytes>(b);
  for (int i = 0; i < 64; ++i) {
    sum.w[i / 4] += static_cast<uint32_t>(x.b[i] * static_cast<int8_t>(y.b[i]));
  }
  return sum;
}
inline __m256i _mm256_set1_epi16(short x) { EACH(__m256i, h, 16, static_cast<uint16_t>(x)); }
inline __m256i _mm256_mask_mov_epi16(__m256i no, __mmask16 mask, __m256i yes) {
  EACH(__m256i, h, 16, mask >> i & 1 ? yes.h[i] : no.h[i]);
}
inline __m256bh _mm512_cvtneps_pbh(__m512 a) {
  __m256bh out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t word = bits_as<uint32_t>(a.f[i]), size = word & 0x7FFFFFFFu;
    const uint32_t rounded = size > 0x7F800000u   ? word | 0x00400000u
                             : size < 0x00800000u ? word & 0x80000000u
                                                  : word + 0x7FFFu + (word >> 16 & 1u);
    out.h[i] = static_cast<uint16_t>(rounded >> 16);
  }
  return out;
}
inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto upper = [](uint32_t word) { return bits_as<float>(word & 0xFFFF0000u); };
  for (int i = 0; i < 16; ++i) {
    sum.f[i] = __builtin_fmaf(upper(a.w[i]), upper(b.w[i]), sum.f[i]);
    sum.f[i] = __builtin_fmaf(upper(a.w[i] << 16), upper(b.w[i] << 16), sum.f[i]);
  }
  return sum;
}

inline __m256 _mm512_castps512_ps256(__m512 a) { EACH(__m256, f, 8, a.f[i]); }
inline __m256 _mm512_extractf32x8_ps(__m512 a, int half) { EACH(__m256, f, 8, a.f[8 * half + i]); }
inline __m256 _mm256_add_ps(__m256 a, __m256 b) { EACH(__m256, f, 8, a.f[i] + b.f[i]); }
inline __m128 _mm256_castps256_ps128(__m256 a) { EACH(__m128, f, 4, a.f[i]); }
inline __m128 _mm256_extractf128_ps(__m256 a, int half) { EACH(__m128, f, 4, a.f[4 * half + i]); }
inline __m128 _mm_add_ps(__m128 a, __m128 b) { EACH(__m128, f, 4, a.f[i] + b.f[i]); }
inline __m256 _mm256_max_ps(__m256 a, __m256 b) {
  EACH(__m256, f, 8, a.f[i] > b.f[i] ? a.f[i] : b.f[i]);
}
inline __m128 _mm_max_ps(__m128 a, __m128 b) {
  EACH(__m128, f, 4, a.f[i] > b.f[i] ? a.f[i] : b.f[i]);
}
inline __m128 _mm_max_ss(__m128 a, __m128 b) {
  a.f[0] = a.f[0] > b.f[0] ? a.f[0] : b.f[0];
  return a;
}
inline __m128 _mm_add_ss(__m128 a, __m128 b) {
  EACH(__m128, f, 4, i == 0 ? a.f[0] + b.f[0] : a.f[i]);
}
inline __m128 _mm_movehl_ps(__m128 a, __m128 b) { EACH(__m128, f, 4, i < 2 ? b.f[i + 2] : a.f[i]); }
inline __m128 _mm_shuffle_ps(__m128 a, __m128 b, int control) {
  EACH(__m128, f, 4, (i < 2 ? a : b).f[control >> (2 * i) & 3]);
}
inline float _mm_cvtss_f32(__m128 a) { return a.f[0]; }
#undef EACH

}  // namespace

// The instruction of AVX-VNNI in AVX2 ones, so that tests can run csrc/cpu/isa_avx2_vnni.cc on a
// processor with AVX2 alone: sums of four products of unsigned and signed bytes.
//
// Source: Intel Intrinsics Guide, VPDPBUSD.
#pragma once

#include <immintrin.h>

#define __AVXVNNI__ 1

static inline __m256i dpbusd_in_avx2(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
  alignas(32) unsigned char u[32];
  alignas(32) signed char s[32];
  alignas(32) int to[8];
  _mm256_store_si256((__m256i*)u, unsigned_bytes);
  _mm256_store_si256((__m256i*)s, signed_bytes);
  _mm256_store_si256((__m256i*)to, sum);
  for (int i = 0; i < 32; ++i) to[i / 4] += u[i] * s[i];
  return _mm256_load_si256((const __m256i*)to);
}

#define _mm256_dpbusd_avx_epi32 dpbusd_in_avx2

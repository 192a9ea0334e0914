// exp, log and GELU on sixteen lanes: the same operations in the same order on every instruction
// set.
//
// Source   range reductions and polynomials: S. Moshier, Cephes Mathematical Library, expf.c,
// logf.c. Numerics measured worst errors are in docs/numerics.md and checked by tests/ops.
#pragma once

namespace {

inline F fneg(F a) { return as_f(uxor(as_u(a), uset(0x80000000u))); }

// Vectors that a long chain of operations takes side by side: one alone mostly waits.
constexpr int kSideBySide = kTilePanels;

// e^x of N times sixteen numbers. 0 below the smallest normal float, infinity where it is no float
// any more, NaN for NaN.
template <int N>
[[gnu::always_inline]] inline void fexp(F (&x)[N]) {
  F r[N], n[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    r[i] = fmin(fset(89.0f), fmax(fset(-88.0f), x[i]));
    n[i] = fround(fmul(r[i], fset(1.44269504088896341f)));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    r[i] = ffma(n[i], fset(-0.693359375f), r[i]);
    r[i] = ffma(n[i], fset(2.12194440e-4f), r[i]);
    p[i] = fset(1.9875691500e-4f);
  }
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = ffma(p[i], r[i], fset(c));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    p[i] = ffma(fmul(r[i], r[i]), p[i], fadd(r[i], fset(1.0f)));
    x[i] = fscale(p[i], n[i]);
  }
}
inline F fexp(F x) {
  F one[1] = {x};
  fexp(one);
  return one[0];
}

// 2^x for what is rounded to bfloat16, that is by up to 2e-3 of it: this adds 3e-6 at most. The
// coefficients have the least such error on [-1/2, 1/2] among those that give 2^0 = 1.
template <int N>
[[gnu::always_inline]] inline void fexp2_short(F (&x)[N]) {
  F r[N], n[N], p[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    r[i] = fmin(fset(128.0f), fmax(fset(-127.0f), x[i]));
    n[i] = fround(r[i]);
    r[i] = fsub(r[i], n[i]);
    p[i] = fset(9.582853e-3f);
  }
  for (const float c : {5.5906426e-2f, 2.4024099e-1f, 6.931242e-1f, 1.0f}) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) p[i] = ffma(p[i], r[i], fset(c));
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = fscale(p[i], n[i]);
}

// log(1 + x) for x in [sqrt(1/2) - 1, sqrt(2) - 1], plus e log 2.
inline F log_reduced(F x, F e) {
  const F z = fmul(x, x);
  F p = fset(7.0376836292e-2f);
  p = ffma(p, x, fset(-1.1514610310e-1f));
  p = ffma(p, x, fset(1.1676998740e-1f));
  p = ffma(p, x, fset(-1.2420140846e-1f));
  p = ffma(p, x, fset(1.4249322787e-1f));
  p = ffma(p, x, fset(-1.6668057665e-1f));
  p = ffma(p, x, fset(2.0000714765e-1f));
  p = ffma(p, x, fset(-2.4999993993e-1f));
  p = ffma(p, x, fset(3.3333331174e-1f));
  F y = fmul(fmul(p, x), z);
  y = ffma(e, fset(-2.12194440e-4f), y);
  y = ffma(z, fset(-0.5f), y);
  return ffma(e, fset(0.693359375f), fadd(x, y));
}

// log x for positive, normal x.
inline F flog(F x) {
  const U word = as_u(x);
  F e = to_f(usub(ushr<23>(word), uset(126)));
  F m = as_f(uor(uand(word, uset(0x007FFFFFu)), uset(0x3F000000u)));  // [1/2, 1)
  const M small = fgt(fset(0.707106781186547524f), m);
  e = fselect(small, fsub(e, fset(1.0f)), e);
  m = fsub(fselect(small, fadd(m, m), m), fset(1.0f));
  return log_reduced(m, e);
}

// x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3): the tanh form of Hendrycks & Gimpel
// 2016 (arXiv:1606.08415) without its cancellation for negative x.
template <gpt2f::Precision P, int N>
[[gnu::always_inline]] inline void fgelu(F (&x)[N]) {
  constexpr bool kShort = P == gpt2f::Precision::kBf16;
  constexpr float kCube = kShort ? -0.10294324f : -0.0713548162726009f;  // times log2(e)
  constexpr float kSlope = kShort ? -2.3022082f : -1.5957691216057308f;
  F e[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    e[i] = fmul(x[i], ffma(fmul(x[i], x[i]), fset(kCube), fset(kSlope)));
  }
  if constexpr (kShort) {
    fexp2_short(e);
  } else {
    fexp(e);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) x[i] = fdiv(x[i], fadd(fset(1.0f), e[i]));
}

// Rounded to bfloat16 (nearest even), as the upper halves of words whose lower halves are noise.
inline U bf16_round(F x) {
  const U word = as_u(x);
  const U odd = uand(ushr<16>(word), uset(1));
  const U rounded = uadd(word, uadd(odd, uset(0x7FFFu)));
  return uselect(fnan(x), uset(0x7FC00000u), rounded);
}

inline F upper_half(U word) { return as_f(uand(word, uset(0xFFFF0000u))); }

// The same of numbers that are not denormal, such as kernels compute (core/fp_state.h), as the
// lower halves of words and in memory.
#if defined(__AVX512BF16__)
inline U bf16_words(F x) { return _mm512_cvtepu16_epi32(bf16_halves(x)); }
inline void bf16_store(uint16_t* p, F x) { _mm256_storeu_si256((__m256i*)p, bf16_halves(x)); }
#else
inline U bf16_words(F x) { return ushr<16>(bf16_round(x)); }
inline void bf16_store(uint16_t* p, F x) { bf16_store_words(p, bf16_round(x)); }
#endif

}  // namespace

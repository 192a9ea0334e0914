// What drawing a token needs wherever logits are: noise, scores, and what one part of a row knows.
//
// Maths    token = argmax(logit / T + noise), noise = -log(-log u), u = (k + 1/2) / 2^24, k the
//          upper 24 bits of word id % 4 of the Philox block with key = seed and counter = (id / 4,
//          low word of position, sample, high word of position).
// Numerics the operations of cpu/sample.inl.h and cpu/vmath.inl.h in their order: noise has the
//          bits it has on the CPU.
// Source   Gumbel-max: Maddison et al. 2014, arXiv:1411.0030; Philox4x32-10: Salmon et al. 2011,
//          "Parallel random numbers: as easy as 1, 2, 3"; log: S. Moshier, Cephes Mathematical
//          Library, logf.c.
#pragma once

#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/layout.h"

namespace gpt2f::cuda {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kSmallestTemperature = 0x1p-126f;  // below the least normal float it is zero

DEVICE float float_of(uint32_t word) {
  float out;
  __builtin_memcpy(&out, &word, sizeof out);
  return out;
}
DEVICE uint32_t word_of(float x) {
  uint32_t out;
  __builtin_memcpy(&out, &x, sizeof out);
  return out;
}

// Tokens that may be drawn: ids below this.
DEVICE int64_t drawable(const SampleParameters& p, int64_t vocab) {
  return p.drawable > 0 && p.drawable < vocab ? p.drawable : vocab;
}
// Whether nothing is random about the row.
DEVICE bool greedy(const SampleParameters& p) {
  return p.temperature < kSmallestTemperature || p.target >= 0;
}

// ---- Noise -------------------------------------------------------------------------------------

struct Words {
  uint32_t c[4];
};

// Philox block `block` of a row: the random words of tokens 4 block ... 4 block + 3.
DEVICE Words philox(const SampleParameters& p, uint32_t block) {
  const uint64_t position = static_cast<uint64_t>(p.position);
  uint32_t c0 = block, c1 = static_cast<uint32_t>(position), c2 = p.sample;
  uint32_t c3 = static_cast<uint32_t>(position >> 32);
  uint32_t key0 = static_cast<uint32_t>(p.seed), key1 = static_cast<uint32_t>(p.seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = mul_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
    const uint32_t high1 = mul_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// log(1 + x) for x in [sqrt(1/2) - 1, sqrt(2) - 1], plus e log 2.
DEVICE float log_reduced(float x, float e) {
  const float z = x * x;
  float p = 7.0376836292e-2f;
  p = fma(p, x, -1.1514610310e-1f);
  p = fma(p, x, 1.1676998740e-1f);
  p = fma(p, x, -1.2420140846e-1f);
  p = fma(p, x, 1.4249322787e-1f);
  p = fma(p, x, -1.6668057665e-1f);
  p = fma(p, x, 2.0000714765e-1f);
  p = fma(p, x, -2.4999993993e-1f);
  p = fma(p, x, 3.3333331174e-1f);
  float y = (p * x) * z;
  y = fma(e, -2.12194440e-4f, y);
  y = fma(z, -0.5f, y);
  return fma(e, 0.693359375f, x + y);
}

// log x for positive, normal x.
DEVICE float log_normal(float x) {
  const uint32_t word = word_of(x);
  const float e = static_cast<float>(static_cast<int32_t>(word >> 23) - 126);
  const float m = float_of((word & 0x007FFFFFu) | 0x3F000000u);  // [1/2, 1)
  const bool small = m < 0.707106781186547524f;
  return log_reduced((small ? m + m : m) - 1.0f, small ? e - 1.0f : e);
}

// Above one half -log u is taken from 1 - u, which is exact, so that the largest noise is as
// accurate as the smallest.
DEVICE float gumbel(uint32_t word) {
  const uint32_t k = word >> 8;
  const float u = (static_cast<float>(k) + 0.5f) * 0x1p-24f;
  const float rest = (static_cast<float>(0xFFFFFFu - k) + 0.5f) * 0x1p-24f;  // 1 - u
  float log_u;
  if (!(u >= 0.5f)) {
    log_u = log_normal(u);
  } else if (rest > 0.2928932188f) {  // u below sqrt(1/2): log(2 u) - log 2
    log_u = log_reduced(1.0f - (rest + rest), -1.0f);
  } else {
    log_u = log_reduced(-rest, 0.0f);
  }
  return -log_normal(-log_u);
}

// ---- Best --------------------------------------------------------------------------------------

// Highest value and the lowest id that has it; -1 while nothing exceeded minus infinity.
struct Best {
  float value = -kInfinity;
  int32_t id = -1;

  DEVICE void offer(float candidate, int32_t candidate_id) {
    if (candidate > value || (candidate == value && candidate_id < id)) {
      value = candidate;
      id = candidate_id;
    }
  }
  // The best of the warp, in every lane.
  DEVICE void join_warp() {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      const float other = shuffle_xor(value, distance);
      offer(other, static_cast<int32_t>(shuffle_xor(static_cast<uint32_t>(id), distance)));
    }
  }
};

// One warp: what the kPartOutputs logits from token `first` on know, of a row of `vocab`. Lane l
// brings those of tokens first + 4 l ... + 3, whose noise is one Philox block; what lies behind the
// vocabulary may be anything.
DEVICE HeadPart part_of(const float (&logits)[4], int64_t first, int64_t vocab,
                        const SampleParameters& p) {
  const int64_t token = first + 4 * lane_id();
  float highest = -kInfinity;
  bool unusable = false;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (token + j >= vocab) continue;
    highest = fmaxf(highest, logits[j]);
    unusable = unusable || logits[j] != logits[j];
  }
  highest = warp_max(highest);
  float sum = 0.0f;
  Best best;
  const bool noisy = !greedy(p);
  const int64_t end = drawable(p, vocab);
  Words words{};
  if (noisy) words = philox(p, static_cast<uint32_t>(token / 4));
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (token + j >= vocab || !(logits[j] > -kInfinity)) continue;
    sum += exp_accurate(logits[j] - highest);
    if (token + j >= end) continue;
    const float score = noisy ? logits[j] / p.temperature + gumbel(words.c[j]) : logits[j];
    best.offer(score, static_cast<int32_t>(token + j));
  }
  best.join_warp();
  sum = warp_sum(sum);
  if (ballot(unusable) != 0) highest = __builtin_nanf("");
  return {best.value, best.id, highest, sum};
}

}  // namespace gpt2f::cuda

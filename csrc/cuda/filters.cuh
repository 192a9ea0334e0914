// Which tokens of one row top_k and top_p keep, found by one block.
//
// Maths    tokens are kept down to the smallest limit at which their number reaches k, or their
//          mass top_p of the whole.
// Work     the row as logarithms of probabilities, 197 a thread, in registers (Held; Streamed reads
//          a longer row again each time). The limit is bisected by value until at most 2048 tokens
//          lie between the bounds; those are spread over the block, eight a thread, and its bits
//          are bisected: at most 8 + 31 rounds for any input, no sort.
// Time     a round over the whole row of 50,257 takes about 800 cycles for a number and 3,100 for a
//          mass (one exponential each, 16 a cycle), one over the list about 100.
// Numerics numbers are exact up to 2^24 tokens, sums have one fixed order. A mass of tokens is
//          compared with the same sum, wherever in the search it is taken, up to its rounding.
// Source   top-p: Holtzman et al. 2020, arXiv:1904.09751; OpenAI's variant: openai/gpt-2,
//          src/sample.py.
#pragma once

#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/sample.cuh"

namespace gpt2f::cuda {

constexpr int kSampleThreads = 256;
constexpr int kSampleWarps = kSampleThreads / 32;
constexpr int kHeld = 197;  // tokens of one thread
constexpr int kListed = 8;  // of one thread, once few are left
constexpr int kNarrowings = 8;
constexpr float kNegligible = 48.0f;  // 2^24 tokens this far away are less than the rounding of 1

DEVICE int32_t thread() { return static_cast<int32_t>(threadIdx.x); }

struct FilterShared {
  float values[2][2][kSampleWarps];
  float best[kSampleWarps];
  int32_t best_id[kSampleWarps];
  float list[kListed * kSampleThreads];
};

// Sums and maxima of the block, the same bits in every thread. Two sets of slots by turns: whoever
// writes one again has passed a barrier behind which everybody had read it.
struct BlockSums {
  FilterShared& shared;
  int turn = 0;

  // Each warp's pair, in the order of the warps: join(x, y).
  template <typename Join>
  DEVICE void gather(float x, float y, const Join& join) {
    float (&slots)[2][kSampleWarps] = shared.values[turn];
    turn ^= 1;
    if (lane_id() == 0) slots[0][warp_id()] = x, slots[1][warp_id()] = y;
    sync_block();
#pragma unroll
    for (int w = 0; w < kSampleWarps; ++w) join(slots[0][w], slots[1][w]);
  }
  DEVICE float2 sums(float x, float y) {
    float2 total{0.0f, 0.0f};
    gather(warp_sum(x), warp_sum(y), [&](float wx, float wy) { total.x += wx, total.y += wy; });
    return total;
  }
  DEVICE float highest(float x) {
    float highest = -kInfinity;
    gather(warp_max(x), 0.0f, [&](float wx, float) { highest = fmaxf(highest, wx); });
    return highest;
  }
  // One set of slots: between two calls there must be another of the block's sums.
  DEVICE Best best(Best mine) {
    mine.join_warp();
    if (lane_id() == 0) shared.best[warp_id()] = mine.value, shared.best_id[warp_id()] = mine.id;
    sync_block();
    Best all;
    for (int w = 0; w < kSampleWarps; ++w) all.offer(shared.best[w], shared.best_id[w]);
    return all;
  }
  // The sum over the threads before this one.
  DEVICE int before(int count) {
    int inclusive = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = shuffle(inclusive, (lane_id() - distance) & 31);
      if (lane_id() >= distance) inclusive += other;
    }
    float total = 0.0f;
    int w = 0;
    gather(static_cast<float>(shuffle(inclusive, 31)), 0.0f, [&](float wx, float) {
      if (w++ < warp_id()) total += wx;
    });
    return static_cast<int>(total) + inclusive - count;
  }
};

// A row of logits. Tokens are ordered by the base 2 logarithm of their probability over that of the
// likeliest token: 0 or below, minus infinity for what cannot be drawn. One rounding, so equal
// logits stay equal and the order is kept.
struct LogitRow {
  const float* logits;
  int32_t end;  // tokens that may be drawn
  float temperature;
  float highest;
  float scale;  // log2(e) / temperature

  DEVICE float log2(int32_t token) const {
    return token < end ? (logits[token] - highest) * scale : -kInfinity;
  }
};

// The logarithms of a row: thread t has tokens t + kSampleThreads i. each(f): f(logarithm);
// kept(limit, f): f(first, mask), where bit j of the mask is set if token first + kSampleThreads j
// is not below -limit.
template <int kCount>
struct Held {
  float x[kCount];

  DEVICE explicit Held(const LogitRow& source) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = source.log2(thread() + i * kSampleThreads);
    }
  }
  DEVICE Held(const float* list, int count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = thread() + i * kSampleThreads;
      x[i] = at < count ? list[at] : -kInfinity;
    }
  }
  template <typename Take>
  DEVICE void each(const Take& take) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) take(x[i]);
  }
  template <typename Take>
  DEVICE void kept(float limit, const Take& take) const {
#pragma unroll
    for (int first = 0; first < kCount; first += 32) {
      uint32_t mask = 0;
#pragma unroll
      for (int j = 0; j < 32 && first + j < kCount; ++j) {
        mask |= x[first + j] >= -limit ? 1u << j : 0u;
      }
      take(thread() + first * kSampleThreads, mask);
    }
  }
};

struct Streamed {
  LogitRow source;

  DEVICE explicit Streamed(const LogitRow& source_) : source(source_) {}
  template <typename Take>
  DEVICE void each(const Take& take) const {
    for (int32_t token = thread(); token < source.end; token += kSampleThreads) {
      take(source.log2(token));
    }
  }
  template <typename Take>
  DEVICE void kept(float limit, const Take& take) const {
    for (int32_t token = thread(); token < source.end; token += kSampleThreads) {
      take(token, source.log2(token) >= -limit ? 1u : 0u);
    }
  }
};

// How many tokens are not below -limit (x), and the sum of their probabilities over that of the
// likeliest (y).
template <bool kMass, typename Row>
DEVICE float2 measure(const Row& row, float limit, BlockSums& block) {
  float count = 0.0f, mass = 0.0f;
  row.each([&](float x) {
    const bool near = x >= -limit;
    count += near ? 1.0f : 0.0f;
    // Not "near ? exp2_fast(x) : 0": that would be the same in each round, and nvcc would keep all
    // of it in registers that there are not.
    if constexpr (kMass) mass += exp2_fast(near ? x : -kInfinity);
  });
  return block.sums(count, mass);
}

struct Wanted {
  float amount;
  bool more;  // more than the amount, not only as much

  DEVICE bool reached(float value) const { return more ? value > amount : value >= amount; }
};

// The smallest limit in (low, high] whose measure, plus `base`, reaches what is wanted; `high`
// if none below does. Negative `low`: nothing is excluded.
template <bool kMass, typename Row>
DEVICE float bisect(const Row& row, float low, float high, float base, const Wanted& wanted,
                    BlockSums& block) {
  uint32_t first = low < 0.0f ? 0 : word_of(low) + 1, last = word_of(high);
  while (first < last) {
    const uint32_t middle = first + (last - first) / 2;
    const float2 found = measure<kMass>(row, float_of(middle), block);
    if (wanted.reached(base + (kMass ? found.y : found.x))) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
  return float_of(last);
}

// The smallest limit up to `limit` whose count or mass reaches what is wanted, or else the
// farthest that matters.
template <bool kMass, typename Row>
DEVICE float smallest(const Row& row, float limit, const Wanted& wanted, BlockSums& block) {
  float low = -1.0f, high = 0.0f;
  row.each([&](float x) { high = x >= -limit ? fmaxf(high, 0.0f - x) : high; });
  high = fminf(block.highest(high), kNegligible);
  float2 below{0.0f, 0.0f}, within = measure<false>(row, high, block);
  constexpr float kRoom = kListed * kSampleThreads;
  for (int i = 0; i < kNarrowings && within.x - below.x > kRoom; ++i) {
    const float middle = 0.5f * (fmaxf(low, 0.0f) + high);
    const float2 found = measure<kMass>(row, middle, block);
    if (wanted.reached(kMass ? found.y : found.x)) {
      high = middle, within = found;
    } else {
      low = middle, below = found;
    }
  }
  if (within.x - below.x > kRoom) return bisect<kMass>(row, low, high, 0.0f, wanted, block);
  int mine = 0;
  row.each([&](float x) { mine += x < -low && x >= -high; });
  int at = block.before(mine);
  row.each([&](float x) {
    if (x < -low && x >= -high) block.shared.list[at++] = x;
  });
  sync_block();
  const Held<kListed> list(block.shared.list, static_cast<int>(within.x - below.x));
  return bisect<kMass>(list, low, high, kMass ? below.y : below.x, wanted, block);
}

template <typename Row>
DEVICE float top_p_limit(const Row& row, const SampleParameters& p, float limit, BlockSums& block) {
  const float amount = p.top_p * measure<true>(row, limit, block).y;
  const float crossing = smallest<true>(row, limit, {amount, p.openai_top_p}, block);
  if (!p.openai_top_p || crossing == 0.0f) return crossing;
  // The nearest tokens that no longer fit; of equals, one that fits keeps all.
  const float nearer = float_of(word_of(crossing) - 1);
  const float mass = measure<true>(row, nearer, block).y;
  return mass + exp2_fast(-crossing) <= amount ? crossing : nearer;
}

}  // namespace gpt2f::cuda

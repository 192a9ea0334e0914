// sample: one token from a row of logits, and its log-probability.
//
// Maths    token = argmax(logit / T + Gumbel noise) over what top_k, top_p and min_p keep, in this
//          order; logprob = (logit - highest) - log(sum of exp(logit - highest)).
// Work     one block of 512 threads per row. ln_head leaves what each 128 logits know (HeadPart),
//          for single tensors a kernel of one warp per part does. A row without filters is decided
//          by merging its parts. Otherwise each thread holds 100 distances d = (highest - logit) /
//          T in registers (Held; Streamed reads longer rows again each time). The distance up to
//          which tokens are kept is found by bisection: of its value, until at most 2048 tokens lie
//          between the bounds, which are then spread over the block, four to a thread; then of its
//          bits, at most 31 rounds. No sort; it ends for any input.
// Traffic  parts: 6 KB a row for 50,257 tokens, about 3 us with the launch. Filters: the row once,
//          201 KB from L2 (about 2 us for one SM at 64 bytes a cycle), then some 8 rounds of 1,000
//          cycles (top_k) or 3,000 (top_p: 50,257 exponentials at 16 a cycle) and 25 of 100.
// Numerics counts are exact, sums have one fixed order. Scores of merged parts do not subtract the
//          highest logit first; they decide only while they are below 2^10, where they are rounded
//          by at most 2^-14. Noise spans 20.2, so a token with d > 21 is never drawn and its noise
//          is not computed.
// Limits   vocabulary up to 2^24, where counts in float are exact.
// Source   see sample.cuh; top-p: Holtzman et al. 2020, arXiv:1904.09751; OpenAI's variant:
//          openai/gpt-2, src/sample.py; min-p: Nguyen et al. 2024, arXiv:2407.01082.
#include "cuda/sample.cuh"

#include "core/kernels.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeld = 197;   // distances of one thread
constexpr int kListed = 8;   // of one thread, once few are left
constexpr int kNarrowings = 8;
constexpr float kPlainScore = 1024.0f;
constexpr float kFarthest = 30.0f;  // noise spans 20.2 = 29.1 log 2 and cannot make up for this
constexpr float kNegligible = 48.0f;  // 2^24 tokens this far away are less than the rounding of 1

DEVICE int32_t thread() { return static_cast<int32_t>(threadIdx.x); }

struct Shared {
  float values[2][2][kWarps];
  Best best[kWarps];
  float list[kListed * kThreads];
};

// Sums and maxima of the block, the same bits in every thread. Two sets of slots by turns: whoever
// writes one again has passed a barrier behind which everybody had read it.
struct Block {
  Shared& shared;
  int turn = 0;

  // Each warp's pair, in the order of the warps: join(x, y).
  template <typename Join>
  DEVICE void gather(float x, float y, const Join& join) {
    float (&slots)[2][kWarps] = shared.values[turn];
    turn ^= 1;
    if (lane_id() == 0) slots[0][warp_id()] = x, slots[1][warp_id()] = y;
    sync_block();
#pragma unroll
    for (int w = 0; w < kWarps; ++w) join(slots[0][w], slots[1][w]);
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
  DEVICE Best best(Best mine) {
    mine.join_warp();
    if (lane_id() == 0) shared.best[warp_id()] = mine;
    sync_block();
    Best all;
    for (int w = 0; w < kWarps; ++w) all.offer(shared.best[w].value, shared.best[w].id);
    sync_block();  // best has one set of slots
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
struct Source {
  const float* logits;
  int32_t end;  // tokens that may be drawn
  float temperature;
  float highest;
  float scale;  // log2(e) / temperature

  DEVICE float log2(int32_t token) const {
    return token < end ? (logits[token] - highest) * scale : -kInfinity;
  }
};

// The logarithms of a row: thread t has tokens t + kThreads i. each(f): f(logarithm);
// kept(limit, f): f(first, mask), where bit j of the mask stands for token first + kThreads j, not
// below -limit.
template <int kCount>
struct Held {
  float x[kCount];

  DEVICE explicit Held(const Source& source) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = source.log2(thread() + i * kThreads);
    }
  }
  DEVICE Held(const float* list, int count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = thread() + i * kThreads;
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
      take(thread() + first * kThreads, mask);
    }
  }
};

struct Streamed {
  Source source;

  DEVICE explicit Streamed(const Source& source_) : source(source_) {}
  template <typename Take>
  DEVICE void each(const Take& take) const {
    for (int32_t token = thread(); token < source.end; token += kThreads) {
      take(source.log2(token));
    }
  }
  template <typename Take>
  DEVICE void kept(float limit, const Take& take) const {
    for (int32_t token = thread(); token < source.end; token += kThreads) {
      take(token, source.log2(token) >= -limit ? 1u : 0u);
    }
  }
};

// How many tokens are not below -limit (x), and the sum of their probabilities over that of the
// likeliest (y).
template <bool kMass, typename Row>
DEVICE float2 measure(const Row& row, float limit, Block& block) {
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
                    Block& block) {
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
DEVICE float smallest(const Row& row, float limit, const Wanted& wanted, Block& block) {
  float low = -1.0f, high = 0.0f;
  row.each([&](float x) { high = x >= -limit ? fmaxf(high, 0.0f - x) : high; });
  high = fminf(block.highest(high), kNegligible);
  float2 below{0.0f, 0.0f}, within = measure<false>(row, high, block);
  constexpr float kRoom = kListed * kThreads;
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
DEVICE float top_p_limit(const Row& row, const SampleParameters& p, float limit, Block& block) {
  const float amount = p.top_p * measure<true>(row, limit, block).y;
  const float crossing = smallest<true>(row, limit, {amount, p.openai_top_p}, block);
  if (!p.openai_top_p || crossing == 0.0f) return crossing;
  // The nearest tokens that no longer fit; of equals, one that fits keeps all.
  const float nearer = float_of(word_of(crossing) - 1);
  const float mass = measure<true>(row, nearer, block).y;
  return mass + exp2_fast(-crossing) <= amount ? crossing : nearer;
}

// The general rule: subtract the highest, filter, score what is kept.
template <typename Row>
DEVICE Best draw(Source source, const SampleParameters& p, Block& block) {
  float highest = -kInfinity;
  for (int32_t token = thread(); token < source.end; token += kThreads) {
    highest = fmaxf(highest, source.logits[token]);
  }
  source.highest = block.highest(highest);
  source.scale = 1.44269504f / source.temperature;
  if (!(source.highest > -kInfinity)) return {};
  const Row row(source);
  float limit = 3.0e38f;
  if (p.top_k > 0 && p.top_k < source.end) {
    limit = smallest<false>(row, limit, {static_cast<float>(p.top_k), false}, block);
  }
  if (p.top_p < 1.0f) limit = top_p_limit(row, p, limit, block);
  Best best;
  row.kept(fminf(limit, kFarthest), [&](int32_t first, uint32_t mask) {
    for (; mask != 0; mask &= mask - 1) {
      const uint32_t lowest = mask & (~mask + 1);
      const int j = static_cast<int>(word_of(static_cast<float>(lowest)) >> 23) - 127;
      const int32_t token = first + j * kThreads;
      const float d = (source.highest - source.logits[token]) / source.temperature;
      if (exp_accurate(-d) < p.min_p) continue;
      const Words words = philox(p, static_cast<uint32_t>(token / 4));
      const uint32_t low = token % 2 == 0 ? words.c[0] : words.c[1];
      const uint32_t high = token % 2 == 0 ? words.c[2] : words.c[3];
      best.offer(gumbel(token % 4 < 2 ? low : high) - d, token);
    }
  });
  return block.best(best);
}

template <typename Row>
KERNEL LAUNCH_BOUNDS(kThreads, 1)
    sample_kernel(SampleArgs args, const HeadPart* parts, int64_t part_count) {
  SHARED(Shared, shared, );
  wait_for_previous();
  allow_next();
  const int64_t r = blockIdx.x;
  const SampleParameters& p = args.parameters[r];
  const float* const logits = args.logits + r * args.stride;
  const HeadPart* const mine = parts + r * part_count;
  Block block{shared};
  Best best;
  float highest = -kInfinity;
  for (int64_t i = threadIdx.x; i < part_count; i += kThreads) {
    best.offer(mine[i].best, mine[i].id);
    // A row with a NaN ends like one whose highest is infinite.
    highest = mine[i].highest == mine[i].highest ? fmaxf(highest, mine[i].highest) : kInfinity;
  }
  highest = block.highest(highest);
  best = block.best(best);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < part_count; i += kThreads) {
    sum = fma(mine[i].sum, exp_accurate(mine[i].highest - highest), sum);
  }
  sum = block.sums(sum, 0.0f).x;
  const int32_t end = static_cast<int32_t>(drawable(p, args.vocab));
  const bool filtered = (p.top_k > 0 && p.top_k < end) || p.top_p < 1.0f || p.min_p > 0.0f;
  const bool usable = highest < kInfinity && highest > -kInfinity;
  const bool plain = greedy(p) || (!filtered && fmaxf(best.value, -best.value) <= kPlainScore);
  if (usable && !plain) best = draw<Row>({logits, end, p.temperature, 0.0f, 0.0f}, p, block);
  if (threadIdx.x != 0) return;
  const int32_t token = !usable || best.id < 0 ? -1 : p.target >= 0 ? p.target : best.id;
  args.tokens[r] = token;
  args.logprobs[r] = token < 0 ? __builtin_nanf("") : (logits[token] - highest) - log_normal(sum);
}

// Block (r, b): parts kWarps b ... of row r, one warp each.
KERNEL LAUNCH_BOUNDS(kThreads, 1) parts_kernel(SampleArgs args, HeadPart* parts, int64_t count) {
  wait_for_previous();
  allow_next();
  const int64_t r = blockIdx.x, part = int64_t{blockIdx.y} * kWarps + warp_id();
  if (part >= count) return;
  const int64_t token = part * kPartOutputs + 4 * lane_id();
  float logits[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    logits[j] = token + j < args.vocab ? args.logits[r * args.stride + token + j] : 0.0f;
  }
  const HeadPart out = part_of(logits, part * kPartOutputs, args.vocab, args.parameters[r]);
  if (lane_id() == 0) parts[r * count + part] = out;
}

}  // namespace

void sample(const SampleArgs& args, const Lane& lane) {
  if (args.rows == 0) return;
  const int64_t count = (args.vocab + kPartOutputs - 1) / kPartOutputs;
  const HeadPart* parts = args.parts;
  if (parts == nullptr) {
    HeadPart* const made = reinterpret_cast<HeadPart*>(args.scratch);
    launch("sample_parts", parts_kernel, Grid{args.rows, (count + kWarps - 1) / kWarps}, kThreads,
           0, lane.stream, args, made, count);
    parts = made;
  }
  const auto kernel =
      args.vocab <= kHeld * kThreads ? sample_kernel<Held<kHeld>> : sample_kernel<Streamed>;
  launch("sample", kernel, Grid{args.rows}, kThreads, 0, lane.stream, args, parts, count);
}

}  // namespace gpt2f::cuda

// sample: one token from a row of logits, and its log-probability.
//
// Maths    token = argmax(logit / T + Gumbel noise) over what top_k, top_p and min_p keep, in this
//          order; logprob = (logit - highest) - log(sum of exp(logit - highest)).
// Work     one block of 256 threads a row. ln_head leaves what each 128 logits know (HeadPart); for
//          single tensors a kernel of one warp per part does. Merging the parts decides a row
//          without filters; the others are filtered first (filters.cuh).
// Bytes    parts: 6 KB a row of 50,257, one latency of L2. Filters: the row, 201 KB, about 2 us for
//          one processor at 64 bytes a cycle, then 5 us for top_k, 12 for top_p: counted from the
//          rounds of filters.cuh at 1.8 GHz, not measured.
// Numerics scores of merged parts do not subtract the highest logit before the division; they
//          decide only while they are at most 2^10, where they are rounded by at most 2^-14. Noise
//          spans 20.2, so a token with less than 2^-30 of the likeliest's probability is never
//          drawn, and its noise is not computed.
// Limits   vocabulary up to 2^24.
// Source   sample.cuh, filters.cuh; min-p: Nguyen et al. 2024, arXiv:2407.01082.
#include "cuda/sample.cuh"

#include "core/kernels.h"
#include "cuda/filters.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

constexpr float kPlainScore = 1024.0f;
constexpr float kFarthest = 30.0f;  // bits of probability that noise, 29.1 bits wide, cannot win

// The general rule: subtract the highest, filter, score what is kept.
template <typename Row>
DEVICE Best draw(LogitRow source, const SampleParameters& p, BlockSums& block) {
  float highest = -kInfinity;
  for (int32_t token = thread(); token < source.end; token += kSampleThreads) {
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
      const int32_t token = first + j * kSampleThreads;
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
KERNEL LAUNCH_BOUNDS(kSampleThreads, 1)
    sample_kernel(SampleArgs args, const HeadPart* parts, int64_t part_count) {
  SHARED(FilterShared, shared, );
  wait_for_previous();
  allow_next();
  const int64_t r = blockIdx.x;
  const SampleParameters& p = args.parameters[r];
  const float* const logits = args.logits + r * args.stride;
  const HeadPart* const mine = parts + r * part_count;
  BlockSums block{shared};
  Best best;
  float highest = -kInfinity;
  for (int64_t i = threadIdx.x; i < part_count; i += kSampleThreads) {
    best.offer(mine[i].best, mine[i].id);
    // A row with a NaN ends like one whose highest is infinite.
    highest = mine[i].highest == mine[i].highest ? fmaxf(highest, mine[i].highest) : kInfinity;
  }
  highest = block.highest(highest);
  best = block.best(best);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < part_count; i += kSampleThreads) {
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

// Block (r, b): parts kSampleWarps b ... of row r, one warp each.
KERNEL LAUNCH_BOUNDS(kSampleThreads, 1)
    parts_kernel(SampleArgs args, HeadPart* parts, int64_t count) {
  wait_for_previous();
  allow_next();
  const int64_t r = blockIdx.x, part = int64_t{blockIdx.y} * kSampleWarps + warp_id();
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
    launch("sample_parts", parts_kernel, Grid{args.rows, (count + kSampleWarps - 1) / kSampleWarps},
           kSampleThreads, 0, lane.stream, args, made, count);
    parts = made;
  }
  const auto kernel =
      args.vocab <= kHeld * kSampleThreads ? sample_kernel<Held<kHeld>> : sample_kernel<Streamed>;
  launch("sample", kernel, Grid{args.rows}, kSampleThreads, 0, lane.stream, args, parts, count);
}

}  // namespace gpt2f::cuda

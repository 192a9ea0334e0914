// sample: one token from a row of logits, and its log-probability.
//
// Work     rows are split over the lanes.
// Traffic  the row of logits (201 KB for 50,257 tokens) twice for the greedy token; about 30 times
// from
//          L2 for the thresholds of top_k and top_p, which are found by bisection over the bits of
//          a float: 31 rounds, no sort, nothing to allocate.
// Numerics the drawn token is argmax(logit / T + Gumbel noise); noise depends on seed, sample,
//          position and token only, so batching and order cannot change it.
// Source   Gumbel-max: Maddison et al. 2014, arXiv:1411.0030; Philox4x32-10: Salmon et al. 2011,
//          "Parallel random numbers: as easy as 1, 2, 3"; top-p: Holtzman et al. 2020,
//          arXiv:1904.09751; OpenAI's variant: openai/gpt-2, src/sample.py.
#pragma once

namespace {

struct Philox {
  U c[4];
};

inline Philox philox(U c0, U c1, U c2, U c3, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const U m0 = uset(0xD2511F53u), m1 = uset(0xCD9E8D57u);
    const U high0 = umulhi(c0, m0), low0 = umul(c0, m0);
    const U high1 = umulhi(c2, m1), low1 = umul(c2, m1);
    c0 = uxor(uxor(high1, c1), uset(key0));
    c1 = low1;
    c2 = uxor(uxor(high0, c3), uset(key1));
    c3 = low0;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// -log(-log u) for u = (k + 1/2) / 2^24, k = word >> 8. Above one half -log u is taken from 1 - u,
// which is exact, so that the largest noise is as accurate as the smallest.
inline F gumbel(U word) {
  const U k = ushr<8>(word);
  const F low = fmul(fadd(to_f(k), fset(0.5f)), fset(0x1p-24f));
  const F rest = fmul(fadd(to_f(usub(uset(0xFFFFFFu), k)), fset(0.5f)), fset(0x1p-24f));  // 1 - u
  const F below = flog(low);
  const M far = fgt(rest, fset(0.2928932188f));  // u below sqrt(1/2): log(2 u) - log 2
  const F near = log_reduced(fneg(rest), fset(0.0f));
  const F middle = log_reduced(fsub(fset(1.0f), fadd(rest, rest)), fset(-1.0f));
  const F above = fselect(far, middle, near);
  return fneg(flog(fneg(fselect(fge(low, fset(0.5f)), above, below))));
}

// Noise of tokens 64 b ... 64 b + 63: word w of Philox block i belongs to token 4 i + w.
inline void gumbel64(const gpt2f::SampleParameters& p, uint32_t b, float noise[64]) {
  const uint64_t position = static_cast<uint64_t>(p.position);
  const Philox out = philox(uadd(uset(16 * b), uiota()), uset(static_cast<uint32_t>(position)),
                            uset(p.sample), uset(static_cast<uint32_t>(position >> 32)),
                            static_cast<uint32_t>(p.seed), static_cast<uint32_t>(p.seed >> 32));
  for (int w = 0; w < 4; ++w) {
    float values[16];
    lanes(gumbel(out.c[w]), values);
    for (int i = 0; i < 16; ++i) noise[4 * i + w] = values[i];
  }
}

struct Best {
  F value = fset(-__builtin_inff());
  U block = uset(0);

  void offer(F candidate, int64_t i) {
    const M better = fgt(candidate, value);
    value = fselect(better, candidate, value);
    block = uselect(better, uset(static_cast<uint32_t>(i)), block);
  }
  // Highest value, lowest index; `none` when nothing exceeded minus infinity.
  int32_t index(int32_t none) const {
    float each[16];
    alignas(64) uint32_t blocks[16];
    lanes(value, each);
    ustore(blocks, block);
    int32_t best = none;
    float top = -__builtin_inff();
    for (int i = 0; i < 16; ++i) {
      const int32_t id = static_cast<int32_t>(blocks[i]) + i;
      if (each[i] > top || (each[i] == top && best != none && id < best)) {
        top = each[i];
        best = id;
      }
    }
    return best;
  }
};

// Distances d = (max - logit) / T >= 0 and weights exp(-d) of one row, padded with infinity and
// zero.
struct Spread {
  float* distance;
  float* weight;
  int64_t padded;

  int64_t count(float limit) const {
    int64_t n = 0;
    for (int64_t i = 0; i < padded; i += 16) {
      n += __builtin_popcount(bits(fge(fset(limit), fload(distance + i))));
    }
    return n;
  }
  float mass(float limit) const {
    F sum = fset(0.0f);
    for (int64_t i = 0; i < padded; i += 16) {
      const M in = fge(fset(limit), fload(distance + i));
      sum = fadd(sum, fselect(in, fload(weight + i), fset(0.0f)));
    }
    return fsum(sum);
  }
};

inline float float_of(uint32_t word) {
  float out;
  __builtin_memcpy(&out, &word, sizeof out);
  return out;
}

// The smallest non-negative float for which `enough` holds, by bisection over its bits.
template <typename Enough>
float smallest(const Enough& enough) {
  uint32_t low = 0, high = 0x7F800000u;  // infinity always holds
  while (low < high) {
    const uint32_t middle = low + (high - low) / 2;
    if (enough(float_of(middle))) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return float_of(high);
}

inline float top_p_limit(const Spread& s, const gpt2f::SampleParameters& p, float limit) {
  const float wanted = p.top_p * s.mass(limit);
  if (!p.openai_top_p) {
    const float t = smallest([&](float d) { return s.mass(d) >= wanted; });
    return t < limit ? t : limit;
  }
  // The nearest tokens that no longer fit; of equals, one that fits keeps all.
  const float crossing = smallest([&](float d) { return s.mass(d) > wanted; });
  if (!(crossing < __builtin_inff()) || crossing == 0.0f)
    return crossing < limit ? crossing : limit;
  uint32_t word;
  __builtin_memcpy(&word, &crossing, sizeof word);
  const float above = float_of(word - 1);
  const float one =
      (s.mass(crossing) - s.mass(above)) / static_cast<float>(s.count(crossing) - s.count(above));
  return s.mass(above) + one <= wanted ? crossing : above;
}

inline int32_t draw(const float* logits, int64_t vocab, float highest,
                    const gpt2f::SampleParameters& p, float* scratch) {
  const int64_t padded = round_up(vocab, 16);
  const Spread s{scratch, scratch + padded, padded};
  for (int64_t i = 0; i < vocab; i += 16) {
    const F gap = fdiv(fsub(fset(highest), load16(logits + i, vocab - i)), fset(p.temperature));
    const F d = fselect(first_clamped(vocab - i), gap, fset(__builtin_inff()));
    fstore(s.distance + i, d);
    if (p.top_p < 1.0f) fstore(s.weight + i, fexp(fneg(d)));
  }
  float limit = 3.0e38f;
  if (p.top_k > 0 && p.top_k < vocab) {
    limit = smallest([&](float d) { return s.count(d) >= p.top_k; });
  }
  if (p.top_p < 1.0f) {
    for (int64_t i = 0; i < padded; i += 16) {
      const M in = fge(fset(limit), fload(s.distance + i));
      fstore(s.weight + i, fselect(in, fload(s.weight + i), fset(0.0f)));
    }
    limit = top_p_limit(s, p, limit);
  }
  Best best;
  float noise[64];
  for (int64_t i = 0; i < vocab; i += 16) {
    if (i % 64 == 0) gumbel64(p, static_cast<uint32_t>(i / 64), noise);
    const F d = fload(s.distance + i);
    M kept = fge(fset(limit), d);
    if (p.min_p > 0.0f) kept = mand(kept, fge(fexp(fneg(d)), fset(p.min_p)));
    const F value = fsub(fload(noise + i % 64), d);
    best.offer(fselect(kept, value, fset(-__builtin_inff())), i);
  }
  return best.index(-1);
}

// Highest logit among the first `count`, lowest id of equals; -1 when there is none above minus
// infinity or one is NaN.
inline int32_t highest_of(const float* logits, int64_t count) {
  Best best;
  uint32_t unusable = 0;
  for (int64_t i = 0; i < count; i += 16) {
    const F x = load16(logits + i, count - i);
    unusable |= bits(fnan(x));
    best.offer(fselect(first_clamped(count - i), x, fset(-__builtin_inff())), i);
  }
  return unusable != 0 ? -1 : best.index(-1);
}

inline void sample_row(const float* logits, int64_t vocab, const gpt2f::SampleParameters& p,
                       float* scratch, int32_t* token, float* logprob) {
  const int64_t drawable = p.drawable > 0 && p.drawable < vocab ? p.drawable : vocab;
  const int32_t top = highest_of(logits, vocab);
  const int32_t first = drawable < vocab ? highest_of(logits, drawable) : top;
  if (top < 0 || first < 0 || logits[top] == __builtin_inff()) {
    *token = -1;
    *logprob = __builtin_nanf("");
    return;
  }
  const float highest = logits[top];
  F sum = fset(0.0f);
  for (int64_t i = 0; i < vocab; i += 16) {
    const F p_i = fexp(fsub(load16(logits + i, vocab - i), fset(highest)));
    sum = fadd(sum, fselect(first_clamped(vocab - i), p_i, fset(0.0f)));
  }
  float log_sum[16];
  lanes(flog(fset(fsum(sum))), log_sum);
  // A temperature below the smallest normal float is zero here, as everywhere in the kernels.
  const bool greedy = p.temperature < 1.1754944e-38f;
  *token = p.target >= 0 ? p.target
           : greedy      ? first
                         : draw(logits, drawable, logits[first], p, scratch);
  *logprob = (logits[*token] - highest) - log_sum[0];
}

inline void sample(const gpt2f::SampleArgs& a, const Lane& lane) {
  float* const scratch = a.scratch + lane.rank * 2 * round_up(a.vocab, 16);
  const Range mine = share(a.rows, 1, lane);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    sample_row(a.logits + r * a.stride, a.vocab, a.parameters[r], scratch, a.tokens + r,
               a.logprobs + r);
  }
}

}  // namespace

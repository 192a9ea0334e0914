// pages: what attention does with a page of keys and values that are floats or bfloat16, or, by way
// of cache_int8.inl.h, bytes. Layouts stand in core/kernels.h, order and numerics in
// attention.inl.h.
#pragma once

namespace {

struct Pages {
  uint32_t* const* blocks;
  int64_t offset;  // of this layer and head
  const uint32_t* key(int64_t j) const { return blocks[j] + offset; }
};

// Pages of a head lie far apart, so the hardware does not see the next one coming: asks for `words`
// of it, a page ahead. Only for few queries; more of them hide the wait behind their work.
template <int R>
inline void expect(const uint32_t* from, int64_t words) {
  if constexpr (R <= 2) {
    for (int64_t i = 0; i < words; i += 16) __builtin_prefetch(from + i);
  }
}

// Positions in one word of V; C is the precision of the cache, P that of the rest.
template <Precision C>
constexpr int64_t kPerWord = C == kBf16 ? 2 : 1;
// Words of weights that meet one word of V. Where no instruction multiplies pairs, weights are kept
// as floats, once for all values: taking pairs apart costs as much as multiplying them.
template <Precision C>
constexpr int64_t kWeightWords = C == kBf16 && !kDotPair ? 2 : 1;
// Words from a panel of 16 values to the next.
template <Precision C>
constexpr int64_t kValueWords = C == kInt8 ? kLanes / 4 : kLanes;

// What a page's weights are summed as; an int8 cache keeps them times the scales of the values.
template <Precision C>
inline F store_weights(uint32_t* row, int64_t page, F p, const gpt2f::CacheLayout& cache,
                       const Pages& pages) {
  float* const floats = reinterpret_cast<float*>(row) + page * 16;
  if constexpr (C == kFp32) {
    fstore(floats, p);
    return p;
  } else if constexpr (C == kInt8) {
    fstore(floats, fmul(p, value_scales(cache, pages.key(page))));
    return p;
  } else {
    if constexpr (kDotPair) {
      bf16_store(reinterpret_cast<uint16_t*>(row) + page * 16, p);
      return as_f(ushl<16>(bf16_words(p)));
    } else {
      const F rounded = upper_half(bf16_round(p));
      fstore(floats, rounded);
      return rounded;
    }
  }
}

// Keeps the scores of a page, masked behind the query's count.
inline void keep_scores(F score, float scale, int64_t page, int64_t count, float* row, F& top) {
  F kept = fmul(score, fset(scale));
  const int64_t seen = count - page * 16;
  if (seen < 16) kept = fselect(first_clamped(seen), kept, fset(-__builtin_inff()));
  top = fmax(kept, top);
  fstore(row + page * 16, kept);
}

// Scores of R queries against pages j ... j + N - 1.
template <Precision C, int R, int N>
void score_pages(const Pages& pages, const gpt2f::CacheLayout& cache, int64_t j,
                 const uint32_t* query, int64_t query_row, const int64_t (&count)[R], float scale,
                 float* scores, int64_t score_row, F (&top)[R]) {
  if constexpr (C == kInt8) {
    static_assert(N == 1);
    F found[R];
    byte_scores<R>(cache, pages.key(j), query, query_row, found);
    for (int r = 0; r < R; ++r) {
      keep_scores(found[r], scale, j, count[r], scores + r * score_row, top[r]);
    }
    return;
  }
  constexpr int64_t kScoreSteps = 16;
  const uint32_t* keys[N];
  F acc[R][N];
  for (int n = 0; n < N; ++n) {
    keys[n] = pages.key(j + n);
    for (int r = 0; r < R; ++r) acc[r][n] = fset(0.0f);
  }
  // In short chains: one over all of D loses more of a peaked softmax than torch does.
  for (int64_t s0 = 0; s0 < cache.key_steps; s0 += kScoreSteps) {
    const int64_t end = s0 + kScoreSteps < cache.key_steps ? s0 + kScoreSteps : cache.key_steps;
    F part[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) part[r][n] = fset(0.0f);
    }
    for (int64_t s = s0; s < end; ++s) {
      U key[N];
      for (int n = 0; n < N; ++n) key[n] = uload(keys[n] + s * 16);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const U q = uset(query[r * query_row + s]);
        for (int n = 0; n < N; ++n) part[r][n] = mac<C>(part[r][n], key[n], q);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) acc[r][n] = fadd(acc[r][n], part[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      keep_scores(acc[r][n], scale, j + n, count[r], scores + r * score_row, top[r]);
    }
  }
}

// acc[r][n] += one word of V of N panels times the weights of R queries.
template <Precision C, int R, int N>
[[gnu::always_inline]] inline void add_words(const U (&value)[N], const uint32_t* weights,
                                             int64_t weight_row, F (&acc)[R][N]) {
  if constexpr (kWeightWords<C> == 1) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const U weight = uset(weights[r * weight_row]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = mac<C>(acc[r][n], value[n], weight);
    }
  } else {  // as dot_pair: the odd one first
    F odd[N], even[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      odd[n] = upper_half(value[n]);
      even[n] = as_f(ushl<16>(value[n]));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F of_odd = as_f(uset(weights[r * weight_row + 1]));
      const F of_even = as_f(uset(weights[r * weight_row]));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = ffma(odd[n], of_odd, acc[r][n]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = ffma(even[n], of_even, acc[r][n]);
    }
  }
}

// acc[r][n] += N panels of values times the weights of R queries, over `words` words of V. Where
// `half` is set, the last of them has a position that the query does not see: what lies there must
// not even be multiplied by zero.
template <Precision C, int R, int N>
[[gnu::always_inline]] inline void add_values(const uint32_t* v, int64_t v_step,
                                              const uint32_t* weights, int64_t weight_row,
                                              int64_t words, bool half, F (&acc)[R][N]) {
  if constexpr (C == kInt8) {
    byte_values<R, N>(v, v_step, weights, weight_row, words, acc);
  } else {
    for (int64_t s = 0; s < words; ++s) {
      const U seen = uset(half && s + 1 == words ? 0xFFFFu : 0xFFFFFFFFu);
      U value[N];
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        value[n] = uload(v + s * v_step + n * kLanes);
        if constexpr (C == kBf16) value[n] = uand(value[n], seen);
      }
      add_words<C, R, N>(value, weights + s * kWeightWords<C>, weight_row, acc);
    }
  }
}

}  // namespace

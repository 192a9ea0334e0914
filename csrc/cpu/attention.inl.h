// attention: causal softmax(scale q K^T) V over the pages of one head, for up to six queries at a
// time.
//
// Layout   core/kernels.h, CacheLayout. Lanes lie along positions for q.k and along D for p.v.
// Work     one task per head and tile of queries of one sequence, taken by whichever lane is free.
// Traffic  K and V of a head once per tile: 4 S D words' bytes; scores stay in the lane's scratch.
// Numerics q.k in order of d; the exact maximum first, then exp, so nothing is rescaled; weights
// are
//          rounded to the operand type and summed as rounded, in sixteen lanes and one tree; p.v in
//          order of positions, 64 at a time, the chunks added in order. Decode and prefill agree.
// Source   Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
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

// Positions in one word of V, or of weights; C is the precision of the cache, P that of the rest.
template <Precision C>
constexpr int64_t kPerWord = C == kBf16 ? 2 : 1;
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
    const U rounded = bf16_round(p);
    bf16_store_words(reinterpret_cast<uint16_t*>(row) + page * 16, rounded);
    return upper_half(rounded);
  }
}

// Keeps the scores of a page, masked behind the query's count.
inline void keep_scores(F score, float scale, int64_t page, int64_t count, float* row, F& top) {
  const M seen = first_clamped(count - page * 16);
  const F kept = fselect(seen, fmul(score, fset(scale)), fset(-__builtin_inff()));
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

// Weights of R queries for every page: softmax of their scores, not yet divided by sums[r].
template <Precision C, int R>
void attention_weights(const Pages& pages, const gpt2f::CacheLayout& cache, const uint32_t* query,
                       int64_t query_row, const int64_t (&count)[R], float scale, float* scores,
                       int64_t score_row, float (&sums)[R]) {
  constexpr int kPagesAtOnce = C != kInt8 && R > 2 && kTilePanels > 1 ? 2 : 1;
  const int64_t page_count = (count[R - 1] + 15) / 16;
  F top[R];
  for (int r = 0; r < R; ++r) top[r] = fset(-__builtin_inff());
  int64_t page = 0;
  for (; page + kPagesAtOnce <= page_count; page += kPagesAtOnce) {
    if (page + 1 < page_count) expect<R>(pages.key(page + 1), cache.key_words());
    score_pages<C, R, kPagesAtOnce>(pages, cache, page, query, query_row, count, scale, scores,
                                    score_row, top);
  }
  if (page < page_count) {
    score_pages<C, R, 1>(pages, cache, page, query, query_row, count, scale, scores, score_row,
                         top);
  }
  for (int r = 0; r < R; ++r) {
    float each[16];
    lanes(top[r], each);
    float highest = each[0];
    for (int i = 1; i < 16; ++i) highest = each[i] > highest ? each[i] : highest;
    F sum = fset(0.0f);
    float* const row = scores + r * score_row;
    for (int64_t j = 0; j < page_count; ++j) {
      const F p = fexp(fsub(fload(row + j * 16), fset(highest)));
      sum = fadd(sum, store_weights<C>(reinterpret_cast<uint32_t*>(row), j, p, cache, pages));
    }
    sums[r] = fsum(sum);
  }
}

// acc += the weighted values of words [begin, end) of one query, whose last word holds a position
// it does not see when its count is odd: what lies there must not even be multiplied by zero.
template <Precision C, int N>
void add_values(const uint32_t* v, int64_t v_step, const uint32_t* weights, int64_t begin,
                int64_t end, bool half, F (&acc)[N]) {
  for (int64_t s = begin; s < end; ++s) {
    const U seen = uset(half && s + 1 == end ? 0xFFFFu : 0xFFFFFFFFu), weight = uset(weights[s]);
    for (int n = 0; n < N; ++n) {
      const uint32_t* const from = v + s * v_step + n * kValueWords<C>;
      if constexpr (C == kInt8) {
        const F value = load_bytes(reinterpret_cast<const int8_t*>(from));
        acc[n] = ffma(value, as_f(weight), acc[n]);
      } else {
        acc[n] = mac<C>(acc[n], uand(uload(from), seen), weight);
      }
    }
  }
}

// N panels of 16 values of the output of R queries. What all of them see goes through one tile; the
// few positions that only later ones see follow query by query, in the same order.
template <Precision C, int R, int N, typename Sink>
void attention_values(const Pages& pages, const gpt2f::CacheLayout& cache, int64_t panel,
                      const uint32_t* weights, int64_t weight_row, const int64_t (&count)[R],
                      const float (&sums)[R], const Sink& sink) {
  const int64_t per_page = cache.value_rows, v_step = cache.value_width * kValueWords<C> / kLanes;
  const int64_t common = count[0] / kPerWord<C>;  // words whole for every query
  const int64_t rows = (count[R - 1] + kPerWord<C> - 1) / kPerWord<C>;
  F total[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) total[r][n] = fset(0.0f);
  }
  for (int64_t row = 0; row < rows;) {
    F acc[R][N];
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) acc[r][n] = fset(0.0f);
    }
    const int64_t chunk_end = row + per_page * (gpt2f::kChunk / gpt2f::kPagePositions);
    const int64_t end = chunk_end < rows ? chunk_end : rows;
    for (; row < end; row += per_page) {
      const uint32_t* const v =
          pages.key(row / per_page) + cache.key_words() + panel * kValueWords<C>;
      const int64_t last = end - row < per_page ? end - row : per_page;
      if (row + per_page < rows) {
        expect<R>(pages.key(row / per_page + 1) + cache.key_words(), cache.value_words());
      }
      const int64_t shared = common - row < 0 ? 0 : common - row < last ? common - row : last;
      if constexpr (C == kInt8) {
        byte_values<R, N>(v, v_step, weights + row, weight_row, shared, acc);
      } else {
        tile<C, R, N>(v, v_step, weights + row, weight_row, shared, acc);
      }
      if (shared == last) continue;
      for (int r = 0; r < R; ++r) {
        const int64_t own = (count[r] + kPerWord<C> - 1) / kPerWord<C> - row;
        const bool half = C == kBf16 && count[r] % 2 != 0 && own <= last;
        add_values<C, N>(v, v_step, weights + r * weight_row + row, shared, own < last ? own : last,
                         half, acc[r]);
      }
    }
    row = end;
    for (int r = 0; r < R; ++r) {
      for (int n = 0; n < N; ++n) total[r][n] = fadd(total[r][n], acc[r][n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sink(r, panel + n, fdiv(total[r][n], fset(sums[r])));
  }
}

template <Precision P, Precision C, int R>
void attend(const Pages& pages, const gpt2f::CacheLayout& cache, const uint32_t* query,
            int64_t query_row, int64_t first_count, float scale, float* scratch, int64_t context,
            Element<P>* out, int64_t out_row) {
  const int64_t score_row = round_up(context, gpt2f::kChunk);
  int64_t count[R];
  for (int r = 0; r < R; ++r) count[r] = first_count + r;
  float sums[R];
  attention_weights<C, R>(pages, cache, query, query_row, count, scale, scratch, score_row, sums);

  const int64_t size = cache.head_size;
  const auto sink = [&](int64_t r, int64_t panel, F value) {
    store16(out + r * out_row + panel * 16, value, size - panel * 16);
  };
  const uint32_t* const weights = reinterpret_cast<const uint32_t*>(scratch);
  const int64_t panels = cache.value_width / 16;
  constexpr int kPanels = kTilePanels == 1 ? 1 : R <= 2 ? 4 : 2;
  int64_t panel = 0;
  for (; panel + kPanels <= panels; panel += kPanels) {
    attention_values<C, R, kPanels>(pages, cache, panel, weights, score_row, count, sums, sink);
  }
  for (; panel < panels; ++panel) {
    attention_values<C, R, 1>(pages, cache, panel, weights, score_row, count, sums, sink);
  }
}

// `rows` consecutive queries, the first of which attends to `first_count` positions.
template <Precision P, Precision C = P, int R = int{gpt2f::kQueryTile}>
void attend_rows(int64_t rows, const Pages& pages, const gpt2f::CacheLayout& cache,
                 const uint32_t* query, int64_t query_row, int64_t first_count, float scale,
                 float* scratch, int64_t context, Element<P>* out, int64_t out_row) {
  if (rows == R) {
    attend<P, C, R>(pages, cache, query, query_row, first_count, scale, scratch, context, out,
                    out_row);
  } else if constexpr (R > 1) {
    attend_rows<P, C, R - 1>(rows, pages, cache, query, query_row, first_count, scale, scratch,
                             context, out, out_row);
  }
}

template <Precision P, Precision C>
void attention_tile(const gpt2f::AttentionArgs& a, const gpt2f::Sequence& s, int64_t head,
                    int64_t row, float* scratch) {
  const gpt2f::CacheLayout& cache = a.cache;
  const int64_t query_row = cache.heads * cache.key_steps;
  const int64_t rows = s.rows - row < gpt2f::kQueryTile ? s.rows - row : gpt2f::kQueryTile;
  const Pages pages{s.blocks, cache.page_offset(a.layer, head)};
  const int64_t r = s.row + row;
  attend_rows<P, C>(rows, pages, cache, a.query + r * query_row + head * cache.key_steps, query_row,
                    s.start + row + 1, a.scale, scratch, a.context,
                    at<P>(a.out, r * a.stride + head * cache.head_size), a.stride);
}

template <Precision P, Precision C>
void attention_of(const gpt2f::AttentionArgs& a, const Lane& lane) {
  float* const scratch = a.scratch + lane.rank * gpt2f::scratch_floats(a.context);
  const auto tiles_of = [](const gpt2f::Sequence& s) {
    return (s.rows + gpt2f::kQueryTile - 1) / gpt2f::kQueryTile;
  };
  int64_t tasks = 0;
  for (int64_t i = 0; i < a.sequence_count; ++i) tasks += tiles_of(a.sequences[i]) * a.cache.heads;
  // Pieces come to a lane in rising order, so one walk over the sequences finds them all.
  int64_t i = 0, first = 0;
  gpt2f::take_pieces(tasks, lane, [&](int64_t task) {
    while (task - first >= tiles_of(a.sequences[i]) * a.cache.heads) {
      first += tiles_of(a.sequences[i++]) * a.cache.heads;
    }
    const int64_t tile = (task - first) / a.cache.heads, head = (task - first) % a.cache.heads;
    attention_tile<P, C>(a, a.sequences[i], head, tile * gpt2f::kQueryTile, scratch);
  });
}

inline void attention(const gpt2f::AttentionArgs& a, const Lane& lane) {
  const bool fp32 = a.precision == kFp32;
  if (a.cache.int8) {
    return fp32 ? attention_of<kFp32, kInt8>(a, lane) : attention_of<kBf16, kInt8>(a, lane);
  }
  fp32 ? attention_of<kFp32, kFp32>(a, lane) : attention_of<kBf16, kBf16>(a, lane);
}

}  // namespace

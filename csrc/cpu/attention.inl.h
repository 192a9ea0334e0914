// attention: causal softmax(scale q K^T) V over the pages of one head, for up to six queries at a
// time.
//
// Layout   core/kernels.h, CacheLayout. Lanes lie along positions for q.k and along D for p.v.
// Work     one task per head and tile of queries of one sequence. Every lane begins with queries of
//          its own, those whose rows it has in products too; tiles of a head follow each other, so
//          that its K and V stay in a second-level cache. Who is done helps the others.
// Traffic  K and V of a head once per tile: 4 S D words' bytes; scores stay in the lane's scratch.
// Numerics q.k in order of d; the exact maximum first, then exp, so nothing is rescaled; weights
//          are rounded to the operand type and summed as rounded, in sixteen lanes and one tree;
//          p.v in order of positions, 64 at a time, the chunks added in order. Decode and prefill
//          agree.
// Source   Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
#pragma once

namespace {

constexpr int64_t kPagesAhead = 4;  // of V, which few queries ask for

// Scores of N pages become weights, not yet divided by their sum.
template <Precision C, int N>
[[gnu::always_inline]] inline void weights_of(const Pages& pages, const gpt2f::CacheLayout& cache,
                                              int64_t j, F highest, float* row, F& sum) {
  F p[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) p[n] = fsub(fload(row + (j + n) * 16), highest);
  if constexpr (C == kBf16) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) p[n] = fmul(p[n], fset(1.44269504088896341f));
    fexp2_short(p);
  } else {
    fexp(p);
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    sum = fadd(sum, store_weights<C>(reinterpret_cast<uint32_t*>(row), j + n, p[n], cache, pages));
  }
}

// The same of all pages of one query, whose highest score is known; returns the sum.
template <Precision C>
[[gnu::noinline]] float query_weights(const Pages& pages, const gpt2f::CacheLayout& cache,
                                      int64_t page_count, F top, float* row) {
  const F highest = fset(fmost(top));
  F sum = fset(0.0f);
  int64_t j = 0;
  for (; j + kSideBySide <= page_count; j += kSideBySide) {
    weights_of<C, kSideBySide>(pages, cache, j, highest, row, sum);
  }
  for (; j < page_count; ++j) weights_of<C, 1>(pages, cache, j, highest, row, sum);
  return fsum(sum);
}

// Weights of R queries for every page: softmax of their scores, not yet divided by sums[r].
template <Precision C, int R>
void attention_weights(const Pages& pages, const gpt2f::CacheLayout& cache, const uint32_t* query,
                       int64_t query_row, const int64_t (&count)[R], float scale, float* scores,
                       int64_t score_row, float (&sums)[R]) {
  constexpr bool kSeveral = C != kInt8 && kTilePanels > 1;
  constexpr int kPagesAtOnce = !kSeveral || R == 2 ? 1 : R > 2 ? 2 : 4;
  const int64_t page_count = (count[R - 1] + 15) / 16;
  F top[R];
  for (int r = 0; r < R; ++r) top[r] = fset(-__builtin_inff());
  int64_t page = 0;
  const auto score = [&]<int N>() {
    for (; page + N <= page_count; page += N) {
      for (int64_t next = page + N; next < page + 2 * N && next < page_count; ++next) {
        expect<R>(pages.key(next), cache.key_words());
      }
      score_pages<C, R, N>(pages, cache, page, query, query_row, count, scale, scores, score_row,
                           top);
    }
  };
  score.template operator()<kPagesAtOnce>();
  if constexpr (kPagesAtOnce > 2) score.template operator()<2>();
  if constexpr (kPagesAtOnce > 1) score.template operator()<1>();
  for (int64_t j = 0; j < kPagesAhead && j < page_count; ++j) {
    expect<R>(pages.key(j) + cache.key_words(), cache.value_words());
  }
  for (int r = 0; r < R; ++r) {
    sums[r] = query_weights<C>(pages, cache, page_count, top[r], scores + r * score_row);
  }
}

// V of one head, panels of 16 along D from `panel`; its last query sees `rows` words of it.
template <Precision C>
struct Values {
  const Pages& pages;
  const gpt2f::CacheLayout& cache;
  int64_t rows;
  int64_t panel = 0;

  int64_t step() const { return cache.value_width * kValueWords<C> / kLanes; }  // words to the next
  const uint32_t* page(int64_t j) const {
    return pages.key(j) + cache.key_words() + panel * kValueWords<C>;
  }
};

// Words [row, end) of V, which R queries see whole, times their weights. A function of its own, or
// GCC keeps other sums in registers and these in memory.
template <Precision C, int R, int N>
[[gnu::noinline]] void common_values(const Values<C>& values, const uint32_t* weights,
                                     int64_t weight_row, int64_t row, int64_t end,
                                     F (&sums)[R][N]) {
  const int64_t per_page = values.cache.value_rows;
  F acc[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) acc[r][n] = fset(0.0f);
  }
  for (; row < end; row += per_page) {
    const int64_t next = row / per_page + kPagesAhead;
    if (next * per_page < values.rows) {
      expect<R>(values.pages.key(next) + values.cache.key_words(), values.cache.value_words());
    }
    add_values<C, R, N>(values.page(row / per_page), values.step(), weights + row * kWeightWords<C>,
                        weight_row, end - row < per_page ? end - row : per_page, false, acc);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[r][n] = acc[r][n];
  }
}

// Words [row, end) of V for one query, which does not see the second half of the last if `half`.
template <Precision C, int N>
[[gnu::noinline]] void own_values(const Values<C>& values, const uint32_t* weights, int64_t row,
                                  int64_t end, bool half, F (&sums)[N]) {
  const int64_t per_page = values.cache.value_rows;
  F acc[1][N];
  for (int n = 0; n < N; ++n) acc[0][n] = sums[n];
  while (row < end) {
    const int64_t next = (row / per_page + 1) * per_page, stop = next < end ? next : end;
    add_values<C, 1, N>(values.page(row / per_page) + row % per_page * values.step(), values.step(),
                        weights + row * kWeightWords<C>, 0, stop - row, half && stop == end, acc);
    row = stop;
  }
  for (int n = 0; n < N; ++n) sums[n] = acc[0][n];
}

// N panels of 16 values of the output of R queries. What all of them see goes through one tile; the
// few positions that only later ones see follow query by query, in the same order.
template <Precision C, int R, int N, typename Sink>
void attention_values(const Values<C>& values, const uint32_t* weights, int64_t weight_row,
                      const int64_t (&count)[R], const float (&sums)[R], const Sink& sink) {
  constexpr int64_t kChunkWords = gpt2f::kChunk / kPerWord<C>;
  const int64_t common = count[0] / kPerWord<C>;  // words whole for every query
  F total[R][N];
#pragma GCC unroll 1  // in memory all the same
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) total[r][n] = fset(0.0f);
  }
  for (int64_t row = 0; row < values.rows; row += kChunkWords) {
    const int64_t end = row + kChunkWords;
    const int64_t shared = common < row ? row : common < end ? common : end;
    F chunk[R][N];
    common_values<C, R, N>(values, weights, weight_row, row, shared, chunk);
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {
      const int64_t seen = (count[r] + kPerWord<C> - 1) / kPerWord<C>;
      if (shared < end && shared < seen) {
        const bool half = C == kBf16 && count[r] % 2 != 0 && seen <= end;
        own_values<C, N>(values, weights + r * weight_row, shared, seen < end ? seen : end, half,
                         chunk[r]);
      }
      for (int n = 0; n < N; ++n) total[r][n] = fadd(total[r][n], chunk[r][n]);
    }
  }
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) {
      sink(r, values.panel + n, fdiv(total[r][n], fset(sums[r])));
    }
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
  Values<C> values{pages, cache, (count[R - 1] + kPerWord<C> - 1) / kPerWord<C>};
  for (; values.panel + kTilePanels <= panels; values.panel += kTilePanels) {
    attention_values<C, R, kTilePanels>(values, weights, score_row, count, sums, sink);
  }
  if constexpr (kTilePanels > 1) {
    for (; values.panel < panels; ++values.panel) {
      attention_values<C, R, 1>(values, weights, score_row, count, sums, sink);
    }
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

// Tasks of one sequence: its tiles in `parts` parts, in each part head by head.
struct AttentionTasks {
  int64_t tiles, heads, parts;

  int64_t count() const { return tiles * heads; }
  int64_t first_tile(int64_t part) const { return tiles * part / parts; }
  // Calls work(head, tile) for one of them.
  template <typename Work>
  void find(int64_t task, const Work& work) const {
    int64_t part = 0;
    while (task >= first_tile(part + 1) * heads) ++part;
    const int64_t first = first_tile(part), wide = first_tile(part + 1) - first;
    const int64_t inside = task - first * heads;
    work(inside / wide, first + inside % wide);
  }
};

template <Precision P, Precision C>
void attention_of(const gpt2f::AttentionArgs& a, const Lane& lane) {
  float* const scratch = a.scratch + lane.rank * gpt2f::scratch_floats(a.context);
  const auto tasks_of = [&](int64_t i) {
    const int64_t tiles = (a.sequences[i].rows + gpt2f::kQueryTile - 1) / gpt2f::kQueryTile;
    return AttentionTasks{tiles, a.cache.heads, lane.size};
  };
  int64_t all = 0;
  for (int64_t i = 0; i < a.sequence_count; ++i) all += tasks_of(i).count();
  // Taking one waits for all that the one before wrote, so of many tasks several are taken at once.
  const int64_t some = all / (64 * lane.size), unit = some < 1 ? 1 : some > 8 ? 8 : some;
  // Tasks mostly come in rising order: the search goes on where it was.
  int64_t i = 0, first = 0;
  gpt2f::take_shares(all, unit, lane, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      if (task < first) i = first = 0;
      for (; task - first >= tasks_of(i).count(); ++i) first += tasks_of(i).count();
      tasks_of(i).find(task - first, [&](int64_t head, int64_t tile) {
        attention_tile<P, C>(a, a.sequences[i], head, tile * gpt2f::kQueryTile, scratch);
      });
    }
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

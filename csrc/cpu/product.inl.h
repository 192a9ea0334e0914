// product: sink(row, column, N times 16 sums) for x W^T, x operand rows, W packed in panels of 16
// outputs. What is done with one step along K of int8 and int4 matrices stands in quantized.inl.h.
//
// Layout   core/kernels.h, PackedLinear: a lane reads its groups as one contiguous stream.
// Work     panels are split over the lanes, K never. Where each lane gets 96 rows and more, rows
//          are split instead, so that what one lane writes is not read and written again by
//          another: the two may share no cache. Who is done helps the others. Rows go through
//          registers kTileRows or, beside int8 and int4, kDotRows at a time; few rows beside those
//          take one panel after the other, in the order of memory.
// Traffic  each weight word once from memory per 96 to 252 rows, x from cache: 4 K N bytes in fp32,
//          2 K N in bf16. At 33 GB/s GPT-2 small's 124 M weights take 15 ms or 7.5 ms. The weights
//          of the next block are asked for while this one is worked on.
// Numerics one fused multiply-add chain per 96 elements of K, in order; block sums added in order.
//          Lanes lie along outputs, so a sum has one order whatever the tile or the vector width.
#pragma once

namespace {

// acc[r][n] += x[r] . panel n over `steps` operand words.
template <Precision P, int R, int N, int kAhead = 0>
[[gnu::always_inline]] inline void tile(const uint32_t* w, int64_t w_step, const uint32_t* x,
                                        int64_t x_row, int64_t steps, F (&acc)[R][N]) {
  for (int64_t s = 0; s < steps; ++s) {
    U panel[N];
#pragma GCC unroll 8
    for (int n = 0; n < N && kAhead > 0; ++n) {
      __builtin_prefetch(w + s * w_step + n * kLanes + kAhead / 4);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) panel[n] = uload(w + s * w_step + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const U xs = uset(x[r * x_row + s]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = mac<P>(acc[r][n], panel[n], xs);
    }
  }
}

struct Block {  // one block of K of one group of panels
  const uint32_t* w;  // its first word
  int64_t panels;  // of the group
  int64_t steps;
  bool first;
  bool few;  // rows: memory sets the pace, and the first tile asks for it
  float* sums;  // [row][64] of this group

  template <Precision P>
  int64_t words() const {
    return panels * steps * Steps<P>::kPanelWords;
  }
};

constexpr int64_t kSumStride = kLanes * gpt2f::kGroupPanels;

// Adds the block to the sums of R rows from `row` and N panels from `panel`.
template <Precision P, int R, int N>
[[gnu::noinline]] void product_tile(const Block& b, int panel, const uint32_t* x, int64_t x_row,
                                    int64_t row) {
  constexpr bool kChain = Steps<P>::kQuantized;  // goes on from the sum so far
  float* const sums = b.sums + row * kSumStride + panel * kLanes;
  F acc[R][N];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      acc[r][n] = kChain && !b.first ? fload(sums + r * kSumStride + n * kLanes) : fset(0.0f);
    }
  }
  const bool asks = b.few && row == 0;
  if constexpr (Steps<P>::kQuantized) {
    constexpr bool kMayAsk = N == 1;
    if (kMayAsk && asks) {
      const uint32_t* const ahead = b.w + b.words<P>() + panel * b.steps * Steps<P>::kPanelWords;
      add_groups<P, R, N, kMayAsk>(b.w, panel, b.panels, x, x_row, b.steps, acc, ahead);
    } else {
      add_groups<P, R, N>(b.w, panel, b.panels, x, x_row, b.steps, acc);
    }
  } else if (R == 1 || asks) {
    tile<P, R, N, kAheadOne>(b.w + panel * kLanes, b.panels * kLanes, x, x_row, b.steps, acc);
  } else {
    tile<P, R, N>(b.w + panel * kLanes, b.panels * kLanes, x, x_row, b.steps, acc);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* const sum = sums + r * kSumStride + n * kLanes;
      fstore(sum, b.first || kChain ? acc[r][n] : fadd(fload(sum), acc[r][n]));
    }
  }
}

template <Precision P, int R>
void product_panels(const Block& b, int begin, int end, const uint32_t* x, int64_t x_row,
                    int64_t row) {
  constexpr bool kDots = Steps<P>::kQuantized, kBytes = P == kInt8;
  constexpr int kPanels = R == 1         ? (kDots ? kDotPanelsOne : kTilePanelsOne)
                          : R > kDotRows ? 1
                          : kBytes       ? kDotPanelsBytes
                          : kDots        ? kDotPanels
                                         : kTilePanels;
  int panel = begin;
  for (; (!kDots || !b.few) && panel + kPanels <= end; panel += kPanels) {
    product_tile<P, R, kPanels>(b, panel, x, x_row, row);
  }
  for (; panel < end; ++panel) product_tile<P, R, 1>(b, panel, x, x_row, row);
}

template <Precision P, int R>
void product_rows(int rows, const Block& b, int begin, int end, const uint32_t* x, int64_t x_row,
                  int64_t row) {
  if (rows == R) {
    product_panels<P, R>(b, begin, end, x, x_row, row);
  } else if constexpr (R > 1) {
    product_rows<P, R - 1>(rows, b, begin, end, x, x_row, row);
  }
}

// Sums of panels [from, to) of the group that begins at panel `group`, for `rows` rows of x.
template <Precision P>
void product_group(const gpt2f::PackedLinear& linear, int64_t group, int from, int to,
                   const uint32_t* x, int64_t x_row, int64_t rows, float* sums) {
  using S = Steps<P>;
  const int64_t steps = S::count(linear.inputs), left = linear.panels() - group;
  const int64_t panels = left < gpt2f::kGroupPanels ? left : gpt2f::kGroupPanels;
  const uint32_t* const words = linear.words + group * S::kPanelWords * steps;
  constexpr int kRows = S::kQuantized ? kDotRows : kTileRows;
  constexpr int kFew = S::kQuantized ? kFewRows : kTileRows;
  // A second tile of int4 costs more than many rows do.
  const bool few = rows > 1 && rows <= (P == kInt4 ? 1 : 2) * kFew;
  const int64_t most = few ? kFew : kRows, tiles = (rows + most - 1) / most;
  // One row has nothing to keep in cache for another.
  const int64_t block = S::kQuantized && rows == 1 ? steps : S::kBlock;
  for (int64_t s0 = 0; s0 < steps; s0 += block) {
    const int64_t count = steps - s0 < block ? steps - s0 : block;
    const Block b{words + s0 * panels * S::kPanelWords, panels, count, s0 == 0, few, sums};
    const uint32_t* next = b.w + b.words<P>();
    const int64_t asked = (b.words<P>() + tiles - 1) / tiles;
    for (int64_t row = 0, left = tiles; row < rows; --left) {
      const int take = static_cast<int>((rows - row + left - 1) / left);
      if (!few && tiles > 1) ask_for(next, asked);
      next += asked;
      product_rows<P, kFew>(take, b, from, to, x + row * x_row + s0 * S::kOperandWords, x_row, row);
      row += take;
    }
  }
}

template <int N, typename Sink>
void sink_panels(const float* sums, int64_t group, int panel, int64_t row, const Sink& sink) {
  F each[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) each[n] = fload(sums + (panel + n) * kLanes);
  sink(row, (group + panel) * kLanes, each);
}

// Panels [begin, end) of `linear`, for rows [first, first + rows). `sums` holds kRowBlock x 64
// floats. A column's rows reach the sink in order.
template <Precision P, typename Sink>
void product_range(const gpt2f::PackedLinear& linear, int64_t begin, int64_t end, const Operand& x,
                   int64_t first, int64_t rows, float* sums, const Sink& sink) {
  constexpr int64_t kGroup = gpt2f::kGroupPanels;
  for (int64_t p0 = begin; p0 < end;) {
    const int64_t group = p0 / kGroup * kGroup;
    const int from = static_cast<int>(p0 - group);
    const int to = static_cast<int>(end - group < kGroup ? end - group : kGroup);
    if (linear.bias != nullptr) ask_for(linear.bias + p0 * kLanes, (to - from) * kLanes);
    product_group<P>(linear, group, from, to, x.words + first * x.row, x.row, rows, sums);
    for (int64_t row = 0; row < rows; ++row) {
      int panel = from;
      for (; panel + kSideBySide <= to; panel += kSideBySide) {
        sink_panels<kSideBySide>(sums + row * kSumStride, group, panel, first + row, sink);
      }
      for (; panel < to; ++panel) {
        sink_panels<1>(sums + row * kSumStride, group, panel, first + row, sink);
      }
    }
    p0 = group + to;
  }
}

// Panels are handed out in whole groups when there are enough of them, else one by one.
inline int64_t panel_unit(int64_t panels, const Lane& lane) {
  return panels / gpt2f::kGroupPanels >= 4 * lane.size ? gpt2f::kGroupPanels : 1;
}

// Each lane goes through all weights with rows of its own where there are as many as this of them.
constexpr int64_t kOwnRows = 96;

// Parts of `rows`, of which half a second-level cache holds one while all weights go by.
inline int64_t parts_of(int64_t rows, int64_t row_words) {
  constexpr int64_t kTiles = 12, kBytes = int64_t{512} << 10;
  constexpr int64_t kMost = gpt2f::kRowBlock / kTiles * kTiles, kLeast = 11 * kTiles;
  const int64_t fit = kBytes / (row_words * 4);
  const int64_t most = fit > kMost ? kMost : fit < kLeast ? kLeast : fit;
  return (rows + most - 1) / most;
}

// The rows of such a part, in whole tiles.
inline int64_t rows_at_once(int64_t rows, int64_t row_words) {
  const int64_t blocks = parts_of(rows, row_words);
  return round_up((rows + blocks - 1) / blocks, 12);
}

// A product's rows may be cut before any of them.
struct CutAnywhere {
  int64_t operator()(int64_t row) const { return row; }
};

// cut(row) is the first row from `row` on that another lane may begin with.
template <Precision P, typename Sink, typename Cut = CutAnywhere>
void product(const gpt2f::PackedLinear& linear, const Operand& x, int64_t rows, float* scratch,
             int64_t scratch_stride, const Lane& lane, const Sink& sink, const Cut& cut = {}) {
  const int64_t panels = linear.panels();
  float* const sums = scratch + lane.rank * scratch_stride;
  const bool by_rows = lane.size > 1 && rows >= kOwnRows * lane.size;
  const int64_t block = by_rows ? rows : rows_at_once(rows, x.row);
  for (int64_t row = 0; row < rows; row += block) {
    if (row > 0) lane.sync();  // one sequence of pieces at a time
    const int64_t taken = rows - row < block ? rows - row : block;
    const int64_t parts =
        by_rows ? lane.size * parts_of((rows + lane.size - 1) / lane.size, x.row) : 1;
    const auto first = [&](int64_t part) {
      return part == parts ? row + taken : part == 0 ? row : cut(row + taken * part / parts);
    };
    gpt2f::take_shares(parts * panels, panel_unit(panels, lane), lane,
                       [&](int64_t begin, int64_t end) {
                         while (begin < end) {
                           const int64_t part = begin / panels, last = (part + 1) * panels;
                           const int64_t stop = end < last ? end : last;
                           product_range<P>(linear, begin % panels, stop - part * panels, x,
                                            first(part), first(part + 1) - first(part), sums, sink);
                           begin = stop;
                         }
                       });
  }
}

}  // namespace

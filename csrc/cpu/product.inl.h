// product: sink(row, column, 16 sums) for x W^T, x operand rows, W packed in panels of 16 outputs.
//
// Layout   core/kernels.h, PackedLinear: a lane reads its groups as one contiguous stream.
// Work     panels are split over the lanes, K never; a lane that is done helps the others; rows go
//          through registers kTileRows at a time.
// Traffic  each weight word once from memory per 256 rows, x from cache: 4 K N bytes (fp32) or
//          2 K N (bf16). At 33 GB/s GPT-2 small's 124 M weights take 15 ms or 7.5 ms.
// Numerics one fused multiply-add chain per 128 elements of K, in order; block sums added in order.
//          Lanes lie along outputs, so a sum has one order whatever the tile or the vector width.
#pragma once

namespace {

// acc[r][n] += x[r] . panel n over `steps` operand words.
template <Precision P, int R, int N>
[[gnu::always_inline]] inline void tile(const uint32_t* w, int64_t w_step, const uint32_t* x,
                                        int64_t x_row, int64_t steps, F (&acc)[R][N]) {
  for (int64_t s = 0; s < steps; ++s) {
    U panel[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) panel[n] = uload(w + s * w_step + n * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const U xs = uset(x[r * x_row + s]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = mac<P>(acc[r][n], panel[n], xs);
    }
  }
}

struct Block {  // one block of K of one group of panels
  const uint32_t* w;  // first word of the block
  int64_t w_step;
  int64_t steps;
  bool first, last;
  float* sums;  // [row][64] of this group
};

constexpr int64_t kSumStride = kLanes * gpt2f::kGroupPanels;

template <Precision P, int R, int N, typename Sink>
[[gnu::noinline]] void product_tile(const Block& b, int panel, const uint32_t* x, int64_t x_row,
                                    int64_t row, int64_t column, int64_t sum_row,
                                    const Sink& sink) {
  F acc[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) acc[r][n] = fset(0.0f);
  }
  tile<P, R, N>(b.w + panel * kLanes, b.w_step, x, x_row, b.steps, acc);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      float* sum = b.sums + (sum_row + r) * kSumStride + (panel + n) * kLanes;
      F total = acc[r][n];
      if (!b.first) total = fadd(fload(sum), total);
      if (b.last) {
        sink(row + r, column + (panel + n) * kLanes, total);
      } else {
        fstore(sum, total);
      }
    }
  }
}

template <Precision P, int R, typename Sink>
void product_panels(const Block& b, int begin, int end, const uint32_t* x, int64_t x_row,
                    int64_t row, int64_t column, int64_t sum_row, const Sink& sink) {
  constexpr int kPanels = R == 1 ? kTilePanelsOne : kTilePanels;
  int panel = begin;
  for (; panel + kPanels <= end; panel += kPanels) {
    product_tile<P, R, kPanels>(b, panel, x, x_row, row, column, sum_row, sink);
  }
  for (; panel < end; ++panel) {
    product_tile<P, R, 1>(b, panel, x, x_row, row, column, sum_row, sink);
  }
}

template <Precision P, int R, typename Sink>
void product_rows(int rows, const Block& b, int begin, int end, const uint32_t* x, int64_t x_row,
                  int64_t row, int64_t column, int64_t sum_row, const Sink& sink) {
  if (rows == R) {
    product_panels<P, R>(b, begin, end, x, x_row, row, column, sum_row, sink);
  } else if constexpr (R > 1) {
    product_rows<P, R - 1>(rows, b, begin, end, x, x_row, row, column, sum_row, sink);
  }
}

// Panels [begin, end) of `linear`, for all rows. `sums` holds kRowBlock x 64 floats.
template <Precision P, typename Sink>
void product_range(const gpt2f::PackedLinear& linear, int64_t begin, int64_t end, const void* x,
                   int64_t stride, int64_t rows, float* sums, const Sink& sink) {
  constexpr int64_t kGroup = gpt2f::kGroupPanels;
  const int64_t x_row = stride / gpt2f::word_elements(P);
  const int64_t steps = linear.words_per_output(P);
  const int64_t block = gpt2f::kBlockElements / gpt2f::word_elements(P);
  const uint32_t* const operand = static_cast<const uint32_t*>(x);
  for (int64_t row0 = 0; row0 < rows; row0 += gpt2f::kRowBlock) {
    const int64_t row_end = row0 + gpt2f::kRowBlock < rows ? row0 + gpt2f::kRowBlock : rows;
    for (int64_t p0 = begin; p0 < end;) {
      const int64_t group = p0 / kGroup * kGroup;
      const int64_t left = linear.panels() - group;
      const int64_t width = left < kGroup ? left : kGroup;
      const int from = static_cast<int>(p0 - group);
      const int to = static_cast<int>(end - group < width ? end - group : width);
      const uint32_t* const words = linear.words + group * kLanes * steps;
      for (int64_t s0 = 0; s0 < steps; s0 += block) {
        const int64_t count = steps - s0 < block ? steps - s0 : block;
        const Block b{
            words + s0 * width * kLanes, width * kLanes, count, s0 == 0, s0 + count == steps, sums};
        int64_t tiles = (row_end - row0 + kTileRows - 1) / kTileRows;
        for (int64_t row = row0; row < row_end; --tiles) {
          const int take = static_cast<int>((row_end - row + tiles - 1) / tiles);
          product_rows<P, kTileRows>(take, b, from, to, operand + row * x_row + s0, x_row, row,
                                     group * kLanes, row - row0, sink);
          row += take;
        }
      }
      p0 = group + to;
    }
  }
}

// Panels are handed out in whole groups when there are enough of them, else one by one.
inline int64_t panel_unit(int64_t panels, const Lane& lane) {
  return panels / gpt2f::kGroupPanels >= 4 * lane.size ? gpt2f::kGroupPanels : 1;
}

template <Precision P, typename Sink>
void product(const gpt2f::PackedLinear& linear, const void* x, int64_t stride, int64_t rows,
             float* scratch, int64_t scratch_stride, const Lane& lane, const Sink& sink) {
  const int64_t panels = linear.panels();
  float* const sums = scratch + lane.rank * scratch_stride;
  gpt2f::take_shares(panels, panel_unit(panels, lane), lane, [&](int64_t begin, int64_t end) {
    product_range<P>(linear, begin, end, x, stride, rows, sums, sink);
  });
}

}  // namespace

// What gemm.cuh keeps in shared memory: tiles, places of units, and how weights get there.
//
// Rows    of 8 units of 16 bytes, 64 elements; odd rows have their halves exchanged, so that eight
//         lanes that write one row, and eight that read four units of two rows, meet every bank
//         once (a quarter of a warp is what shared memory serves at a time).
// Weights packed ones in their order (layout.h): a warp's words are 512 consecutive bytes.
//         Row-major ones are rows like any other: the packed order is theirs, tile by tile.
// Sums    floats, rows of 4 more than a multiple of 32: lanes that hold 8 outputs of 4 pairs of
//         rows meet every bank once.
#pragma once

#include "cuda/device.cuh"
#include "cuda/fragments.cuh"
#include "cuda/layout.h"

namespace gpt2f::cuda {

constexpr int kGemmStages = 3;
constexpr int kRowUnits = kStepInputs / 8;  // 16-byte units of one row in one stage
constexpr int kWarpTiles = 2;               // tiles of outputs of one warp

// Where unit `unit` of row `row` stands in a stage.
GPT2F_BOTH int row_unit(int row, int unit) { return row * kRowUnits + (unit ^ row % 2 * 4); }
// What a lane reads of rows 0 ... 7: its words of block 0 or 1 of the stage. For rows 8 n ... it is
// 8 n kRowUnits more.
GPT2F_BOTH int lane_unit(int lane, int block) { return row_unit(lane / 4, 4 * block + lane % 4); }
// What a thread writes in its turn `turn` of copying rows.
GPT2F_BOTH int copied_row(int thread, int threads, int turn) {
  return thread / kRowUnits + turn * (threads / kRowUnits);
}
GPT2F_BOTH int copied_unit(int thread) { return thread % kRowUnits; }

template <int kOutputWarps, int kTokenTiles>
struct GemmTile {
  static constexpr int kThreads = 64 * kOutputWarps;  // two warps along the rows
  static constexpr int kWarps = 2 * kOutputWarps;
  static constexpr int kBlocks = kOutputWarps == 2 ? 3 : 1;  // of one SM
  static constexpr int kTiles = kWarpTiles * kOutputWarps;
  static constexpr int kOutputs = kTileOutputs * kTiles;
  static constexpr int kWarpTokenTiles = kTokenTiles;
  static constexpr int kTokens = 2 * kTileTokens * kTokenTiles;
  static constexpr int kPitch = kOutputs + 4;  // floats between rows of sums
  static constexpr int kSumBytes = kTokens * kPitch * 4;

  // Where element i of a lane's sums (fragments.cuh) of tile `tile` and token tile `tokens` stands.
  GPT2F_BOTH static int sum_at(int lane, int tile, int tokens, int i) {
    return (kTileTokens * tokens + lane % 4 * 2 + i % 2) * kPitch + kTileOutputs * tile + lane / 4 +
           i / 2 * 8;
  }
};
using SmallTile = GemmTile<2, 4>;
using LargeTile = GemmTile<4, 8>;

// One stage of `kRows` rows; what is not there is zero. `from` is the first row.
template <int kRows, int kThreads>
DEVICE void copy_rows(uint4* to, const uint16_t* from, int64_t stride, int64_t rows, int64_t inputs,
                      int step) {
  const int thread = static_cast<int>(threadIdx.x), unit = copied_unit(thread);
  const int first = copied_row(thread, kThreads, 0);
  const int64_t k = int64_t{step} * kStepInputs + 8 * unit;
  const uint16_t* at = from + first * stride + k;
#pragma unroll
  for (int turn = 0; turn < kRows * kRowUnits / kThreads; ++turn) {
    const int row = copied_row(thread, kThreads, turn);
    cp_async16(to + row_unit(row, unit), at, row < rows && k < inputs);
    at += kThreads / kRowUnits * stride;
  }
}

// Weights as the engine packs them. Tiles behind the last are the last again.
template <Precision W>
struct PackedWeights {
  static constexpr Precision kPrecision = W;
  static constexpr bool kWritten = false;  // no kernel of the stream writes them
  static constexpr int kTileUnits = 32 * kStepLoads<W>;
  Matrix matrix;

  DEVICE int tile(int wanted) const { return wanted < matrix.tiles ? wanted : matrix.tiles - 1; }
  template <typename Tile>
  DEVICE void copy(uint4* to, int first, int step) const {
#pragma unroll
    for (int i = 0; i < Tile::kTiles * kTileUnits; i += Tile::kThreads) {
      const int unit = i + static_cast<int>(threadIdx.x);
      const uint8_t* const from =
          matrix.weights + tile(first + unit / kTileUnits) * matrix.tile_bytes;
      cp_async16(to + unit, from + (int64_t{step} * kTileUnits + unit % kTileUnits) * 16, true);
    }
  }
  DEVICE void load(Step<W>& step, const uint4* stage, int tile_in_block) const {
#pragma unroll
    for (int i = 0; i < kStepLoads<W>; ++i) {
      step.words[i] = load16(stage + tile_in_block * kTileUnits + 32 * i + lane_id());
    }
  }
  // The scales of four groups, spread over the warp like a word of SliceScales.
  DEVICE uint32_t scales(int wanted, int four) const {
    if (4 * four + lane_id() / 8 >= matrix.groups) return 0;
    const int64_t group = int64_t{tile(wanted)} * matrix.groups + 4 * four;
    return reinterpret_cast<const uint32_t*>(matrix.scales)[group * 8 + lane_id()];
  }
};

// Weights (N, K) of a tensor, 16-bit.
template <Precision W>
struct RowMajorWeights {
  static constexpr Precision kPrecision = W;
  static constexpr bool kWritten = true;
  static constexpr int kTileUnits = kTileOutputs * kRowUnits;
  const uint16_t* weights;
  int64_t stride;
  int64_t outputs;
  int64_t inputs;

  template <typename Tile>
  DEVICE void copy(uint4* to, int first, int step) const {
    const int64_t row = int64_t{first} * kTileOutputs;
    copy_rows<Tile::kOutputs, Tile::kThreads>(to, weights + row * stride, stride, outputs - row,
                                              inputs, step);
  }
  DEVICE void load(Step<W>& step, const uint4* stage, int tile_in_block) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = kTileOutputs * tile_in_block + i % 2 * 8;
      step.words[i] = load16(stage + row * kRowUnits + lane_unit(lane_id(), i / 2));
    }
  }
  DEVICE uint32_t scales(int, int) const { return 0; }
};

}  // namespace gpt2f::cuda

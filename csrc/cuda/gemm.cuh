// gemm: x W^T for many rows (prompts), each sum handed to an epilogue. product.cuh does the same
// for few rows, and both give a value the same bits.
//
// Work      A block computes 64 outputs of 64 rows with 4 warps, or 128 of 128 with 8; a warp two
//           tiles of 16 outputs (the instruction's A: weights) times 4 or 8 tiles of 8 rows (its
//           B). Blocks of the same outputs follow each other and find the weights in L2.
// Stages    64 inputs at a time by cp.async, two stages ahead of the sums. The weights of the first
//           two are asked for before the kernel waits for the previous one. One barrier a stage:
//           behind it every warp has left the buffer that is filled next.
// Results   pass through shared memory (gemm_tiles.cuh) so that a warp hands 32 outputs of one row
//           to the epilogue at a time: segments of 64 bytes, or 128 of floats.
// Traffic   2 M N K flops; a block reads 2 K (M + N) bytes, from L2 all but once: 32 flops a byte
//           for 64 x 64, 64 for 128 x 128. At 5.5 TB/s of L2 (H100) that allows 176 and 352
//           TFLOP/s, below what mma.sync reaches there (about 600): L2 is the limit, then the loads
//           from shared memory, 8 or 12 of 4 cycles for 16 or 32 instructions of 2. 1.5B with 1023
//           rows is 3.0 TFLOP.
// Occupancy small tiles: at most 168 registers, 3 blocks of an SM, 2 where it has 100 KB of shared
//           memory; large ones: up to 255, 1 block. 16-bit weights: 7 or 4.4 instructions of the
//           main loop for each mma, small or large.
// Numerics  fragments.cuh and layout.h: slices of 256 inputs from zero, their sums added in order.
// Limits    any K, N, rows >= 1: what lies behind them is never read nor written. Operands and
//           row-major weights are 16-byte aligned with strides of whole units.
// Source    multistage pipeline: NVIDIA CUTLASS 2 documentation, "Efficient GEMM in CUDA".
#pragma once

#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/epilogue.cuh"
#include "cuda/fragments.cuh"
#include "cuda/gemm_tiles.cuh"
#include "cuda/launch.h"
#include "cuda/layout.h"

namespace gpt2f::cuda {

struct GemmRows {
  const uint16_t* operand;
  int64_t stride;
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  int32_t token_blocks;
  int32_t steps;
  // Selector that leaves a word as it is, which the compiler must not know: it would copy a weight
  // to its place in mma's four registers again for each instruction, not once.
  uint32_t as_is;
};

// The sums of one warp: of the slice under way, and of the slices before it.
template <Precision W, int NT>
struct WarpSums {
  float slice[kWarpTiles][NT][4];
  float total[kWarpTiles][NT][4];

  DEVICE WarpSums() {
#pragma unroll
    for (int i = 0; i < kWarpTiles * NT * 4; ++i) {
      slice[i / (NT * 4)][i / 4 % NT][i % 4] = 0.0f;
      total[i / (NT * 4)][i / 4 % NT][i % 4] = -0.0f;  // -0 + x is x, also where x is a zero
    }
  }
  DEVICE void end_slice() {
#pragma unroll
    for (int i = 0; i < kWarpTiles * NT * 4; ++i) {
      total[i / (NT * 4)][i / 4 % NT][i % 4] += slice[i / (NT * 4)][i / 4 % NT][i % 4];
      slice[i / (NT * 4)][i / 4 % NT][i % 4] = 0.0f;
    }
  }
  // One stage of 16-bit weights. Its rows are read once, for both tiles.
  DEVICE void multiply(const Step<W> (&steps)[kWarpTiles], const uint4* rows, uint32_t as_is) {
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      uint32_t a[kWarpTiles][2][4];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        decode<W>(a[m], steps[m], block);
#pragma unroll
        for (int i = 0; i < 8; ++i) a[m][i / 4][i % 4] = permute(a[m][i / 4][i % 4], 0, as_is);
      }
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 x = load16(rows + kTileTokens * kRowUnits * n + lane_unit(lane_id(), block));
#pragma unroll
        for (int m = 0; m < kWarpTiles; ++m) multiply_block<W>(slice[m][n], a[m], x);
      }
    }
  }
  // One stage of int8 or int4, tile m, whose words for this lane begin at `words`. `four` holds the
  // scales of four groups; the stage's first is number `group`. No loop over tiles or blocks that
  // the compiler could spread out: it would keep rows in registers that are not there.
  DEVICE void multiply_scaled(int m, const uint4* words, const uint4* rows, uint32_t four,
                              int group) {
    constexpr int kGroupBlocks = kGroupInputs<W> / kBlockInputs;
    float sum[NT][4] = {};  // of one group
#pragma unroll 1
    for (int block = 0; block < 2; ++block) {
      Step<W> step;
      step.words[0] = load16(words + (W == Precision::kInt8 ? 32 * block : 0));
      uint32_t a[2][4];
      decode<W>(a, step, W == Precision::kInt8 ? 0 : block);
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const uint4 x = load16(rows + kTileTokens * kRowUnits * n + lane_unit(lane_id(), block));
        multiply_block<W>(sum[n], a, x);
      }
      if ((block + 1) % kGroupBlocks == 0) {
        SliceScales<W> scales;
        for (uint32_t& word : scales.words) word = four;
        const float2 scale = scales_of<W>(scales, group + block / kGroupBlocks);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          add_group(slice[m][n], sum[n], scale);
          sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
        }
      }
    }
  }
};

// Sums, by way of shared memory, to the epilogue.
template <typename Tile, typename Epilogue>
DEVICE void finish(const float* sums, int64_t first_row, int64_t first_output, const GemmRows& x,
                   const Epilogue& epilogue) {
  constexpr int kBatch = 4;  // rows whose other inputs are asked for together
#pragma unroll 1
  for (int column = lane_id(); column < Tile::kOutputs; column += 32) {
    const int64_t output = first_output + column;
    if (output >= x.outputs) return;
#pragma unroll 1
    for (int row = warp_id(); row < Tile::kTokens; row += kBatch * Tile::kWarps) {
      typename Epilogue::Inputs inputs[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t r = first_row + row + i * Tile::kWarps;
        if (r < x.rows) inputs[i] = epilogue.load(r, output);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = row + i * Tile::kWarps;
        if (first_row + at < x.rows) {
          epilogue.store(first_row + at, output, sums[at * Tile::kPitch + column], inputs[i]);
        }
      }
    }
  }
}

template <typename Tile, typename Weights, typename Epilogue>
KERNEL LAUNCH_BOUNDS(Tile::kThreads, Tile::kBlocks)
    gemm_kernel(Weights weights, GemmRows x, Epilogue epilogue) {
  constexpr Precision W = Weights::kPrecision;
  constexpr int kWeightUnits = Tile::kTiles * Weights::kTileUnits;
  constexpr int kStageUnits = kWeightUnits + Tile::kTokens * kRowUnits;
  constexpr int kAhead = kGemmStages - 1;
  constexpr int kScaleSteps = W == Precision::kInt4 ? 2 : 4;  // stages of four groups
  DYNAMIC_SHARED(uint4, shared);
  const int token_block = static_cast<int>(blockIdx.x) % x.token_blocks;
  const int output_block = static_cast<int>(blockIdx.x) / x.token_blocks;
  const int first_tile = output_block * Tile::kTiles;
  const int64_t first_row = int64_t{token_block} * Tile::kTokens;
  const uint16_t* const operand = x.operand + first_row * x.stride;
  const auto copy_weights = [&](int step) {
    weights.template copy<Tile>(shared + step % kGemmStages * kStageUnits, first_tile, step);
  };
  const auto copy_tokens = [&](int step) {
    copy_rows<Tile::kTokens, Tile::kThreads>(
        shared + step % kGemmStages * kStageUnits + kWeightUnits, operand, x.stride,
        x.rows - first_row, x.inputs, step);
  };

  const int tile = warp_id() / 2 * kWarpTiles;
  const int token_tile = warp_id() % 2 * Tile::kWarpTokenTiles;
  uint32_t scales[kWarpTiles] = {}, next[kWarpTiles];
  if constexpr (Weights::kWritten) wait_for_previous();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < x.steps) copy_weights(i);
  }
#pragma unroll
  for (int m = 0; m < kWarpTiles; ++m) next[m] = weights.scales(first_tile + tile + m, 0);
  if constexpr (!Weights::kWritten) wait_for_previous();
  allow_next();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (i < x.steps) copy_tokens(i);
    cp_async_commit();
  }

  WarpSums<W, Tile::kWarpTokenTiles> sums;
#pragma unroll 1
  for (int step = 0; step < x.steps; ++step) {
    cp_async_wait<kAhead - 1>();
    sync_block();
    if (step + kAhead < x.steps) {
      copy_weights(step + kAhead);
      copy_tokens(step + kAhead);
    }
    cp_async_commit();
    if (quantized(W) && step % kScaleSteps == 0) {
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        scales[m] = next[m];
        next[m] = weights.scales(first_tile + tile + m, step / kScaleSteps + 1);
      }
    }
    const uint4* const stage = shared + step % kGemmStages * kStageUnits;
    const uint4* const rows = stage + kWeightUnits + kTileTokens * kRowUnits * token_tile;
    if constexpr (quantized(W)) {
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) {
        const uint4* const words = stage + (tile + m) * Weights::kTileUnits + lane_id();
        sums.multiply_scaled(m, words, rows, scales[m], step % kScaleSteps * (4 / kScaleSteps));
      }
    } else {
      Step<W> words[kWarpTiles];
#pragma unroll
      for (int m = 0; m < kWarpTiles; ++m) weights.load(words[m], stage, tile + m);
      sums.multiply(words, rows, x.as_is);
    }
    if (step % kSliceSteps == kSliceSteps - 1 || step == x.steps - 1) sums.end_slice();
  }

  sync_block();
  float* const staged = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int i = 0; i < kWarpTiles * Tile::kWarpTokenTiles * 4; ++i) {
    const int m = i / (Tile::kWarpTokenTiles * 4), n = i / 4 % Tile::kWarpTokenTiles;
    staged[Tile::sum_at(lane_id(), tile + m, token_tile + n, i % 4)] = sums.total[m][n][i % 4];
  }
  sync_block();
  finish<Tile>(staged, first_row, int64_t{first_tile} * kTileOutputs, x, epilogue);
}

// ---- Host --------------------------------------------------------------------------------------

template <typename Tile, typename Weights>
constexpr int gemm_shared_bytes() {
  constexpr int kUnits = Tile::kTiles * Weights::kTileUnits + Tile::kTokens * kRowUnits;
  constexpr int kStaged = kGemmStages * kUnits * 16;
  return kStaged > Tile::kSumBytes ? kStaged : Tile::kSumBytes;
}

inline GemmRows gemm_rows(const void* operand, int64_t stride, int64_t rows, int64_t inputs,
                          int64_t outputs) {
  const int64_t steps = padded_inputs(inputs) / kStepInputs;
  return {static_cast<const uint16_t*>(operand), stride, rows, inputs, outputs, 0,
          static_cast<int32_t>(steps),           0x3210};
}

template <typename Tile, typename Weights, typename Epilogue>
void launch_gemm(const char* name, const Weights& weights, GemmRows x, const Epilogue& epilogue,
                 void* stream) {
  x.token_blocks = static_cast<int32_t>((x.rows + Tile::kTokens - 1) / Tile::kTokens);
  const int64_t output_blocks = (x.outputs + Tile::kOutputs - 1) / Tile::kOutputs;
  launch(name, gemm_kernel<Tile, Weights, Epilogue>, Grid{x.token_blocks * output_blocks},
         Tile::kThreads, gemm_shared_bytes<Tile, Weights>(), stream, weights, x, epilogue);
}

// Large tiles, where the device can hold one and there is one for each of its processors.
template <typename Weights, typename Epilogue>
void gemm_on(const char* name, const Weights& weights, const GemmRows& x, const Epilogue& epilogue,
             void* stream) {
  int device = 0, processors = 0, shared = 0;
  check_cuda(cudaGetDevice(&device), name);
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), name);
  check_cuda(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             name);
  const int64_t blocks = ((x.rows + LargeTile::kTokens - 1) / LargeTile::kTokens) *
                         ((x.outputs + LargeTile::kOutputs - 1) / LargeTile::kOutputs);
  if (blocks >= processors && gemm_shared_bytes<LargeTile, Weights>() <= shared) {
    launch_gemm<LargeTile>(name, weights, x, epilogue, stream);
  } else {
    launch_gemm<SmallTile>(name, weights, x, epilogue, stream);
  }
}

// epilogue(x W^T) for rows of an operand.
template <Precision W, typename Epilogue>
void gemm(const char* name, const PackedLinear& linear, const void* operand, int64_t stride,
          int64_t rows, const Epilogue& epilogue, void* stream) {
  gemm_on(name, PackedWeights<W>{matrix_of(W, linear)},
          gemm_rows(operand, stride, rows, padded_inputs(linear.inputs), linear.outputs), epilogue,
          stream);
}

}  // namespace gpt2f::cuda

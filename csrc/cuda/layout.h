// Orders of memory on CUDA, for the kernels, the host code that packs and the tests.
//
// Matrix. mma.sync.m16n8k16 takes weights as its A operand. Lane 4 g + t holds rows g and g + 8 of
// a tile of 16 outputs. Which k stand behind the instruction's own k is free, as long as A and B
// agree: within a block of 32, lane t holds k = 8 t ... 8 t + 7 of its rows for two instructions,
// so that one 16-byte load of a row-major activation row, or one of a row-major weight row, is what
// the lane needs. Element e = k % 8 of the block goes to instruction e / 4: e % 4 in {0, 1} is the
// register pair's lower k half (a0, a1, b0), {2, 3} its upper one (a2, a3, b1).
//
//   bf16, fp16  16-bit elements [tile][k / 32][half h][g][t][8]; output n = 16 tile + 8 h + g
//   int8        bytes (q + 128) [tile][k / 32][g][t][16]; byte 4 (e / 2) + 2 h + e % 2
//   int4        words [tile][k / 64][g][t][4]; word e / 2 holds eight nibbles (q + 8), at bits
//               4 (2 (k / 32 % 2) + h) + 16 (e % 2)
// int8 and int4 are followed by their scales, bfloat16 [tile][group][16]. K is padded to a multiple
// of 64 and outputs to one of 16: with zeros (16-bit), or q = 0 and scale 0.
//
// Sums. K is cut into slices of kSlice elements. Within a slice an accumulator starts at zero and
// takes the instructions in order of k (int8, int4: the sum of each group, times its scale, is
// added by one fused multiply-add). Slice sums are added in order, beginning with the first. All
// kernels do this and nothing else, so a value has one order of summation whatever the batch.
//
// Cache page (CacheLayout with units of 32): K 16-bit [16 positions][Dp]; V words
// [8 pairs of positions][Dp], the even position in the low half. Dp = round_up(D, 32); zeros behind
// D. Query rows: 16-bit (R, H, Dp). Operand rows: 16-bit, stride a multiple of kStrideUnit.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "engine/quantize.h"

#if defined(__CUDACC__)
#define GPT2F_BOTH __host__ __device__ __forceinline__
#else
#define GPT2F_BOTH inline
#endif

namespace gpt2f::cuda {

constexpr int kTileOutputs = 16;  // m of the instruction
constexpr int kTileTokens = 8;  // n of the instruction
constexpr int64_t kStrideUnit = 64;
constexpr int64_t kSlice = 256;  // elements of K of one slice
constexpr int64_t kHeadUnit = 32;  // head sizes are padded to a multiple of this
constexpr int64_t kMaxHeadSize = kMaxDeviceHeadSize;
constexpr int64_t kCudaMaxRows = 1024;  // new tokens of one step
constexpr int kChunkKeys = 64;  // keys of one partial softmax
constexpr int64_t kDecodeRows = 64;  // rows of a step that attention_decode takes
constexpr int64_t kDecodeQueries = 16;  // rows of one of its sequences
constexpr int64_t kPartOutputs = 128;  // logits of one HeadPart
constexpr int64_t kTickets = 16384;  // int32 counters at the start of the scratch, zero at rest

GPT2F_BOTH int64_t padded_inputs(int64_t inputs) { return (inputs + 63) / 64 * 64; }
GPT2F_BOTH int64_t tiles(int64_t outputs) { return (outputs + 15) / 16; }
GPT2F_BOTH int64_t slices(int64_t inputs) { return (padded_inputs(inputs) + kSlice - 1) / kSlice; }
GPT2F_BOTH constexpr bool quantized(Precision p) {
  return p == Precision::kInt8 || p == Precision::kInt4;
}

// Bytes of the weights of one tile, scales apart.
GPT2F_BOTH int64_t tile_bytes(Precision p, int64_t inputs) {
  const int64_t bits = p == Precision::kInt4 ? 4 : p == Precision::kInt8 ? 8 : 16;
  return padded_inputs(inputs) * kTileOutputs * bits / 8;
}
GPT2F_BOTH int64_t groups(Precision p, int64_t inputs) {
  return quantized(p) ? padded_inputs(inputs) / group_size(p) : 0;
}
GPT2F_BOTH int64_t packed_bytes(Precision p, int64_t inputs, int64_t outputs) {
  return tiles(outputs) * (tile_bytes(p, inputs) + groups(p, inputs) * kTileOutputs * 2);
}

// 16-bit: index of element (output n, input k).
GPT2F_BOTH int64_t element_of(int64_t inputs, int64_t n, int64_t k) {
  const int64_t block = n / 16 * (padded_inputs(inputs) / 32) + k / 32;
  return ((block * 2 + n / 8 % 2) * 8 + n % 8) * 32 + k % 32;
}
// int8: index of the byte.
GPT2F_BOTH int64_t byte_of(int64_t inputs, int64_t n, int64_t k) {
  const int64_t block = n / 16 * (padded_inputs(inputs) / 32) + k / 32;
  const int64_t lane = n % 8 * 4 + k % 32 / 8, e = k % 8;
  return (block * 32 + lane) * 16 + e / 2 * 4 + n / 8 % 2 * 2 + e % 2;
}
struct Nibble {
  int64_t word;
  int shift;
};
GPT2F_BOTH Nibble nibble_of(int64_t inputs, int64_t n, int64_t k) {
  const int64_t block = n / 16 * (padded_inputs(inputs) / 64) + k / 64;
  const int64_t lane = n % 8 * 4 + k % 32 / 8, e = k % 8;
  const int64_t pair = k / 32 % 2 * 2 + n / 8 % 2;
  return {(block * 32 + lane) * 4 + e / 2, static_cast<int>(4 * pair + 16 * (e % 2))};
}
// Index of a scale behind the weights.
GPT2F_BOTH int64_t scale_of(Precision p, int64_t inputs, int64_t n, int64_t k) {
  return (n / 16 * groups(p, inputs) + k / group_size(p)) * 16 + n % 16;
}

// Scratch of the stages, in bytes: tickets, then what one stage at a time uses: partial attention
// [row][head][chunk][max, sum, Dp values] in float.
GPT2F_BOTH int64_t partial_floats(int64_t head_size) {
  return (head_size + kHeadUnit - 1) / kHeadUnit * kHeadUnit + 2;
}
GPT2F_BOTH int64_t chunks(int64_t keys) { return (keys + kChunkKeys - 1) / kChunkKeys; }
GPT2F_BOTH int64_t scratch_bytes(int64_t heads, int64_t head_size, int64_t context) {
  return kTickets * 4 + kDecodeRows * heads * chunks(context) * partial_floats(head_size) * 4;
}

}  // namespace gpt2f::cuda

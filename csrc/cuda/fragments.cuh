// How a warp multiplies packed weights (cuda/layout.h): from memory to the A operand of mma, and
// the one order in which products are summed.
//
// A step is 64 k of one tile of 16 outputs: kStepLoads 16-byte words per lane, four instructions.
// A slice is up to four steps and has accumulators of its own. Everything here is called by all 32
// lanes of a warp together.
//
//   Step<W> step;                            // 64, 32 or 16 bytes of weights per lane
//   load_step<W>(step, step_address<W>(matrix, tile, 4 * slice + index));
//   SliceScales<W> scales = load_scales<W>(matrix, tile, slice);      // empty for 16-bit weights
//   float acc[NT][4] = {};                   // one slice, NT tiles of 8 tokens
//   for index = 0 ... slice_steps - 1:
//     multiply_step<W, NT>(acc, step, scales, index, [&](int tokens, int block) { return B words;
//     });
//   total = first slice's acc + second's + ...
//
// B words: of token 8 tokens + g, the 16 bytes at k = 64 step + 32 block + 8 t of its operand row
// (lane = 4 g + t), in global or shared memory; zeros for a token that does not exist.
// acc[n] = C[g][2t, 2t+1], C[g+8][2t, 2t+1]: outputs g and g + 8 of the tile, tokens 8 n + 2t, + 1.
//
// Numerics bf16 and fp16 weights as they are. int8 and int4 become fp16 integers, exactly; each
// group is summed from zero and added by fma(scale, sum, acc).
// Cost     instructions of a lane per 16 bytes it loads, one tile of tokens: 16-bit 1 mma; int8
//          16 to decode, 2 mma, 4 for scales, 2 fma; int4 36 to decode, 4 mma, 8 for scales, 8 fma.
// Source   the magic numbers are those of Kim et al. 2022, "Who Says Elephants Can't Run", sec. 4:
//          0x6400 | u is 1024 + u in fp16; here also 0x5400 | 16 u = 64 + u.
#pragma once

#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/layout.h"

namespace gpt2f::cuda {

constexpr int kBlockInputs = 32;  // k of one 16-byte word of an operand row
constexpr int kStepInputs = 64;
constexpr int kSliceSteps = static_cast<int>(kSlice) / kStepInputs;

// Weights of precision W: W is one of kBf16, kFp16, kInt8, kInt4.
template <Precision W>
inline constexpr int kStepLoads = W == Precision::kInt4   ? 1
                                  : W == Precision::kInt8 ? 2
                                                          : 4;

// Inputs that share a scale, or 0.
template <Precision W>
inline constexpr int kGroupInputs = quantized(W) ? static_cast<int>(group_size(W)) : 0;

template <Precision W>
struct OperandOf {
  using Type = Fp16;
};
template <>
struct OperandOf<Precision::kBf16> {
  using Type = Bf16;
};
// What the other side of the product is made of.
template <Precision W>
using Operand = typename OperandOf<W>::Type;

// A packed matrix as kernels take it. Built on the host.
struct Matrix {
  const uint8_t* weights;
  const uint8_t* scales;
  int64_t tile_bytes;
  int32_t outputs;
  int32_t tiles;
  int32_t steps;  // of one tile
  int32_t groups;  // of one tile
  int32_t slices;

  // Steps of slice i.
  GPT2F_BOTH int slice_steps(int i) const {
    const int left = steps - i * kSliceSteps;
    return left < kSliceSteps ? left : kSliceSteps;
  }
};

inline Matrix matrix_of(Precision p, const PackedLinear& linear) {
  const uint8_t* const words = reinterpret_cast<const uint8_t*>(linear.words);
  const int64_t count = tiles(linear.outputs), bytes = tile_bytes(p, linear.inputs);
  return {words,
          words + count * bytes,
          bytes,
          static_cast<int32_t>(linear.outputs),
          static_cast<int32_t>(count),
          static_cast<int32_t>(padded_inputs(linear.inputs) / kStepInputs),
          static_cast<int32_t>(groups(p, linear.inputs)),
          static_cast<int32_t>(slices(linear.inputs))};
}

template <Precision W>
struct Step {
  uint4 words[kStepLoads<W>];
};

// Where the calling lane's words of a step begin; they are 512 bytes apart.
template <Precision W>
DEVICE const uint8_t* step_address(const Matrix& m, int tile, int step) {
  return m.weights + tile * m.tile_bytes + (step * kStepLoads<W> * 32 + lane_id()) * 16;
}

template <Precision W>
DEVICE void load_step(Step<W>& step, const uint8_t* address) {
#pragma unroll
  for (int i = 0; i < kStepLoads<W>; ++i) step.words[i] = load_stream16(address + 512 * i);
}

// The A operands of the two instructions of block 0 or 1 (32 k) of a step.
template <Precision W>
DEVICE void decode(uint32_t (&a)[2][4], const Step<W>& step, int block) {
  if constexpr (W == Precision::kInt4) {
    const uint4& v = step.words[0];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t word = block == 0 ? words[j] : words[j] >> 8;
      const uint32_t low = logic_or_and(word, 0x000F000Fu, 0x64006400u);
      const uint32_t high = logic_or_and(word, 0x00F000F0u, 0x54005400u);
      a[j / 2][j % 2 * 2] = half2_add(low, 0xE408E408u);  // - (1024 + 8)
      a[j / 2][j % 2 * 2 + 1] = half2_add(high, 0xD480D480u);  // - (64 + 8)
    }
  } else if constexpr (W == Precision::kInt8) {
    const uint4& v = step.words[block];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = permute(words[j], 0x64646464u, 0x4140u);
      const uint32_t high = permute(words[j], 0x64646464u, 0x4342u);
      a[j / 2][j % 2 * 2] = half2_add(low, 0xE480E480u);  // - (1024 + 128)
      a[j / 2][j % 2 * 2 + 1] = half2_add(high, 0xE480E480u);
    }
  } else {
    const uint4& low = step.words[2 * block];
    const uint4& high = step.words[2 * block + 1];
    a[0][0] = low.x, a[0][1] = high.x, a[0][2] = low.y, a[0][3] = high.y;
    a[1][0] = low.z, a[1][1] = high.z, a[1][2] = low.w, a[1][3] = high.w;
  }
}

// The scales of one tile and slice, spread over the warp: word i of lane l holds those of outputs
// 2 (l % 8) and 2 (l % 8) + 1 for group 4 i + l / 8 of the slice.
template <Precision W>
struct SliceScales {
  uint32_t words[W == Precision::kInt4 ? 2 : 1];
};

template <Precision W>
DEVICE SliceScales<W> load_scales(const Matrix& m, int tile, int slice) {
  SliceScales<W> out{};
  if constexpr (quantized(W)) {
    constexpr int kGroups = static_cast<int>(kSlice) / kGroupInputs<W>;
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(m.scales) +
                                 (int64_t{tile} * m.groups + slice * kGroups) * 8 + lane_id();
#pragma unroll
    for (int i = 0; i < kGroups / 4; ++i) {
      if (slice * kGroups + 4 * i + lane_id() / 8 < m.groups) out.words[i] = from[32 * i];
    }
  }
  return out;
}

DEVICE float bits_to_float(uint32_t bits) {
  float out;
  __builtin_memcpy(&out, &bits, sizeof out);
  return out;
}

// Scales of outputs g (x) and g + 8 (y) for one group of the slice.
template <Precision W>
DEVICE float2 scales_of(const SliceScales<W>& scales, int group) {
  const int g = lane_id() / 4, from = group % 4 * 8 + g / 2;
  const uint32_t half = g % 2 == 0 ? 0x1044u : 0x3244u;  // bfloat16 to the upper half of a float
  const uint32_t low = shuffle(scales.words[group / 4], from);
  const uint32_t high = shuffle(scales.words[group / 4], from + 4);
  return {bits_to_float(permute(low, 0u, half)), bits_to_float(permute(high, 0u, half))};
}

// acc += scale * sum, of one group.
DEVICE void add_group(float (&acc)[4], const float (&sum)[4], float2 scale) {
  acc[0] = fma(scale.x, sum[0], acc[0]);
  acc[1] = fma(scale.x, sum[1], acc[1]);
  acc[2] = fma(scale.y, sum[2], acc[2]);
  acc[3] = fma(scale.y, sum[3], acc[3]);
}

// The 32 k of one block: two instructions.
template <Precision W>
DEVICE void multiply_block(float (&c)[4], const uint32_t (&a)[2][4], const uint4& b) {
  mma<Operand<W>>(c, a[0], b.x, b.y);
  mma<Operand<W>>(c, a[1], b.z, b.w);
}

// Adds step `index` of a slice to the slice's accumulators.
template <Precision W, int NT, typename Words>
DEVICE void multiply_step(float (&acc)[NT][4], const Step<W>& step, const SliceScales<W>& scales,
                          int index, const Words& words) {
  float sum[NT][4] = {};
#pragma unroll
  for (int block = 0; block < 2; ++block) {
    uint32_t a[2][4];
    decode<W>(a, step, block);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      multiply_block<W>(quantized(W) ? sum[n] : acc[n], a, words(n, block));
    }
    if constexpr (quantized(W)) {
      constexpr int kBlocks = kGroupInputs<W> / kBlockInputs;
      if ((block + 1) % kBlocks == 0) {
        const float2 scale = scales_of<W>(scales, (2 * index + block) / kBlocks);
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          add_group(acc[n], sum[n], scale);
          sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.0f;
        }
      }
    }
  }
}

}  // namespace gpt2f::cuda

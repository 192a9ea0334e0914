// ln_head: logits of the rows asked, layer norm first, and what each 128 of them know about the
// draw that follows.
//
// Maths    logits[a] = layernorm(residual[asked[a]]) W^T; parts[a, j] = part_of(128 logits).
// Shapes   residual (R, C), W (C, V), logits (A, V), parts (A, V / 128 rounded up).
// Work     a block of 8 warps owns 128 outputs, a warp one tile of 16 of them: it walks along K and
//          keeps the sums of its tile in registers, so nothing is split and nothing added up later.
//          The block's logits meet in shared memory: a warp stores a row's 128 together and joins
//          them to its HeadPart. 50,257 outputs are 393 blocks.
// Rows     up to 8: one tile of tokens, each block normalises them for itself where shared memory
//          holds them (8 of 768, 5 of 1600). Otherwise layernorm_rows goes before, and a block
//          takes up to 32 rows, four tiles of tokens; blocks of the same outputs follow each other
//          and find the weights in L2.
// Order    every warp asks for its first 256 inputs (16 bit: 8 KB a warp, 64 KB a block in flight)
//          before it waits for the kernel before; each further slice as registers become free.
// Bytes    packed_bytes(C, V) once for up to 32 rows, 4 A V (logits), A V / 8 (parts).
//          At 3.35 TB/s, one row, bf16: 124M 77.5 MB, 23 us; 1.5B 161 MB, 48 us.
// Numerics products and sums of cuda/layout.h, so a logit has the same bits for any number of rows;
//          scores and sums of parts: cuda/sample.cuh, in one order.
// Limits   any C, V, A >= 1; parts never see the padding behind V.
// Source   openai/gpt-2, src/model.py, model (the head is the token embedding).
#include "cuda/kernels.h"
#include "cuda/sample.cuh"
#include "cuda/stage.cuh"

namespace gpt2f::cuda {
namespace {

constexpr int kHeadWarps = static_cast<int>(kPartOutputs) / kTileOutputs;
constexpr int kLogitRow = static_cast<int>(kPartOutputs) + 4;  // floats: other banks for each token

struct Head {
  float* logits;
  int64_t stride;
  const SampleParameters* parameters;  // null, like parts: only logits are wanted
  HeadPart* parts;
  int32_t part_count;
  int32_t row_blocks;
};

// Normalised rows of the residual, in shared memory; see sum_units.
template <typename T>
DEVICE void fetch_operand(const Product& p, const ProductShared& at, uint8_t* shared) {
  fetch_rows(p.x, at, reinterpret_cast<float*>(shared));
  cp_async_commit();
  cp_async_wait<0>();
  sync_block();
  normalize_rows<T>(p.x, at, shared);
  sync_block();
}

// The 16 outputs of the warp's tile for all tokens: (token, output of the block).
template <int NT>
DEVICE void put_tile(const float (&sums)[NT][4], float* logits) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  float* const mine = logits + 2 * t * kLogitRow + kTileOutputs * warp_id() + g;
#pragma unroll
  for (int n = 0; n < NT; ++n) {
    mine[8 * n * kLogitRow] = sums[n][0];
    mine[(8 * n + 1) * kLogitRow] = sums[n][1];
    mine[8 * n * kLogitRow + 8] = sums[n][2];
    mine[(8 * n + 1) * kLogitRow + 8] = sums[n][3];
  }
}

// One warp: 128 logits of one row to global memory, and their part.
DEVICE void finish_row(const Head& head, const float* logits, int64_t row, int32_t part,
                       int32_t vocab) {
  const int64_t token = int64_t{part} * kPartOutputs + 4 * lane_id();
  float* const to = head.logits + row * head.stride + token;
  const uint4 words = load16(logits + 4 * lane_id());
  const float four[4] = {float_of(words.x), float_of(words.y), float_of(words.z),
                         float_of(words.w)};
  if (token + 4 <= vocab) {
    store16(to, words);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (token + j < vocab) to[j] = four[j];
    }
  }
  if (head.parts == nullptr) return;
  const HeadPart known = part_of(four, int64_t{part} * kPartOutputs, vocab, head.parameters[row]);
  if (lane_id() == 0) head.parts[row * head.part_count + part] = known;
}

template <Precision W, int NT, bool kNorm>
KERNEL LAUNCH_BOUNDS(32 * kHeadWarps, NT == 1 ? 2 : 1) head_kernel(Product p, Head head) {
  DYNAMIC_SHARED(uint8_t, shared);
  const Matrix& m = p.matrix;
  const ProductShared at(p, NT, kNorm);
  float* const logits = reinterpret_cast<float*>(shared + at.bytes);
  const int32_t part = static_cast<int32_t>(blockIdx.x) / head.row_blocks;
  const int32_t first_row = static_cast<int32_t>(blockIdx.x) % head.row_blocks * (8 * NT);
  const int32_t rows = p.x.rows - first_row < 8 * NT ? p.x.rows - first_row : 8 * NT;
  const int tile = part * kHeadWarps + warp_id();
  const int units = tile < m.tiles ? m.slices : 0;

  Unit<W> unit;
  UnitPlace<W> next(m, tile, 0, units);
  next.load_scales(unit, m);
#pragma unroll
  for (int s = 0; s < kSliceSteps; ++s) next.load(unit, s);
  if constexpr (kNorm) {
    float* const floats = reinterpret_cast<float*>(shared);
    fetch_floats(floats, p.x.norm.weight, at.floats);
    fetch_floats(floats + at.floats, p.x.norm.bias, at.floats);
  }
  wait_for_previous();
  allow_next();
  if constexpr (kNorm) fetch_operand<Operand<W>>(p, at, shared);

  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t row = kNorm ? at.row : 2 * p.x.stride;
  const uint8_t* const operand =
      (kNorm ? shared + at.operand : static_cast<const uint8_t*>(p.x.operand) + first_row * row) +
      g * row + 16 * t;
  float sums[NT][4] = {};
  for (int slice = 0; slice < units; ++slice) {
    const int steps = next.steps;
    next.weights += kSliceSteps * kStepLoads<W> * 512;
    next.slice = slice + 1;
    next.steps = slice + 1 < units ? m.slice_steps(slice + 1) : 0;
    const OperandWords words{operand + slice * (2 * kSlice), static_cast<uint32_t>(8 * row),
                             rows - g};
    float acc[NT][4] = {};
    multiply_unit<W, NT, kNorm>(acc, unit, steps, next, m, words);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[n][i] = slice == 0 ? acc[n][i] : sums[n][i] + acc[n][i];
    }
  }
  put_tile<NT>(sums, logits);
  sync_block();
  for (int r = warp_id(); r < rows; r += kHeadWarps) {
    finish_row(head, logits + r * kLogitRow, first_row + r, part, m.outputs);
  }
}

int64_t shared_bytes(const Product& p, int token_tiles, bool norm) {
  return ProductShared(p, token_tiles, norm).bytes + int64_t{8} * token_tiles * kLogitRow * 4;
}

template <Precision W, int NT, bool kNorm>
void launch_head(const Product& p, Head head, void* stream) {
  head.row_blocks = (p.x.rows + 8 * NT - 1) / (8 * NT);
  launch("ln_head", head_kernel<W, NT, kNorm>, Grid{int64_t{head.part_count} * head.row_blocks},
         32 * kHeadWarps, shared_bytes(p, NT, kNorm), stream, p, head);
}

template <Precision W>
void run_head(const LnHeadArgs& args, void* stream) {
  const int64_t parts = (args.linear.outputs + kPartOutputs - 1) / kPartOutputs;
  const bool draws = args.parts != nullptr && args.parameters != nullptr;
  const Head head{.logits = args.logits,
                  .stride = args.logit_stride,
                  .parameters = args.parameters,
                  .parts = draws ? args.parts : nullptr,
                  .part_count = static_cast<int32_t>(parts),
                  .row_blocks = 1};
  const Product p{.matrix = matrix_of(W, args.linear),
                  .x = {.operand = args.normed,
                        .residual = args.residual,
                        .stride = args.stride,
                        .asked = args.asked,
                        .norm = args.norm,
                        .width = static_cast<int32_t>(args.linear.inputs),
                        .rows = static_cast<int32_t>(args.rows)},
                  .tiles_per_block = 0};  // sums stay in registers
  if (args.rows <= kTileTokens && shared_bytes(p, 1, true) <= kProductShared) {
    launch_head<W, 1, true>(p, head, stream);
    return;
  }
  layernorm_rows(args.residual, args.stride, args.asked, args.norm, args.normed, args.stride,
                 args.rows, args.linear.inputs, W, stream);
  launch_head<W, 4, false>(p, head, stream);
}

}  // namespace

void ln_head(const LnHeadArgs& args, const Lane& lane) {
  if (args.rows == 0) return;
  with_weights(args.precision, [&]<Precision W>() { run_head<W>(args, lane.stream); });
}

}  // namespace gpt2f::cuda

// Products of few rows with a packed matrix (decode): one pass over the weights, at the speed of
// memory.
//
// Maths    out[r, n] = sum_k x[r, k] w[n, k], handed to an Epilogue; with kNorm x = layernorm of
//          rows of the residual.
// Work     a block owns `tiles_per_block` tiles of 16 outputs. Its units are (tile, slice of 256 k)
//          in order; warp w takes units w, w + warps, ... and multiplies them for all rows, NT
//          tiles of 8 tokens (1 or 4). Unit sums meet in shared memory and are added in index
//          order.
// Order    every warp asks for its first unit's weights (16 bit: 16 loads of 16 bytes a lane in
//          flight, 8 KB a warp) before it waits for the kernel before; each further unit is asked
//          for as the registers of the last one become free.
// Norm     each block normalises its rows for itself, one warp a row: less than waiting for another
//          kernel. Rows and parameters pass through shared memory, for the weights in flight leave
//          no registers to hold them; the parameters arrive while the block waits.
// Bytes    packed_bytes of the matrix once; per block the operand rows again, from L2: 2 K rows, or
//          4 K rows of the residual plus 8 K of the norm.
// Cost     lane-instructions per byte of weights in the loop over units, sm_90: 16-bit 0.8, int8
//          2.4 to 2.9, int4 5.4 to 6.0 (9.2 with four tiles); an H200 has 7.8 while a byte arrives.
// Limits   rows <= 8 NT, shared memory of ProductShared. Sums of cuda/layout.h.
// Numerics sums of cuda/layout.h; the operand is rounded once, to the type of the instruction.
// Source   the instruction and its fragments: PTX ISA, mma.m16n8k16; programmatic launch: CUDA C++
//          Programming Guide, "Programmatic Dependent Launch".
#pragma once

#include <algorithm>

#include "core/error.h"
#include "cuda/fragments.cuh"
#include "cuda/launch.h"
#include "cuda/norm.cuh"

namespace gpt2f::cuda {

// Warps of one block at most: four tiles of tokens take more registers.
template <int NT>
inline constexpr int kProductWarps = NT == 1 ? 16 : 12;
constexpr int64_t kProductShared = 64 << 10;  // bytes that every device gives one block
constexpr int64_t kBlocksWanted = 128;  // about the processors of a large device

// Where rows come from. The operand, or with kNorm the residual.
struct ProductRows {
  const void* operand = nullptr;  // 16-bit rows
  const float* residual = nullptr;  // float rows
  int64_t stride = 0;  // of either, in elements
  const int32_t* asked = nullptr;  // with kNorm: which rows of the residual; null: the first ones
  LayernormParameters norm = {};
  int32_t width = 0;  // K
  int32_t rows = 0;
};

struct Product {
  Matrix matrix;
  ProductRows x;
  int32_t tiles_per_block;
};

// Shared memory of one block: with kNorm the norm's weight and bias and the rows of the residual,
// `floats` each, then the operand rows; then the sums.
struct ProductShared {
  int64_t floats;
  int64_t row;  // bytes of an operand row; 64 past a multiple of 128, so that the four lanes
                // of a token and those of the next use different banks
  int64_t operand;  // where these begin, in bytes
  int64_t sums;
  int64_t bytes;

  GPT2F_BOTH ProductShared(const Product& p, int token_tiles, bool norm) {
    floats = (p.x.width + 3) / 4 * 4;
    row = int64_t{2} * p.matrix.steps * kStepInputs + 64;
    operand = norm ? (2 + p.x.rows) * floats * 4 : 0;
    sums = operand + (norm ? p.x.rows * row : 0);
    bytes = sums + int64_t{p.tiles_per_block} * p.matrix.slices * token_tiles * 512;
  }
};

// Weights of one unit.
template <Precision W>
struct Unit {
  Step<W> steps[kSliceSteps];
  SliceScales<W> scales;
};

// Where a unit lies. Slices from `slices` on have no steps.
template <Precision W>
struct UnitPlace {
  const uint8_t* weights;  // the lane's words of the first step
  int tile;
  int slice;
  int steps;

  DEVICE UnitPlace(const Matrix& m, int tile_, int slice_, int slices)
      : weights(step_address<W>(m, tile_, slice_ * kSliceSteps)),
        tile(tile_),
        slice(slice_),
        steps(slice_ < slices ? m.slice_steps(slice_) : 0) {}
  DEVICE void load(Unit<W>& unit, int step) const {
    if (step < steps) load_step<W>(unit.steps[step], weights + step * kStepLoads<W> * 512);
  }
  DEVICE void load_scales(Unit<W>& unit, const Matrix& m) const {
    if (steps > 0) unit.scales = cuda::load_scales<W>(m, tile, slice);
  }
};

// The unit `count` behind the one at (tile, slice), in the order of a block that ends before `end`.
template <Precision W>
DEVICE UnitPlace<W> unit_behind(const Matrix& m, int tile, int slice, int count, int end) {
  for (slice += count; slice >= m.slices; slice -= m.slices) ++tile;
  return UnitPlace<W>(m, tile, slice, tile < end ? m.slices : 0);
}

// B words of a unit, from where the operand lies. Tokens behind the last are the last again: the
// sums they give are never read.
struct OperandWords {
  const uint8_t* at;  // token g, k = 8 t of the unit's first step
  uint32_t tokens;  // bytes from one tile of tokens to the next
  int left;  // rows from token g on; none or fewer, if g is behind the last

  DEVICE uint4 words(int n, int step, int block) const {
    const int row = 8 * n < left ? 8 * n : left - 1;
    return load16(at + row * static_cast<int64_t>(tokens / 8) + 128 * step + 64 * block);
  }
};

// Multiplies the unit and asks for the next one's weights as it goes.
template <Precision W, int NT, bool kNorm>
DEVICE void multiply_unit(float (&acc)[NT][4], Unit<W>& unit, int steps, const UnitPlace<W>& next,
                          const Matrix& m, const OperandWords& operand) {
  // One tile of tokens from global memory: all of the slice in flight at once.
  constexpr bool kAhead = NT == 1 && !kNorm;
  uint4 ahead[2 * kSliceSteps];
  if constexpr (kAhead) {
#pragma unroll
    for (int i = 0; i < 2 * kSliceSteps; ++i) {
      ahead[i] = operand.words(0, i / 2 < steps ? i / 2 : 0, i % 2);
    }
  }
  const SliceScales<W> scales = unit.scales;
  next.load_scales(unit, m);
#pragma unroll
  for (int s = 0; s < kSliceSteps; ++s) {
    if (s < steps) {
      multiply_step<W, NT>(acc, unit.steps[s], scales, s, [&](int n, int block) {
        if constexpr (kAhead) return ahead[2 * s + block];
        return operand.words(n, s, block);
      });
    }
    next.load(unit, s);
  }
}

// `floats` of them, by the whole block, asynchronously.
DEVICE void fetch_floats(float* to, const float* from, int64_t floats) {
  const int threads = static_cast<int>(blockDim.x);
  for (int i = 4 * static_cast<int>(threadIdx.x); i < floats; i += 4 * threads) {
    cp_async16(to + i, from + i, true);
  }
}
DEVICE void fetch_rows(const ProductRows& x, const ProductShared& at, float* shared) {
  for (int row = 0; row < x.rows; ++row) {
    const int64_t from = x.asked == nullptr ? row : x.asked[row];
    fetch_floats(shared + (2 + row) * at.floats, x.residual + from * x.stride, at.floats);
  }
}

// The block's own operand rows, one warp a row.
template <typename T>
DEVICE void normalize_rows(const ProductRows& x, const ProductShared& at, uint8_t* shared) {
  constexpr int kHeld = 4;  // the weights leave no more registers
  const float* const floats = reinterpret_cast<const float*>(shared);
  const LayernormParameters norm{floats, floats + at.floats, x.norm.eps};
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int row = warp_id(); row < x.rows; row += warps) {
    uint8_t* const to = shared + at.operand + row * at.row;
    normalize_row<T, kHeld>(
        floats + (2 + row) * at.floats, norm, x.width, static_cast<int>(at.row - 64) / 2,
        [&](int column, uint2 four) { *reinterpret_cast<uint2*>(to + 2 * column) = four; });
  }
}

// Sums of the units of tiles [first_tile, end_tile), in shared memory: [unit][NT][16 outputs][8
// tokens]. Calls started() once, as soon as what earlier kernels wrote may be read. Ends with a
// barrier.
template <Precision W, int NT, bool kNorm, typename Started>
DEVICE const float* sum_units(const Product& p, uint8_t* shared, int first_tile, int end_tile,
                              const Started& started) {
  const Matrix& m = p.matrix;
  const ProductShared at(p, NT, kNorm);
  float* const floats = reinterpret_cast<float*>(shared);
  float* const sums = reinterpret_cast<float*>(shared + at.sums);
  const int warps = static_cast<int>(blockDim.x) / 32;

  Unit<W> unit;
  UnitPlace<W> now = unit_behind<W>(m, first_tile, 0, warp_id(), end_tile);
  now.load_scales(unit, m);
#pragma unroll
  for (int s = 0; s < kSliceSteps; ++s) now.load(unit, s);
  if constexpr (kNorm) {
    fetch_floats(floats, p.x.norm.weight, at.floats);
    fetch_floats(floats + at.floats, p.x.norm.bias, at.floats);
  }
  wait_for_previous();
  allow_next();
  if constexpr (kNorm) {
    fetch_rows(p.x, at, floats);
    cp_async_commit();
  }
  started();
  if constexpr (kNorm) {
    cp_async_wait<0>();
    sync_block();
    normalize_rows<Operand<W>>(p.x, at, shared);
    sync_block();
  }

  const int g = lane_id() / 4, t = lane_id() % 4;
  const int64_t row = kNorm ? at.row : 2 * p.x.stride;
  const uint8_t* const rows =
      (kNorm ? shared + at.operand : static_cast<const uint8_t*>(p.x.operand)) + g * row + 16 * t;
  for (int index = warp_id(); now.steps > 0; index += warps) {
    const UnitPlace<W> next = unit_behind<W>(m, now.tile, now.slice, warps, end_tile);
    const OperandWords words{rows + now.slice * (2 * kSlice), static_cast<uint32_t>(8 * row),
                             p.x.rows - g};
    float acc[NT][4] = {};
    multiply_unit<W, NT, kNorm>(acc, unit, now.steps, next, m, words);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      float2* const to = reinterpret_cast<float2*>(sums + (index * NT + n) * 128) + lane_id();
      to[0] = {acc[n][0], acc[n][1]};
      to[32] = {acc[n][2], acc[n][3]};
    }
    now = next;
  }
  sync_block();
  return sums;
}

// The sum of one output and token of the block's tile `local`, its slices in order.
template <int NT>
DEVICE float add_slices(const float* sums, int slices, int local, int token, int output) {
  const float* const at = sums + (local * slices * NT + token / 8) * 128 + output * 8 + token % 8;
  float sum = at[0];
  for (int s = 1; s < slices; ++s) sum += at[s * NT * 128];
  return sum;
}

template <Precision W, int NT, bool kNorm, typename Epilogue>
KERNEL LAUNCH_BOUNDS(32 * kProductWarps<NT>, 1) product_kernel(Product p, Epilogue epilogue) {
  DYNAMIC_SHARED(uint8_t, shared);
  const int first = static_cast<int>(blockIdx.x) * p.tiles_per_block;
  const int left = p.matrix.tiles - first;
  const int tiles = left < p.tiles_per_block ? left : p.tiles_per_block;
  // Thread i takes results i, i + threads, ...: outputs of a token side by side.
  const int mine = static_cast<int>(threadIdx.x), count = tiles * NT * 128;
  const auto output_of = [&](int i) { return (first + i / (NT * 128)) * 16 + i % 16; };
  const auto token_of = [](int i) { return i / 16 % (8 * NT); };
  const auto exists = [&](int i) {
    return i < count && token_of(i) < p.x.rows && output_of(i) < p.matrix.outputs;
  };
  // What the epilogue needs besides is asked for before the sums.
  typename Epilogue::Inputs inputs{};
  const float* const sums = sum_units<W, NT, kNorm>(p, shared, first, first + tiles, [&] {
    if (exists(mine)) inputs = epilogue.load(token_of(mine), output_of(mine));
  });
  for (int i = mine; i < count; i += static_cast<int>(blockDim.x)) {
    if (!exists(i)) continue;
    if (i != mine) inputs = epilogue.load(token_of(i), output_of(i));
    const float sum = add_slices<NT>(sums, p.matrix.slices, i / (NT * 128), token_of(i), i % 16);
    epilogue.store(token_of(i), output_of(i), sum, inputs);
  }
}

// ---- Host --------------------------------------------------------------------------------------

// Warps of a block with this many units: as few rounds as possible, of equal size; with kNorm also
// one for each row.
template <int NT>
int product_warps(int64_t units, int64_t normed_rows) {
  const int64_t rounds = (units + kProductWarps<NT> - 1) / kProductWarps<NT>;
  const int64_t working = (units + rounds - 1) / rounds;
  return static_cast<int>(std::max(working, normed_rows));
}

// With more tokens the operand is more than the weights: several tiles of a block then share it in
// L1, as long as there are blocks enough.
template <int NT>
int32_t product_tiles(const Matrix& m) {
  if (NT == 1) return 1;
  const int64_t most = std::min<int64_t>(kProductWarps<NT> / m.slices, m.tiles / kBlocksWanted);
  return static_cast<int32_t>(std::max<int64_t>(most, 1));
}

template <Precision W, int NT, bool kNorm, typename Epilogue>
void launch_product(const char* name, const Product& p, const Epilogue& epilogue, void* stream) {
  const int64_t units = int64_t{p.tiles_per_block} * p.matrix.slices;
  const Grid grid{(p.matrix.tiles + p.tiles_per_block - 1) / p.tiles_per_block};
  launch(name, product_kernel<W, NT, kNorm, Epilogue>, grid,
         32 * product_warps<NT>(units, kNorm ? p.x.rows : 0), ProductShared(p, NT, kNorm).bytes,
         stream, p, epilogue);
}

}  // namespace gpt2f::cuda

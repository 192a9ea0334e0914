// embed: residual[r] = wte[token] + wpe[position], in float. A tied wte exists only as the packed
// head; a second copy of it would cost 77 to 161 MB.
//
// Shapes   tokens, positions (R); wte rows (V, stride) of T, or packed (cuda/layout.h), whose eight
//          values k ... k + 7 of an output lie in 16 bytes: whole as T and int8, int4 with eight
//          others. wpe (n_ctx, stride) of T; residual (R, stride), zeros behind C. T is bfloat16
//          for kBf16, float16 otherwise.
//          op_embed: tokens, positions int64; wte (V, C), wpe (n_ctx, C), out (R, C) of one type.
// Work     a thread takes eight columns of a row (op_embed: one), a block 128 threads of one row.
// Traffic  a row: 2 stride of wte (int4: stride; int8 and int4 share their words with another
//          output, and 2 stride / group of scales), 2 stride of wpe, 4 stride of residual, 8 of
//          ids. 12.8 KB at C = 1600, 4 ns at 3.35 TB/s: launch and two dependent loads, not bytes.
//          op_embed: 3 e C + 16 bytes a row for values of e bytes.
// Numerics exact but for the one rounding of the sum: an int8 times a bfloat16 scale fits a float.
// Limits   the engine checks its ids. op_embed cannot without waiting for the device: a row whose
//          token is not in 0 ... V - 1, or its position not in 0 ... n_ctx - 1, becomes NaN.
// Source   openai/gpt-2, src/model.py.
#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/layout.h"

namespace gpt2f::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 8;  // of one thread

struct Eight {
  float v[kColumns];
};

template <typename T>
DEVICE Eight widened(const void* address) {
  const uint4 words = load16(address);
  const float2 a = unpack2<T>(words.x), b = unpack2<T>(words.y), c = unpack2<T>(words.z),
               d = unpack2<T>(words.w);
  return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}

// Values k ... k + 7 of output n of the packed head; k is a multiple of 8.
template <typename T, Precision kWeights>
DEVICE Eight unpacked(const PackedLinear& head, int64_t n, int64_t k) {
  const char* const bytes = reinterpret_cast<const char*>(head.words);
  if constexpr (!quantized(kWeights)) {
    return widened<T>(bytes + 2 * element_of(head.inputs, n, k));
  } else {
    constexpr bool kBytes = kWeights == Precision::kInt8;
    const Nibble place = nibble_of(head.inputs, n, k);
    const uint4 four =
        load16(kBytes ? bytes + byte_of(head.inputs, n, k) / 16 * 16 : bytes + 4 * place.word);
    const int shift = kBytes ? static_cast<int>(16 * (n / 8 % 2)) : place.shift;
    const int64_t scales = tiles(head.outputs) * tile_bytes(kWeights, head.inputs) +
                           2 * scale_of(kWeights, head.inputs, n, k);
    const float scale = to_float<Bf16>(*reinterpret_cast<const uint16_t*>(bytes + scales));
    const uint32_t words[4] = {four.x, four.y, four.z, four.w};
    Eight out;
#pragma unroll
    for (int e = 0; e < kColumns; ++e) {
      const uint32_t field = words[e / 2] >> (shift + (kBytes ? 8 : 16) * (e % 2));
      const int q = kBytes ? static_cast<int>(field & 255) - 128 : static_cast<int>(field & 15) - 8;
      out.v[e] = static_cast<float>(q) * scale;
    }
    return out;
  }
}

template <typename T, Precision kWeights>
KERNEL LAUNCH_BOUNDS(kThreads, 1) embed_kernel(EmbedArgs args) {
  wait_for_previous();
  allow_next();
  const int64_t row = blockIdx.x;
  const int64_t column = (int64_t{blockIdx.y} * kThreads + threadIdx.x) * kColumns;
  if (column >= args.stride) return;
  const int64_t token = args.tokens[row], position = args.positions[row];
  const uint16_t* const rows = static_cast<const uint16_t*>(args.rows_table);
  const Eight place =
      widened<T>(static_cast<const uint16_t*>(args.wpe) + position * args.stride + column);
  const Eight meaning = rows != nullptr ? widened<T>(rows + token * args.stride + column)
                                        : unpacked<T, kWeights>(args.packed_table, token, column);
  float sums[kColumns];
#pragma unroll
  for (int e = 0; e < kColumns; ++e) {
    sums[e] = column + e < args.width ? meaning.v[e] + place.v[e] : 0.0f;
  }
  uint4 halves[2];
  __builtin_memcpy(halves, sums, sizeof halves);
  store16(args.residual + row * args.stride + column, halves[0]);
  store16(args.residual + row * args.stride + column + 4, halves[1]);
}

struct Float {
  using Stored = float;
  DEVICE static float widen(float x) { return x; }
  DEVICE static float narrow(float x) { return x; }
};
template <typename T>
struct Half {
  using Stored = uint16_t;
  DEVICE static float widen(uint16_t x) { return to_float<T>(x); }
  DEVICE static uint16_t narrow(float x) { return from_float<T>(x); }
};

template <typename E>
KERNEL LAUNCH_BOUNDS(kThreads, 1) op_embed_kernel(OpEmbedArgs args) {
  using Stored = typename E::Stored;
  wait_for_previous();
  allow_next();
  const int64_t row = blockIdx.x;
  const int64_t token = args.tokens[row], position = args.positions[row];
  const bool known = token >= 0 && token < args.vocab && position >= 0 && position < args.contexts;
  const Stored* const meaning =
      static_cast<const Stored*>(args.wte) + (known ? token * args.width : 0);
  const Stored* const place =
      static_cast<const Stored*>(args.wpe) + (known ? position * args.width : 0);
  Stored* const out = static_cast<Stored*>(args.out) + row * args.width;
  for (int64_t c = int64_t{blockIdx.y} * kThreads + threadIdx.x; c < args.width;
       c += int64_t{gridDim.y} * kThreads) {
    out[c] = E::narrow(known ? E::widen(meaning[c]) + E::widen(place[c]) : __builtin_nanf(""));
  }
}

}  // namespace

void embed(const EmbedArgs& args, const Lane& lane) {
  if (args.rows == 0) return;
  const auto kernel = [&] {
    switch (args.precision) {
      case Precision::kBf16:
        return embed_kernel<Bf16, Precision::kBf16>;
      case Precision::kInt8:
        return embed_kernel<Fp16, Precision::kInt8>;
      case Precision::kInt4:
        return embed_kernel<Fp16, Precision::kInt4>;
      default:
        return embed_kernel<Fp16, Precision::kFp16>;
    }
  }();
  constexpr int64_t kBlock = kThreads * kColumns;
  launch("embed", kernel, Grid{args.rows, (args.stride + kBlock - 1) / kBlock}, kThreads, 0,
         lane.stream, args);
}

void op_embed(const OpEmbedArgs& args, const Lane& lane) {
  if (args.rows == 0 || args.width == 0) return;
  const auto kernel = args.type == DType::kF32    ? op_embed_kernel<Float>
                      : args.type == DType::kBF16 ? op_embed_kernel<Half<Bf16>>
                                                  : op_embed_kernel<Half<Fp16>>;
  const int64_t blocks = (args.width + kThreads - 1) / kThreads;
  launch("op_embed", kernel, Grid{args.rows, blocks < 16 ? blocks : 16}, kThreads, 0, lane.stream,
         args);
}

}  // namespace gpt2f::cuda

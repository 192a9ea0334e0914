// pack: a stored matrix, in any of the stored types and either orientation, into the order of
// cuda/layout.h, on the host. The engine uploads the result.
//
// Work     tiles of 16 outputs are split over the lanes.
// Traffic  the source once, the packed matrix once; one tile's rows in between, 64 K bytes. Sixteen
//          outputs of one k are read together when they are neighbours ([in, out]).
// Numerics float16 and bfloat16 widen exactly; 16-bit weights are rounded to nearest even, int8 and
//          int4 are what engine/quantize.h says.
#include <cstring>
#include <vector>

#include "core/numbers.h"
#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "engine/quantize.h"

namespace gpt2f::cuda {
namespace {

void write_halves(const PackArgs& a, int64_t tile, const float* rows) {
  uint16_t* const to = reinterpret_cast<uint16_t*>(a.linear.words);
  const int64_t padded = padded_inputs(a.linear.inputs);
  for (int64_t h = 0; h < kTileOutputs; ++h) {
    for (int64_t k = 0; k < padded; ++k) {
      const float value = rows[h * padded + k];
      to[element_of(a.linear.inputs, tile * kTileOutputs + h, k)] =
          a.precision == Precision::kBf16 ? to_bf16(value) : to_f16(value);
    }
  }
}

void write_quantized(const PackArgs& a, int64_t tile, const float* rows) {
  const int64_t inputs = a.linear.inputs, padded = padded_inputs(inputs);
  const bool wide = a.precision == Precision::kInt8;
  uint8_t* const weights = reinterpret_cast<uint8_t*>(a.linear.words);
  const int64_t bytes = tile_bytes(a.precision, inputs);
  uint16_t* const scales = reinterpret_cast<uint16_t*>(weights + tiles(a.linear.outputs) * bytes);
  std::memset(weights + tile * bytes, 0, static_cast<size_t>(bytes));
  std::vector<int8_t> q(static_cast<size_t>(padded));
  std::vector<uint16_t> row_scales(static_cast<size_t>(groups(a.precision, inputs)));
  for (int64_t h = 0; h < kTileOutputs; ++h) {
    const int64_t n = tile * kTileOutputs + h;
    quantize_row(a.precision, rows + h * padded, padded, q.data(), row_scales.data());
    for (int64_t k = 0; k < padded; ++k) {
      const int value = q[static_cast<size_t>(k)];
      if (wide) {
        weights[byte_of(inputs, n, k)] = static_cast<uint8_t>(value + 128);
      } else {
        const Nibble at = nibble_of(inputs, n, k);
        a.linear.words[at.word] |= static_cast<uint32_t>(value + 8) << at.shift;
      }
    }
    const int64_t size = group_size(a.precision);
    for (int64_t k = 0; k < padded; k += size) {
      scales[scale_of(a.precision, inputs, n, k)] = row_scales[static_cast<size_t>(k / size)];
    }
  }
}

}  // namespace

int64_t linear_words(Precision precision, int64_t inputs, int64_t outputs) {
  return packed_bytes(precision, inputs, outputs) / 4;
}

void pack(const PackArgs& args, const Lane& lane) {
  const Range mine = share(tiles(args.linear.outputs), 1, lane);
  std::vector<float> rows(static_cast<size_t>(kTileOutputs * padded_inputs(args.linear.inputs)));
  for (int64_t tile = mine.begin; tile < mine.end; ++tile) {
    read_tile(args, tile * kTileOutputs, rows.data());
    if (quantized(args.precision)) {
      write_quantized(args, tile, rows.data());
    } else {
      write_halves(args, tile, rows.data());
    }
  }
}

}  // namespace gpt2f::cuda

// Group quantisation of weights, defined once for every backend: what the integers and scales of a
// matrix are. Backends only reorder them.
//
// A group of neighbours along K shares one scale, a bfloat16; weight = q * scale, and
// q = round(weight / scale), ties to even, clamped. A division in float32, so no other arithmetic
// gives other bits.
//   int8  q in -127 ... 127; scale = largest magnitude / 127, rounded up, so nothing is clamped
//   int4  q in -8 ... 7; scale = +-largest magnitude / d, d = 7, 7.25 ... 9: whichever has the
//         least sum of squared errors, the first of equals. A negative scale gives -8 to the
//         largest positive weight; d above 8 clips it so that the many small ones come closer.
// A group without a weight of at least 2^-100 is zeros: scale 0, q 0.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/kernels.h"

namespace gpt2f {

// Inputs (elements along K) that share one scale. K is padded to a multiple of 64 with zeros.
constexpr int64_t kInt8Group = 64;
constexpr int64_t kInt4Group = 32;
constexpr int64_t group_size(Precision p) {
  return p == Precision::kInt8 ? kInt8Group : kInt4Group;
}

// Quantises the weights of one output: `row` is padded_inputs finite values, a multiple of 64, with
// zeros behind the last input. Writes as many q, and padded_inputs / group_size(p) bfloat16 scales.
void quantize_row(Precision p, const float* row, int64_t padded_inputs, int8_t* q,
                  uint16_t* scales);

// Sixteen outputs of a stored matrix, from output `first`, as rows of round_up(K, 64) floats with
// zeros outside the matrix. What the precision cannot hold is noted in args.bad and read as zero.
void read_tile(const PackArgs& args, int64_t first, float* rows);

}  // namespace gpt2f

// Plain loops over fixed sizes, which compilers turn into vector code; sums have 16 parts whatever
// the vector width, so the bits are those of the source. What is added or divided here is never
// denormal (groups are scaled to about 1, dust in them is dropped): bits do not depend on whether
// the calling thread flushes denormals either.
#include "engine/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/numbers.h"

namespace gpt2f {
namespace {

constexpr int kParts = 16;
constexpr float kZeroGroup = 0x1p-100f;
constexpr float kDust = 0x1p-30f;  // of a group's largest, too little for any q but 0
constexpr float kShift = 0x1.8p23f;  // sums with it have no room for a fraction

// The nearest integer to |x| < 2^22, ties to even.
inline float nearest(float x) { return (x + kShift) - kShift; }

// An integer, brought into -8 ... 7: exact, and without a branch, which vector code has none of.
inline float four_bits(float q) {
  return (std::fabs(q + 8.0f) - std::fabs(q - 7.0f) - 1.0f) * 0.5f;
}

inline int8_t as_int8(float q) {
  const float shifted = q + kShift;
  uint32_t word;
  std::memcpy(&word, &shifted, sizeof word);
  return static_cast<int8_t>(word);
}

template <int kSize>
float largest(const float* group) {
  float parts[kParts] = {};
  for (int i = 0; i < kSize; i += kParts) {
    for (int j = 0; j < kParts; ++j) {
      const float magnitude = std::fabs(group[i + j]);
      parts[j] = parts[j] > magnitude ? parts[j] : magnitude;
    }
  }
  float most = parts[0];
  for (int j = 1; j < kParts; ++j) most = parts[j] > most ? parts[j] : most;
  return most;
}

float squared_error(const float* group, float scale) {
  float squares[kInt4Group];
  for (int i = 0; i < kInt4Group; ++i) {
    const float error = group[i] - four_bits(nearest(group[i] / scale)) * scale;
    squares[i] = error * error;
  }
  for (int i = 0; i < 16; ++i) squares[i] += squares[i + 16];
  for (int i = 0; i < 8; ++i) squares[i] += squares[i + 8];
  for (int i = 0; i < 4; ++i) squares[i] += squares[i + 4];
  return (squares[0] + squares[2]) + (squares[1] + squares[3]);
}

float rounded_to_bf16(float value) {
  return from_bits(static_cast<uint32_t>(to_bf16(value)) << 16);
}

uint16_t upper_half(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<uint16_t>(word >> 16);
}

uint16_t rounded_up_to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<uint16_t>((word + 0xFFFF) >> 16);
}

// The scale of least error for a group whose largest magnitude is `most`.
float best_scale(const float* group, float most) {
  float best = 0.0f, least = INFINITY;
  for (int quarters = 28; quarters <= 36; ++quarters) {
    const float magnitude = rounded_to_bf16(most / (static_cast<float>(quarters) * 0.25f));
    for (const float scale : {magnitude, -magnitude}) {
      const float error = squared_error(group, scale);
      if (error < least) {
        least = error;
        best = scale;
      }
    }
  }
  return best;
}

void quantize_int8(const float* group, float most, int8_t* q, uint16_t* scale) {
  *scale = rounded_up_to_bf16(most / 127.0f);
  const float divisor = from_bits(static_cast<uint32_t>(*scale) << 16);
  for (int i = 0; i < kInt8Group; ++i) q[i] = as_int8(nearest(group[i] / divisor));
}

void quantize_int4(const float* group, float most, int8_t* q, uint16_t* scale) {
  uint32_t exponent;
  std::memcpy(&exponent, &most, sizeof exponent);
  exponent = exponent >> 23 < 253 ? exponent >> 23 : 253;  // so that `down` is not denormal
  const float down = from_bits((254 - exponent) << 23);  // takes most to 1 ... 4
  const float up = from_bits(exponent << 23);
  float unit[kInt4Group];
  for (int i = 0; i < kInt4Group; ++i) {
    const float value = group[i] * down;
    unit[i] = std::fabs(value) < kDust ? 0.0f : value;
  }
  const float best = best_scale(unit, most * down);
  *scale = upper_half(best * up);
  for (int i = 0; i < kInt4Group; ++i) q[i] = as_int8(four_bits(nearest(unit[i] / best)));
}

void note_bad(std::atomic<int64_t>* bad, int64_t index) {
  int64_t known = bad->load(std::memory_order_relaxed);
  while (index < known && !bad->compare_exchange_weak(known, index, std::memory_order_relaxed)) {
  }
}

// Whether the weights of this precision can hold it.
bool holds(Precision p, float value) {
  return p == Precision::kFp16 ? std::fabs(value) < 65520.0f : std::isfinite(value);
}

}  // namespace

void read_tile(const PackArgs& a, int64_t first, float* rows) {
  const int64_t inputs = a.linear.inputs, padded = round_up(inputs, 64);
  const int64_t here = std::min<int64_t>(16, a.linear.outputs - first);
  std::fill(rows, rows + 16 * padded, 0.0f);
  const auto take = [&](int64_t k, int64_t h) {
    const int64_t index = k * a.k_stride + (first + h) * a.n_stride;
    const float value = widen(a.source, a.source_type, index);
    if (holds(a.precision, value)) {
      rows[h * padded + k] = value;
    } else {
      note_bad(a.bad, index);
    }
  };
  // The inner index runs along the source's contiguous axis.
  if (a.n_stride == 1) {
    for (int64_t k = 0; k < inputs; ++k) {
      for (int64_t h = 0; h < here; ++h) take(k, h);
    }
  } else {
    for (int64_t h = 0; h < here; ++h) {
      for (int64_t k = 0; k < inputs; ++k) take(k, h);
    }
  }
}

void quantize_row(Precision p, const float* row, int64_t padded_inputs, int8_t* q,
                  uint16_t* scales) {
  const int64_t size = group_size(p);
  for (int64_t k = 0; k < padded_inputs; k += size) {
    const bool eight = p == Precision::kInt8;
    const float most = eight ? largest<kInt8Group>(row + k) : largest<kInt4Group>(row + k);
    uint16_t* const scale = scales + k / size;
    if (most < kZeroGroup) {
      *scale = 0;
      std::memset(q + k, 0, static_cast<size_t>(size));
    } else if (eight) {
      quantize_int8(row + k, most, q + k, scale);
    } else {
      quantize_int4(row + k, most, q + k, scale);
    }
  }
}

}  // namespace gpt2f

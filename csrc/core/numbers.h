// Conversions of single stored elements, and shapes as text. All static: kernels compiled for one
// instruction set use them too, and must not share them with the rest.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "core/dtype.h"

namespace gpt2f {

static inline float from_bits(uint32_t word) {
  float out;
  std::memcpy(&out, &word, sizeof out);
  return out;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  if (std::isnan(value)) return 0x7FC0;
  return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

static inline float from_f16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3FF;
  if (exponent == 0) {  // zero or denormal: exact as a product
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return from_bits(sign | wide << 23 | mantissa << 13);
}

// Round to nearest even; beyond 65504 infinity, NaN stays NaN.
static inline uint16_t to_f16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t sign = word >> 16 & 0x8000, magnitude = word & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) return static_cast<uint16_t>(sign | 0x7E00);
  if (magnitude >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000) {  // denormal: in units of 2^-24, rounded by the addition of 2^23
    const float units = from_bits(magnitude) * 0x1p24f + 0x1p23f;
    uint32_t rounded;
    std::memcpy(&rounded, &units, sizeof rounded);
    return static_cast<uint16_t>(sign | (rounded & 0x7FFFFF));
  }
  const uint32_t rebased = magnitude - 0x38000000;
  return static_cast<uint16_t>(sign | (rebased + 0xFFF + (rebased >> 13 & 1)) >> 13);
}

// Element `index` of an array of `type`, as a float.
static inline float widen(const void* data, DType type, int64_t index) {
  if (type == DType::kF32) return static_cast<const float*>(data)[index];
  const uint16_t word = static_cast<const uint16_t*>(data)[index];
  return type == DType::kBF16 ? from_bits(static_cast<uint32_t>(word) << 16) : from_f16(word);
}

static inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "(";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  return text + ")";
}

}  // namespace gpt2f

// bfloat16 and IEEE half precision, exact: nearest, ties to even, NaN becomes 0x7FFF.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace gpt2f::simt {

inline float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t bf16_from_float(float x) {
  const uint32_t word = std::bit_cast<uint32_t>(x);
  if (x != x) return 0x7FFF;
  return static_cast<uint16_t>((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

// The exponent moves by a multiplication, which also makes subnormals right.
inline float fp16_to_float(uint16_t bits) {
  const uint32_t magnitude = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (bits & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

inline uint16_t fp16_from_double(double x) {
  if (x != x) return 0x7FFF;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  if (magnitude >= 65520.0) return sign | 0x7C00;
  if (magnitude < 0x1p-14) {  // subnormal, or rounds to the least normal number
    return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24));
  }
  // Adds half of the last place that stays, less one when that place is even.
  uint64_t word = std::bit_cast<uint64_t>(magnitude);
  word += (uint64_t{1} << 41) - 1 + (word >> 42 & 1);
  return sign | static_cast<uint16_t>((word >> 42) - (uint64_t{1023 - 15} << 10));
}

inline uint16_t fp16_from_float(float x) { return fp16_from_double(x); }

// a b + c with one rounding: the product is exact in double, and a sum that is not is made odd,
// so that rounding it again cannot meet a false tie.
inline uint16_t fp16_fma(uint16_t a, uint16_t b, uint16_t c) {
  const double product = static_cast<double>(fp16_to_float(a)) * fp16_to_float(b);
  const double addend = fp16_to_float(c);
  double sum = product + addend;
  if (std::isfinite(sum)) {
    const double rest = sum - product;
    const double error = (product - (sum - rest)) + (addend - rest);
    const auto word = std::bit_cast<int64_t>(sum);
    if (error != 0.0 && word % 2 == 0) {
      sum = std::bit_cast<double>(word + ((error > 0.0) == (sum > 0.0) ? 1 : -1));
    }
  }
  return fp16_from_double(sum);
}

inline uint32_t fp16x2_fma(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t word, int shift) { return static_cast<uint16_t>(word >> shift); };
  return fp16_fma(half(a, 0), half(b, 0), half(c, 0)) |
         static_cast<uint32_t>(fp16_fma(half(a, 16), half(b, 16), half(c, 16))) << 16;
}

}  // namespace gpt2f::simt

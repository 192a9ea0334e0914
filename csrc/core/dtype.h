// Element types of weights, activations and the cache, and how wide an operand word is.
//
// Products always consume 32-bit words: one float, or a pair of bfloat16 (even element in the low
// half), so that every kernel is written once for both precisions.
#pragma once

#include <cstdint>

namespace gpt2f {

enum class DType : int32_t { kF32 = 0, kBF16 = 1, kF16 = 2 };

// fp32 and bf16 name weights, activations and cache alike. fp16 likewise (CUDA only); int8 and int4
// are groups of quantised weights with scales (engine/quantize.h), on CUDA with fp16 activations.
enum class Precision : int32_t { kFp32 = 0, kBf16 = 1, kFp16 = 2, kInt8 = 3, kInt4 = 4 };

constexpr int kLanes = 16;          // outputs of one panel, positions of one page
constexpr int kGroupPanels = 4;     // panels interleaved in memory
constexpr int kPagePositions = 16;  // KV positions of one page
constexpr int kBlockElements = 96; // products are summed in blocks of this many elements of K

constexpr int64_t kMaxDeviceHeadSize = 128;  // of a backend with a device

constexpr int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Elements of an activation or the cache that one 32-bit word holds.
constexpr int word_elements(Precision p) { return p == Precision::kFp32 ? 1 : 2; }
constexpr int64_t words(Precision p, int64_t elements) {
  return (elements + word_elements(p) - 1) / word_elements(p);
}

constexpr int64_t dtype_bytes(DType t) { return t == DType::kF32 ? 4 : 2; }

}  // namespace gpt2f

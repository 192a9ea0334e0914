// What becomes of a product's sums: one small struct per stage, used by the kernels for few and for
// many rows alike, so that the bits agree.
//
// An Epilogue gives
//   Inputs load(row, output)                what it reads besides the sum; a kernel may ask for it
//                                           long before the sum is there
//   void store(row, output, sum, inputs)
//   void operator()(row, output, sum)       both at once
// for rows that exist and outputs < N, each pair once. Built on the host.
#pragma once

#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/layout.h"

namespace gpt2f::cuda {

// Query to its row, key and value to the page of the row's position, as T. Writes nothing else:
// what lies behind D in queries and pages stays zero.
template <typename T>
struct QkvEpilogue {
  struct Inputs {
    float bias;
    int32_t position;
    uint32_t* block;
  };
  const float* bias;
  uint16_t* query;
  const int32_t* positions;
  uint32_t* const* blocks;
  int64_t page;  // word of the block where the layer's first page begins
  int64_t page_words;
  int64_t key_words;
  uint64_t reciprocal;  // of the head size: n / D = n * reciprocal >> 32, for n D < 2^32
  int32_t width;  // C
  int32_t heads;
  int32_t head_size;
  int32_t padded_size;

  DEVICE Inputs load(int64_t row, int64_t output) const {
    return {bias[output], positions[row], blocks[row]};
  }
  DEVICE void store(int64_t row, int64_t output, float sum, const Inputs& inputs) const {
    const uint16_t value = from_float<T>(sum + inputs.bias);
    const int32_t column = static_cast<int32_t>(output);
    const int32_t part = column < width ? 0 : column < 2 * width ? 1 : 2;
    const uint32_t inside = static_cast<uint32_t>(column - part * width);
    const int32_t head = static_cast<int32_t>(inside * reciprocal >> 32);
    const int32_t d = static_cast<int32_t>(inside) - head * head_size;
    if (part == 0) {
      query[(row * heads + head) * padded_size + d] = value;
      return;
    }
    uint32_t* const keys = inputs.block + page + head * page_words;
    const int32_t slot = inputs.position % static_cast<int32_t>(kPagePositions);
    if (part == 1) {
      reinterpret_cast<uint16_t*>(keys)[slot * padded_size + d] = value;
    } else {
      uint16_t* const values = reinterpret_cast<uint16_t*>(keys + key_words);
      values[(slot / 2 * padded_size + d) * 2 + slot % 2] = value;
    }
  }
  DEVICE void operator()(int64_t row, int64_t output, float sum) const {
    store(row, output, sum, load(row, output));
  }
};

template <typename T>
QkvEpilogue<T> qkv_epilogue(const LnQkvArgs& a) {
  const uint64_t size = static_cast<uint64_t>(a.cache.head_size);
  return {a.linear.bias,
          reinterpret_cast<uint16_t*>(a.query),
          a.positions,
          a.blocks,
          a.cache.page_offset(a.layer, 0),
          a.cache.page_words(),
          a.cache.key_words(),
          ((uint64_t{1} << 32) + size - 1) / size,
          static_cast<int32_t>(a.cache.heads * a.cache.head_size),
          static_cast<int32_t>(a.cache.heads),
          static_cast<int32_t>(a.cache.head_size),
          static_cast<int32_t>(a.cache.value_width)};
}

// residual += sum + bias.
struct ResidualEpilogue {
  struct Inputs {
    float bias;
    float residual;
  };
  const float* bias;
  float* residual;
  int64_t stride;

  DEVICE Inputs load(int64_t row, int64_t output) const {
    return {bias[output], residual[row * stride + output]};
  }
  DEVICE void store(int64_t row, int64_t output, float sum, const Inputs& inputs) const {
    residual[row * stride + output] = inputs.residual + (sum + inputs.bias);
  }
  DEVICE void operator()(int64_t row, int64_t output, float sum) const {
    store(row, output, sum, load(row, output));
  }
};

// out = gelu(sum + bias), as T.
template <typename T>
struct GeluEpilogue {
  struct Inputs {
    float bias;
  };
  const float* bias;
  uint16_t* out;
  int64_t stride;

  DEVICE Inputs load(int64_t, int64_t output) const { return {bias[output]}; }
  DEVICE void store(int64_t row, int64_t output, float sum, const Inputs& inputs) const {
    out[row * stride + output] = from_float<T>(gelu(sum + inputs.bias));
  }
  DEVICE void operator()(int64_t row, int64_t output, float sum) const {
    store(row, output, sum, load(row, output));
  }
};

}  // namespace gpt2f::cuda

// Activations of one step, sized once for kMaxRows rows.
#pragma once

#include "core/buffer.h"
#include "core/kernels.h"
#include "engine/shape.h"

namespace gpt2f {

struct Scratch {
  Scratch(const Shape& shape, Precision precision, int threads);
  static int64_t bytes(const Shape& shape, Precision precision, int threads);

  int64_t stride;         // round_up(C, 16)
  int64_t inner_stride;   // round_up(I, 16)
  int64_t logit_stride;   // round_up(V, 16)
  int32_t* tokens;        // (kMaxRows)
  int32_t* positions;     // (kMaxRows)
  float* residual;        // (kMaxRows, stride)
  void* normed;           // operand (kMaxRows, stride)
  uint32_t** blocks;      // (kMaxRows) block of each row's position
  uint32_t* query;        // (kMaxRows, H, key_steps)
  void* attended;         // operand (kMaxRows, stride)
  void* inner;            // operand (kMaxRows, inner_stride)
  float* logits;          // (kLogitRows, logit_stride)
  float* draw;            // per lane 2 logit_stride
  float* lanes;           // per lane scratch_floats(n_ctx)

 private:
  int64_t lay_out(const Shape& shape, Precision precision, int threads, std::byte* memory);
  Scratch() = default;
  Buffer memory_;
};

}  // namespace gpt2f

// Activations of one step, sized once for the most rows a step may have, and what the host tells
// the kernels about the step.
#pragma once

#include <cstddef>
#include <memory>

#include "core/kernels.h"
#include "engine/place.h"
#include "engine/shape.h"

namespace gpt2f {

struct Scratch {
  Scratch(const Shape& shape, const Formats& formats, Place& place, int64_t max_sequences);
  static int64_t bytes(const Shape& shape, const Formats& formats, const KernelTable& table,
                       int threads, int64_t max_sequences);

  int64_t stride = 0;        // of rows of C elements
  int64_t inner_stride = 0;  // of rows of I elements
  int64_t logit_stride = 0;  // of rows of V floats
  float* residual = nullptr;     // (max_rows, stride)
  void* normed = nullptr;  // operand (max_rows, stride), or rows that products quantise
  uint32_t* query = nullptr;     // (max_rows, H, key_steps)
  void* projected = nullptr;     // operand (max_rows, round_up(3 C, 16)), of an int8 cache only
  void* attended = nullptr;      // operand (max_rows, stride)
  void* inner = nullptr;         // operand (max_rows, inner_stride)
  float* logits = nullptr;       // (kLogitRows, logit_stride)
  HeadPart* parts = nullptr;     // (kLogitRows, head_parts), or null
  float* draw = nullptr;         // per lane 2 logit_stride
  float* lanes = nullptr;        // per lane scratch_floats
  std::byte* control = nullptr;  // of the step
  std::byte* host_control = nullptr;  // the same on the host; one and the same on the CPU

 private:
  Scratch() = default;
  int64_t lay_out(const Shape& shape, const Formats& formats, const KernelTable& table, int threads,
                  int64_t max_sequences, std::byte* memory);
  std::unique_ptr<Region> memory_, host_;
};

// What one step is about, as arrays behind each other in one piece of memory, so that a device gets
// it with one copy and answers with another. Offsets depend on the counts alone: a recorded step
// finds everything where it was.
struct Control {
  int32_t* tokens;               // (R)
  int32_t* positions;            // (R)
  uint32_t** blocks;             // (R) block of each row's position
  Sequence* sequences;           // (B)
  Sequence* wanted;              // (B) what the last layer goes on with, in front
  uint32_t** tables;             // (B, blocks of a context)
  int32_t* asked;                // (A) rows
  SampleParameters* parameters;  // (A)
  // answers
  int32_t* drawn;   // (A)
  float* logprobs;  // (A)
  int64_t answers;  // where they begin
  int64_t bytes;

  Control(std::byte* memory, int64_t rows, int64_t sequences, int64_t asked, int64_t table_width);
};

}  // namespace gpt2f

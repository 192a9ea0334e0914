// All kernels, in order, for the instruction set whose simd_*.h was included before; ends with its
// table. Everything stays in anonymous namespaces: only the table's getter is visible outside.
#pragma once

#include "core/kernels.h"
#include "core/numbers.h"
#include "cpu/isa.h"
// clang-format off: order matters
#include "cpu/vmath.inl.h"
#include "cpu/operand.inl.h"
#include "cpu/quantized.inl.h"
#include "cpu/layernorm.inl.h"
#include "cpu/product.inl.h"
#include "cpu/cache_int8.inl.h"
#include "cpu/pages.inl.h"
#include "cpu/attention.inl.h"
#include "cpu/embed.inl.h"
#include "cpu/stages.inl.h"
#include "cpu/sample.inl.h"
#include "cpu/pack.inl.h"
#include "cpu/ops.inl.h"
// clang-format on

namespace {

inline int64_t linear_words(Precision p, int64_t inputs, int64_t outputs) {
  const int64_t panels = round_up(outputs, kLanes) / kLanes;
  if (p == kInt8) return panels * Steps<kInt8>::count(inputs) * Steps<kInt8>::kPanelWords;
  if (p == kInt4) return panels * Steps<kInt4>::count(inputs) * Steps<kInt4>::kPanelWords;
  return panels * kLanes * gpt2f::words(p, inputs);
}

inline int64_t stage_scratch_floats(const gpt2f::ScratchShape& shape) {
  return gpt2f::scratch_floats(shape.context);
}

inline int64_t no_head_parts(int64_t) { return 0; }

constexpr gpt2f::KernelTable make_table(const char* name) {
  return {name,
          gpt2f::kRowBlock,
          kLanes,
          1,
          kLanes,
          DType::kBF16,
          linear_words,
          quantized_row_words,
          stage_scratch_floats,
          no_head_parts,
          embed,
          ln_qkv,
          attention,
          linear_residual,
          ln_fc_gelu,
          ln_head,
          sample,
          pack,
          op_layernorm,
          op_gelu,
          op_linear,
          dense_attention,
          dense_attention_words,
          op_embed,
          nullptr,
          read,
          nullptr};
}

}  // namespace

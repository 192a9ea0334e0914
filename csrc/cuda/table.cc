// The table of the CUDA backend.
#include "cuda/kernels.h"
#include "cuda/layout.h"

namespace gpt2f::cuda {
namespace {

int64_t scratch_floats(const ScratchShape& shape) {
  return scratch_bytes(shape.heads, shape.head_size, shape.context) / 4;
}

int64_t head_parts(int64_t vocab) { return (vocab + kPartOutputs - 1) / kPartOutputs; }

}  // namespace

const KernelTable* table() {
  static const KernelTable kTable = {"cuda",
                                     kCudaMaxRows,
                                     kStrideUnit,
                                     kHeadUnit,
                                     kHeadUnit,
                                     DType::kF16,
                                     linear_words,
                                     [](Precision, int64_t) { return int64_t{0}; },
                                     scratch_floats,
                                     head_parts,
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
                                     linear,
                                     dense_attention,
                                     dense_attention_words,
                                     op_embed,
                                     op_sample,
                                     nullptr,
                                     device_table()};
  return &kTable;
}

}  // namespace gpt2f::cuda

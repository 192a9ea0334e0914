// The functions of the CUDA table and the launchers they share, one per file of the same name.
#pragma once

#include "core/kernels.h"

namespace gpt2f::cuda {

const KernelTable* table();
const DeviceTable* device_table();

// Stages. What Args point to is device memory; work is enqueued on lane.stream.
void embed(const EmbedArgs& args, const Lane& lane);
void ln_qkv(const LnQkvArgs& args, const Lane& lane);
void attention(const AttentionArgs& args, const Lane& lane);
void linear_residual(const LinearResidualArgs& args, const Lane& lane);
void ln_fc_gelu(const LnFcGeluArgs& args, const Lane& lane);
void ln_head(const LnHeadArgs& args, const Lane& lane);
void sample(const SampleArgs& args, const Lane& lane);

// Host memory to host memory; the engine uploads the result.
void pack(const PackArgs& args, const Lane& lane);
int64_t linear_words(Precision precision, int64_t inputs, int64_t outputs);

// Single operations on device tensors.
void op_layernorm(const LayernormArgs& args, const Lane& lane);
void op_gelu(const GeluArgs& args, const Lane& lane);
void linear(const LinearArgs& args, const Lane& lane);
void dense_attention(const DenseAttentionArgs& args, const Lane& lane);
int64_t dense_attention_words(const DenseAttentionArgs& args);
void op_embed(const OpEmbedArgs& args, const Lane& lane);
void op_sample(const OpSampleArgs& args, const Lane& lane);

}  // namespace gpt2f::cuda

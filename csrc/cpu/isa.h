// The kernel tables this build has; each comes from a file of its own, compiled for its processor.
#pragma once

#include "core/kernels.h"

namespace gpt2f {

// pack of int8 and int4, the same for every processor.
void pack_quantized(const PackArgs& args, const Lane& lane);

const KernelTable* table_scalar();
const KernelTable* table_avx2();
const KernelTable* table_avx2_vnni();
const KernelTable* table_avx512();
const KernelTable* table_avx512_vnni();
const KernelTable* table_avx512_bf16();
const KernelTable* table_neon();

}  // namespace gpt2f

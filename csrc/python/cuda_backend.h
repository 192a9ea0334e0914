// The CUDA backend of this build, or a clear error where there is none.
#pragma once

#include "core/kernels.h"

namespace gpt2f {

const KernelTable* cuda_table();  // throws Error (kDevice) in a CPU build

}  // namespace gpt2f

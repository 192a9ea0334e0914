#include "python/cuda_backend.h"

#include "core/error.h"
#if defined(GPT2_FAST_CUDA_BACKEND)
#include "cuda/kernels.h"
#endif

namespace gpt2f {

const KernelTable* cuda_table() {
#if defined(GPT2_FAST_CUDA_BACKEND)
  return cuda::table();
#else
  throw Error(ErrorKind::kDevice, "device 'cuda' is not available: " GPT2_FAST_CUDA_NOTE
                                  ". For the CUDA kernels: GPT2_FAST_CUDA=ON pip install .");
#endif
}

CudaVisit::CudaVisit(int device) : table_(cuda_table()->device), before_(table_->enter(device)) {}

CudaVisit::~CudaVisit() { table_->leave(before_); }

}  // namespace gpt2f

// The CUDA backend of this build, or a clear error where there is none.
#pragma once

#include "core/kernels.h"

namespace gpt2f {

const KernelTable* cuda_table();  // throws Error (kDevice) in a CPU build

// While it lives the calling thread works on a CUDA device; then on the one before.
class CudaVisit {
 public:
  explicit CudaVisit(int device);
  ~CudaVisit();
  CudaVisit(const CudaVisit&) = delete;
  CudaVisit& operator=(const CudaVisit&) = delete;

 private:
  const DeviceTable* const table_;
  const int before_;
};

}  // namespace gpt2f

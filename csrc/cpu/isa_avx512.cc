// The kernels for avx512. Only this file is compiled with that instruction set's flags.
#include "cpu/simd_avx512.h"
// clang-format off: the vector type comes first
#include "cpu/kernels.inl.h"
// clang-format on
#include "cpu/isa.h"

namespace gpt2f {

const KernelTable* table_avx512() {
  static constexpr KernelTable kTable = make_table("avx512");
  return &kTable;
}

}  // namespace gpt2f

// The kernels for avx2_vnni. Only this file is compiled with that instruction set's flags.
#include "cpu/simd_avx2.h"
// clang-format off: the vector type comes first
#include "cpu/kernels.inl.h"
// clang-format on
#include "cpu/isa.h"

namespace gpt2f {

const KernelTable* table_avx2_vnni() {
  static constexpr KernelTable kTable = make_table("avx2_vnni");
  return &kTable;
}

}  // namespace gpt2f

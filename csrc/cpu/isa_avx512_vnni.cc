// The kernels for avx512_vnni. Only this file is compiled with that instruction set's flags.
#include "cpu/simd_avx512.h"
// clang-format off: the vector type comes first
#include "cpu/kernels.inl.h"
// clang-format on
#include "cpu/isa.h"

namespace gpt2f {

const KernelTable* table_avx512_vnni() {
  static constexpr KernelTable kTable = make_table("avx512_vnni");
  return &kTable;
}

}  // namespace gpt2f

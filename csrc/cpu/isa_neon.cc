// The kernels for neon. Only this file is compiled with that instruction set's flags.
#include "cpu/simd_neon.h"
// clang-format off: the vector type comes first
#include "cpu/kernels.inl.h"
// clang-format on
#include "cpu/isa.h"

namespace gpt2f {

const KernelTable* table_neon() {
  static constexpr KernelTable kTable = make_table("neon");
  return &kTable;
}

}  // namespace gpt2f

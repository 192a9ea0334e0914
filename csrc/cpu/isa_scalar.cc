// The kernels for scalar. Only this file is compiled with that instruction set's flags.
#include "cpu/simd_scalar.h"
// clang-format off: the vector type comes first
#include "cpu/kernels.inl.h"
// clang-format on
#include "cpu/isa.h"

namespace gpt2f {

const KernelTable* table_scalar() {
  static constexpr KernelTable kTable = make_table("scalar");
  return &kTable;
}

}  // namespace gpt2f

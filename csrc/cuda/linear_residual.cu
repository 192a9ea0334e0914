// linear_residual: the projection behind attention and behind gelu, added to the residual stream.
//
// Maths    residual[r] += x[r] W + b.
// Shapes   x (R, K), W (K, C), residual (R, C).
// Work     stage.cuh; C / 16 blocks of up to 16 warps at decode.
// Bytes    packed_bytes(K, C) + 4 C (bias) + 2 K R (x) + 8 C R (residual, read and written).
//          At 3.35 TB/s and one row, bf16: 124M 1.2 and 4.7 MB, 0.4 and 1.4 us a layer; 1.5B 5.1
//          and 20.5 MB, 1.5 and 6.1 us.
// Numerics products and sums of cuda/layout.h; bias and residual are added in fp32.
// Limits   any K, C; R up to the step's. One thread reads and writes an element of the residual.
// Source   openai/gpt-2, src/model.py, block.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/stage.cuh"

namespace gpt2f::cuda {

void linear_residual(const LinearResidualArgs& args, const Lane& lane) {
  const ProductRows rows{.operand = args.x,
                         .stride = args.x_stride,
                         .width = static_cast<int32_t>(args.linear.inputs),
                         .rows = static_cast<int32_t>(args.rows)};
  const ResidualEpilogue epilogue{args.linear.bias, args.residual, args.stride};
  with_weights(args.precision, [&]<Precision W>() {
    run_product<W>("linear_residual", args.linear, rows, epilogue, lane.stream);
  });
}

}  // namespace gpt2f::cuda

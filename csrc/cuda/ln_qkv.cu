// ln_qkv: query, key and value of new rows, layer norm first; K and V go to their pages.
//
// Maths    (q, k, v)[r] = layernorm(residual[r]) W + b; q to the query rows, k and v to position
//          positions[r] of blocks[r].
// Shapes   residual (R, C), W (C, 3 C), query (R, H, Dp), pages as in cuda/layout.h.
// Work     stage.cuh; 3 C / 16 blocks of up to 16 warps at decode.
// Bytes    packed_bytes(C, 3 C) + 12 C (bias) + 8 C (norm) + 4 C R (residual)
//          + 2 R (C + 2 C) (query, keys and values) + 12 R (positions, blocks).
//          At 3.35 TB/s and one row, bf16: 124M 3.5 MB, 1.1 us a layer; 1.5B 15.4 MB, 4.6 us.
// Numerics products and sums of cuda/layout.h, bias added to the sum, one rounding to T.
// Limits   any C, H; R up to the step's. Pages of two rows may share words, never bytes.
// Source   openai/gpt-2, src/model.py, attn; Ba et al. 2016, arXiv:1607.06450, eq. 3-4.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/stage.cuh"

namespace gpt2f::cuda {

void ln_qkv(const LnQkvArgs& args, const Lane& lane) {
  const ProductRows rows{.residual = args.residual,
                         .stride = args.stride,
                         .norm = args.norm,
                         .width = static_cast<int32_t>(args.linear.inputs),
                         .rows = static_cast<int32_t>(args.rows)};
  with_weights(args.precision, [&]<Precision W>() {
    run_normed_product<W>("ln_qkv", args.linear, rows, args.normed, qkv_epilogue<Operand<W>>(args),
                          lane.stream);
  });
}

}  // namespace gpt2f::cuda

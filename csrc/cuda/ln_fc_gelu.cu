// ln_fc_gelu: the first half of a layer's feed-forward part.
//
// Maths    out[r] = gelu(layernorm(residual[r]) W + b), gelu in the tanh form.
// Shapes   residual (R, C), W (C, I), out (R, I).
// Work     stage.cuh; I / 16 blocks of up to 16 warps at decode.
// Bytes    packed_bytes(C, I) + 4 I (bias) + 8 C (norm) + 4 C R (residual) + 2 I R (out).
//          At 3.35 TB/s and one row, bf16: 124M 4.7 MB, 1.4 us a layer; 1.5B 20.5 MB, 6.1 us.
// Numerics products and sums of cuda/layout.h, bias added to the sum, gelu in fp32, one rounding.
// Limits   any C, I; R up to the step's. Nothing behind column I of a row is written.
// Source   openai/gpt-2, src/model.py, mlp; Hendrycks and Gimpel 2016, arXiv:1606.08415, sec. 2.
#include "cuda/epilogue.cuh"
#include "cuda/kernels.h"
#include "cuda/stage.cuh"

namespace gpt2f::cuda {

void ln_fc_gelu(const LnFcGeluArgs& args, const Lane& lane) {
  const ProductRows rows{.residual = args.residual,
                         .stride = args.stride,
                         .norm = args.norm,
                         .width = static_cast<int32_t>(args.linear.inputs),
                         .rows = static_cast<int32_t>(args.rows)};
  with_weights(args.precision, [&]<Precision W>() {
    const GeluEpilogue<Operand<W>> epilogue{args.linear.bias, static_cast<uint16_t*>(args.out),
                                            args.out_stride};
    run_normed_product<W>("ln_fc_gelu", args.linear, rows, args.normed, epilogue, lane.stream);
  });
}

}  // namespace gpt2f::cuda

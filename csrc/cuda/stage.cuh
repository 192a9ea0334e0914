// Which kernel computes a stage's product, by the number of rows. The choice never shows in the
// bits: all of them add in the order of cuda/layout.h and share normalize_row and the epilogues.
//
//   rows      kernel
//   1 ... 8   product.cuh, one tile of tokens; normalises its rows itself where shared memory holds
//             them (8 rows of 1600, 1 of 5000), else layernorm_rows goes before
//   9 ... 32  product.cuh, four tiles of tokens
//   more      gemm.cuh; also where one block's sums would not fit (K > 8192 and 9 rows or more,
//             K > 32768)
#pragma once

#include "cuda/gemm.cuh"
#include "cuda/product.cuh"

namespace gpt2f::cuda {

template <int NT>
Product product_of(const Matrix& matrix, const ProductRows& rows) {
  return {matrix, rows, product_tiles<NT>(matrix)};
}

// Rows of the operand: `rows.operand` with `rows.stride`.
template <Precision W, typename Epilogue>
void run_product(const char* name, const PackedLinear& linear, const ProductRows& rows,
                 const Epilogue& epilogue, void* stream) {
  const Matrix matrix = matrix_of(W, linear);
  const Product one = product_of<1>(matrix, rows), four = product_of<4>(matrix, rows);
  if (rows.rows <= kTileTokens && ProductShared(one, 1, false).bytes <= kProductShared) {
    launch_product<W, 1, false>(name, one, epilogue, stream);
  } else if (rows.rows <= 4 * kTileTokens &&
             ProductShared(four, 4, false).bytes <= kProductShared) {
    launch_product<W, 4, false>(name, four, epilogue, stream);
  } else {
    gemm<W>(name, linear, rows.operand, rows.stride, rows.rows, epilogue, stream);
  }
}

// Rows of the residual, layer norm first. `normed` has room for them, with the same stride.
template <Precision W, typename Epilogue>
void run_normed_product(const char* name, const PackedLinear& linear, const ProductRows& rows,
                        void* normed, const Epilogue& epilogue, void* stream) {
  const Product one = product_of<1>(matrix_of(W, linear), rows);
  if (rows.rows <= kTileTokens && ProductShared(one, 1, true).bytes <= kProductShared) {
    launch_product<W, 1, true>(name, one, epilogue, stream);
    return;
  }
  layernorm_rows(rows.residual, rows.stride, rows.asked, rows.norm, normed, rows.stride, rows.rows,
                 linear.inputs, W, stream);
  ProductRows operand = rows;
  operand.operand = normed;
  run_product<W>(name, linear, operand, epilogue, stream);
}

// run.template operator()<W>() with the precision as a constant.
template <typename Run>
void with_weights(Precision precision, const Run& run) {
  switch (precision) {
    case Precision::kBf16:
      return run.template operator()<Precision::kBf16>();
    case Precision::kFp16:
      return run.template operator()<Precision::kFp16>();
    case Precision::kInt8:
      return run.template operator()<Precision::kInt8>();
    case Precision::kInt4:
      return run.template operator()<Precision::kInt4>();
    case Precision::kFp32:
      break;
  }
  throw Error(ErrorKind::kParameter, "CUDA kernels have no fp32 weights");
}

}  // namespace gpt2f::cuda

// linear: the product as a single operation on plain tensors.
//
// Maths    out = epilogue(x W^T + bias): gelu if asked, then + residual.
// Shapes   x (rows, K), W (N, K), bias (N), residual and out (rows, N), contiguous; x, W, residual
//          and out bfloat16 or float16, bias float.
// Work     gemm.cuh on the weights as they lie: its tiles are 16-byte units of their rows. Where
//          rows are not made of whole units (K % 8, a view that begins in between), both sides are
//          first copied to rows of round_up(K, 64) elements.
// Bytes    2 (rows K + N K + rows N), with residual 2 rows N more; 2 rows N K flops. 1023 rows of
//          768 to 3072: 12.6 MB, 4 us at 3.35 TB/s; 4.8 GFLOP. A copy reads and writes its side
//          once more. Few rows are slower than in the engine: N / 64 blocks read the weights.
// Numerics the sums of cuda/layout.h; bias, gelu and residual in fp32, one rounding at the end.
// Limits   any rows, K, N >= 1; W is used as it is, so this op has the engine's bits.
// Source   Hendrycks and Gimpel 2016, arXiv:1606.08415, sec. 2 (gelu in its tanh form).
#include "cuda/gemm.cuh"
#include "cuda/kernels.h"

namespace gpt2f::cuda {
namespace {

template <typename T>
struct LinearEpilogue {
  struct Inputs {
    float bias;
    float residual;
  };
  const float* bias;         // or null
  const uint16_t* residual;  // or null
  uint16_t* out;
  int64_t outputs;
  bool with_gelu;

  DEVICE Inputs load(int64_t row, int64_t output) const {
    return {bias == nullptr ? 0.0f : bias[output],
            residual == nullptr ? 0.0f : to_float<T>(residual[row * outputs + output])};
  }
  DEVICE void store(int64_t row, int64_t output, float sum, const Inputs& inputs) const {
    float value = sum + inputs.bias;
    if (with_gelu) value = gelu(value);
    if (residual != nullptr) value = inputs.residual + value;
    out[row * outputs + output] = from_float<T>(value);
  }
};

constexpr int kPadThreads = 256;

// to[row][0 ... stride - 1] = from[row][0 ... width - 1], zeros.
KERNEL LAUNCH_BOUNDS(kPadThreads, 1)
    pad_kernel(uint16_t* to, const uint16_t* from, int64_t width, int64_t stride, int64_t count) {
  wait_for_previous();
  allow_next();
  const int64_t at = int64_t{blockIdx.x} * kPadThreads + threadIdx.x;
  if (at >= count) return;
  const int64_t row = at / stride, column = at % stride;
  to[at] = column < width ? from[row * width + column] : uint16_t{0};
}

void pad(void* to, const void* from, int64_t rows, int64_t width, int64_t stride, void* stream) {
  const int64_t count = rows * stride;
  launch("linear_pad", pad_kernel, Grid{(count + kPadThreads - 1) / kPadThreads}, kPadThreads, 0,
         stream, static_cast<uint16_t*>(to), static_cast<const uint16_t*>(from), width, stride,
         count);
}

bool whole_units(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <Precision W>
void linear_of(const LinearArgs& args, void* stream) {
  const void* x = args.x;
  const void* weight = args.weight;
  int64_t stride = args.inputs;
  if (stride % 8 != 0 || !whole_units(x) || !whole_units(weight)) {
    stride = padded_inputs(args.inputs);
    pad(args.operand, x, args.rows, args.inputs, stride, stream);
    pad(args.packed, weight, args.outputs, args.inputs, stride, stream);
    x = args.operand;
    weight = args.packed;
  }
  const RowMajorWeights<W> weights{static_cast<const uint16_t*>(weight), stride, args.outputs,
                                   stride};
  const LinearEpilogue<Operand<W>> epilogue{args.bias, static_cast<const uint16_t*>(args.residual),
                                            static_cast<uint16_t*>(args.out), args.outputs,
                                            args.gelu};
  gemm_on("linear", weights, gemm_rows(x, stride, args.rows, stride, args.outputs), epilogue,
          stream);
}

}  // namespace

void linear(const LinearArgs& args, const Lane& lane) {
  if (args.type == DType::kBF16) {
    linear_of<Precision::kBf16>(args, lane.stream);
  } else {
    linear_of<Precision::kFp16>(args, lane.stream);
  }
}

}  // namespace gpt2f::cuda

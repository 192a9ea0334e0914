// gelu: out = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), the tanh form, over `count`
// values.
//
// Shapes   x, out: count values of one type, contiguous, at any address; out may be x.
// Work     a thread takes 16 bytes (4 or 8 values), or one value where the two arrays are not
//          aligned to 16 bytes; the thread behind the last whole vector takes what is left.
// Traffic  2 e count bytes for values of e bytes: 1024 rows of 6400 as bfloat16 26 MB, 7.8 us at
//          3.35 TB/s. Above that: two divisions' worth of instructions a value (device.cuh, gelu).
// Numerics in float, rounded once. Minus infinity gives NaN, as the formula does.
// Limits   any count.
// Source   Hendrycks & Gimpel 2016, arXiv:1606.08415, section 2; openai/gpt-2, src/model.py.
#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

constexpr int kThreads = 256;

// How a type lies in memory: one value, and the values of a 32-bit word.
struct Float {
  using Stored = float;
  DEVICE static float one(float x) { return gelu(x); }
  DEVICE static uint32_t word(uint32_t x) {
    float value;
    __builtin_memcpy(&value, &x, 4);
    value = gelu(value);
    __builtin_memcpy(&x, &value, 4);
    return x;
  }
};
template <typename T>
struct Half {
  using Stored = uint16_t;
  DEVICE static uint16_t one(uint16_t x) { return from_float<T>(gelu(to_float<T>(x))); }
  DEVICE static uint32_t word(uint32_t x) {
    const float2 pair = unpack2<T>(x);
    return pack2<T>(gelu(pair.x), gelu(pair.y));
  }
};

template <typename E, bool kVectors>
KERNEL LAUNCH_BOUNDS(kThreads, 1)
    gelu_kernel(const typename E::Stored* x, typename E::Stored* out, int64_t count) {
  constexpr int kEach = kVectors ? 16 / sizeof(typename E::Stored) : 1;
  wait_for_previous();
  allow_next();
  const int64_t begin = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kEach;
  if (kVectors && begin + kEach <= count) {
    const uint4 in = load16(x + begin);
    store16(out + begin, uint4{E::word(in.x), E::word(in.y), E::word(in.z), E::word(in.w)});
  } else {
    for (int64_t i = begin; i < begin + kEach && i < count; ++i) out[i] = E::one(x[i]);
  }
}

template <typename E>
void launch_gelu(const GeluArgs& args, void* stream) {
  using Stored = typename E::Stored;
  const bool vectors = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  const int64_t block = kThreads * (vectors ? 16 / static_cast<int64_t>(sizeof(Stored)) : 1);
  launch("gelu", vectors ? gelu_kernel<E, true> : gelu_kernel<E, false>,
         Grid{(args.count + block - 1) / block}, kThreads, 0, stream,
         static_cast<const Stored*>(args.x), static_cast<Stored*>(args.out), args.count);
}

}  // namespace

void op_gelu(const GeluArgs& args, const Lane& lane) {
  if (args.count == 0) return;
  switch (args.type) {
    case DType::kF32:
      return launch_gelu<Float>(args, lane.stream);
    case DType::kBF16:
      return launch_gelu<Half<Bf16>>(args, lane.stream);
    case DType::kF16:
      return launch_gelu<Half<Fp16>>(args, lane.stream);
  }
}

}  // namespace gpt2f::cuda

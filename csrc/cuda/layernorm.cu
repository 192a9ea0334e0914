// layernorm: out = (x - mean) / sqrt(variance + eps) * weight + bias over each row of C values;
// with delta first x = x + delta, rounded to the type of x, and the norm of the rounded sum.
//
// Shapes   x, delta, out (rows, C), contiguous, at any address; weight, bias (C) float.
//          layernorm_rows: residual (rows, stride) float to operand rows (rows, out_stride).
// Work     one warp a row, four rows a block; norm.cuh has the maths, its order and its numerics.
// Traffic  layernorm_rows: 4 C + 2 out_stride bytes a row + 8 C once. layernorm: 2 e C a row for
//          elements of e bytes + 8 C once, with delta 4 e C a row + 8 C. 1024 rows of C = 1600 as
//          float: 13.1 MB, 3.9 us at 3.35 TB/s.
// Limits   C below 2^31 - 128. Any row count.
// Source   see norm.cuh.
#include "core/error.h"
#include "cuda/kernels.h"
#include "cuda/launch.h"
#include "cuda/norm.cuh"

namespace gpt2f::cuda {
namespace {

constexpr int kWarps = 4;

template <typename T>
KERNEL LAUNCH_BOUNDS(32 * kWarps, 1)
    layernorm_rows_kernel(const float* residual, int64_t stride, const int32_t* asked,
                          LayernormParameters norm, uint16_t* out, int64_t out_stride, int64_t rows,
                          int width) {
  wait_for_previous();
  allow_next();
  const int64_t r = int64_t{blockIdx.x} * kWarps + warp_id();
  if (r >= rows) return;
  const int64_t from = asked == nullptr ? r : asked[r];
  uint16_t* const to = out + r * out_stride;
  normalize_row<T>(residual + from * stride, norm, width, static_cast<int>(out_stride),
                   [to](int column, uint2 four) { *reinterpret_cast<uint2*>(to + column) = four; });
}

// How a type lies in memory.
struct Float {
  using Stored = float;
  DEVICE static float widen(float x) { return x; }
  DEVICE static float narrow(float x) { return x; }
  DEVICE static Four load4(const float* at) { return floats_at(at, 0, 4, true); }
  DEVICE static void store4(float* at, const Four& v) {
    uint4 bits;
    __builtin_memcpy(&bits, &v, sizeof bits);
    store16(at, bits);
  }
};
template <typename T>
struct Half {
  using Stored = uint16_t;
  DEVICE static float widen(uint16_t x) { return to_float<T>(x); }
  DEVICE static uint16_t narrow(float x) { return from_float<T>(x); }
  DEVICE static Four load4(const uint16_t* at) {
    const uint2 bits = *reinterpret_cast<const uint2*>(at);
    const float2 low = unpack2<T>(bits.x), high = unpack2<T>(bits.y);
    return {low.x, low.y, high.x, high.y};
  }
  DEVICE static void store4(uint16_t* at, const Four& v) {
    *reinterpret_cast<uint2*>(at) = uint2{pack2<T>(v.x, v.y), pack2<T>(v.z, v.w)};
  }
};

// A row of a plain tensor. kVectors: every row starts where vectors of four elements may.
template <typename E, bool kVectors>
struct PlainRow {
  typename E::Stored* x;
  const typename E::Stored* delta;
  const float* weights;
  const float* biases;
  typename E::Stored* out;

  DEVICE static Four load(const typename E::Stored* row, int v, int count) {
    const typename E::Stored* const at = row + int64_t{4} * v;
    if (kVectors && count == 4) return E::load4(at);
    return {E::widen(at[0]), count > 1 ? E::widen(at[1]) : 0.0f, count > 2 ? E::widen(at[2]) : 0.0f,
            count > 3 ? E::widen(at[3]) : 0.0f};
  }
  DEVICE static void store(typename E::Stored* row, int v, const Four& y, int count) {
    typename E::Stored* const at = row + int64_t{4} * v;
    if (kVectors && count == 4) return E::store4(at, y);
    at[0] = E::narrow(y.x);
    if (count > 1) at[1] = E::narrow(y.y);
    if (count > 2) at[2] = E::narrow(y.z);
    if (count > 3) at[3] = E::narrow(y.w);
  }
  DEVICE Four first(int v, int count) const {
    const Four a = load(x, v, count);
    if (delta == nullptr) return a;
    const Four b = load(delta, v, count);
    const Four h{a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
    store(x, v, h, count);
    return {E::widen(E::narrow(h.x)), E::widen(E::narrow(h.y)), E::widen(E::narrow(h.z)),
            E::widen(E::narrow(h.w))};
  }
  DEVICE Four again(int v, int count) const { return load(x, v, count); }
  DEVICE Four weight(int v, int count) const { return floats_at(weights, v, count, kVectors); }
  DEVICE Four bias(int v, int count) const { return floats_at(biases, v, count, kVectors); }
  DEVICE void put(int v, const Four& y, int count) const { store(out, v, y, count); }
};

template <typename E, bool kVectors>
KERNEL LAUNCH_BOUNDS(32 * kWarps, 1)
    layernorm_kernel(typename E::Stored* x, const typename E::Stored* delta,
                     LayernormParameters norm, typename E::Stored* out, int64_t rows, int width) {
  wait_for_previous();
  allow_next();
  const int64_t r = int64_t{blockIdx.x} * kWarps + warp_id();
  if (r >= rows) return;
  const int64_t at = r * width;
  const PlainRow<E, kVectors> row{x + at, delta == nullptr ? nullptr : delta + at, norm.weight,
                                  norm.bias, out + at};
  normalize<16>(row, norm.eps, width);
}

template <typename E>
void launch_layernorm(const LayernormArgs& args, void* stream) {
  using Stored = typename E::Stored;
  const auto aligned = [](const void* pointer, uintptr_t unit) {
    return reinterpret_cast<uintptr_t>(pointer) % unit == 0;
  };
  constexpr uintptr_t kUnit = 4 * sizeof(Stored);
  const bool vectors = args.width % 4 == 0 && aligned(args.x, kUnit) &&
                       aligned(args.delta, kUnit) && aligned(args.out, kUnit) &&
                       aligned(args.norm.weight, 16) && aligned(args.norm.bias, 16);
  launch("layernorm", vectors ? layernorm_kernel<E, true> : layernorm_kernel<E, false>,
         Grid{(args.rows + kWarps - 1) / kWarps}, 32 * kWarps, 0, stream,
         static_cast<Stored*>(args.x), static_cast<const Stored*>(args.delta), args.norm,
         static_cast<Stored*>(args.out), args.rows, static_cast<int>(args.width));
}

}  // namespace

void layernorm_rows(const float* residual, int64_t stride, const int32_t* asked,
                    const LayernormParameters& norm, void* out, int64_t out_stride, int64_t rows,
                    int64_t width, Precision precision, void* stream) {
  if (rows == 0) return;
  launch("layernorm_rows",
         precision == Precision::kBf16 ? layernorm_rows_kernel<Bf16> : layernorm_rows_kernel<Fp16>,
         Grid{(rows + kWarps - 1) / kWarps}, 32 * kWarps, 0, stream, residual, stride, asked, norm,
         static_cast<uint16_t*>(out), out_stride, rows, static_cast<int>(width));
}

void op_layernorm(const LayernormArgs& args, const Lane& lane) {
  check(args.width < INT32_MAX - 128, ErrorKind::kParameter, "layernorm: rows of ", args.width,
        " values; at most ", INT32_MAX - 129, " on CUDA");
  if (args.rows == 0) return;
  switch (args.type) {
    case DType::kF32:
      return launch_layernorm<Float>(args, lane.stream);
    case DType::kBF16:
      return launch_layernorm<Half<Bf16>>(args, lane.stream);
    case DType::kF16:
      return launch_layernorm<Half<Fp16>>(args, lane.stream);
  }
}

}  // namespace gpt2f::cuda

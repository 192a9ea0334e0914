// Layer norm of one row by one warp: the one piece of code behind every layer norm on CUDA, so that
// a row has the same bits whichever kernel normalises it.
//
// Maths    y = (x - mean) / sqrt(variance + eps) * weight + bias over the C values of a row.
// Order    lane l takes the vectors of four elements at 4 (l + 32 i), i in order, each as
//          (x + y) + (z + w); then warp_sum.
// Numerics corrected two-pass variance: pass one gives a first mean, pass two sums d = x - mean and
//          d^2, and what rounding took from the mean comes off again: d is exact where
//          |mean| >> spread. Every fused multiply-add is written out, so nvcc has none to choose.
// Latency  the loads of the first kHeld vectors of a lane (2048 columns) are in flight together and
//          stay in registers for the other passes; wider rows read the rest again, from L1.
// Limits   C >= 1, below 2^31 - 128.
// Source   Ba et al. 2016, arXiv:1607.06450, eq. 3-4; Chan, Golub, LeVeque 1983 for the correction.
#pragma once

#include "core/kernels.h"
#include "cuda/device.cuh"

namespace gpt2f::cuda {

// Normalises rows [0, rows) of `residual`, or the `asked` ones, into rows of `out`: bfloat16 for
// kBf16, float16 otherwise, zeros between `width` and `out_stride`. Enqueued on `stream`.
void layernorm_rows(const float* residual, int64_t stride, const int32_t* asked,
                    const LayernormParameters& norm, void* out, int64_t out_stride, int64_t rows,
                    int64_t width, Precision precision, void* stream);

struct Four {
  float x, y, z, w;
};

DEVICE float total(const Four& v) { return (v.x + v.y) + (v.z + v.w); }

// d = v - mean in its first `count` elements, zeros behind, and the sums that go with it.
DEVICE Four centred(const Four& v, float mean, int count, float& sum, float& squares) {
  const Four d{v.x - mean, count > 1 ? v.y - mean : 0.0f, count > 2 ? v.z - mean : 0.0f,
               count > 3 ? v.w - mean : 0.0f};
  sum += total(d);
  squares += fma(d.x, d.x, d.y * d.y) + fma(d.z, d.z, d.w * d.w);
  return d;
}

DEVICE Four scaled(const Four& d, float shift, float rstd, const Four& weight, const Four& bias) {
  return {fma((d.x - shift) * rstd, weight.x, bias.x), fma((d.y - shift) * rstd, weight.y, bias.y),
          fma((d.z - shift) * rstd, weight.z, bias.z), fma((d.w - shift) * rstd, weight.w, bias.w)};
}

// Elements 4 v ... 4 v + count - 1, zeros behind. Reads nothing else.
DEVICE Four floats_at(const float* row, int v, int count, bool aligned) {
  const float* const at = row + int64_t{4} * v;
  Four out{};
  if (aligned && count == 4) {
    const uint4 bits = load16(at);
    __builtin_memcpy(&out, &bits, sizeof out);
    return out;
  }
  out.x = at[0];
  if (count > 1) out.y = at[1];
  if (count > 2) out.z = at[2];
  if (count > 3) out.w = at[3];
  return out;
}

// A Row gives vector v, of which `count` elements exist, as
//   Four first(v, count), Four again(v, count)   in pass one; in later passes
//   Four weight(v, count), Four bias(v, count)
// and takes the result by put(v, Four, count). All 32 lanes of a warp call this together.
template <int kHeld, typename Row>
DEVICE void normalize(const Row& row, float eps, int width) {
  const int full = width / 4, rest = width % 4, lane = lane_id();
  const bool last_is_mine = rest != 0 && lane == full % 32;
  const float inverse = 1.0f / static_cast<float>(width);
  Four held[kHeld], last{};
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = lane + 32 * i < full ? row.first(lane + 32 * i, 4) : Four{};
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += total(held[i]);
  for (int v = lane + 32 * kHeld; v < full; v += 32) sum += total(row.first(v, 4));
  if (last_is_mine) {
    last = row.first(full, rest);
    sum += total(last);
  }
  const float guess = warp_sum(sum) * inverse;

  float sum_d = 0.0f, sum_dd = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (lane + 32 * i < full) held[i] = centred(held[i], guess, 4, sum_d, sum_dd);
  }
  for (int v = lane + 32 * kHeld; v < full; v += 32) {
    centred(row.again(v, 4), guess, 4, sum_d, sum_dd);
  }
  if (last_is_mine) last = centred(last, guess, rest, sum_d, sum_dd);
  const float shift = warp_sum(sum_d) * inverse;
  const float spread = fma(-shift, shift, warp_sum(sum_dd) * inverse);
  const float rstd = rsqrt_accurate((spread < 0.0f ? 0.0f : spread) + eps);  // NaN stays NaN

#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int v = lane + 32 * i;
    if (v < full) row.put(v, scaled(held[i], shift, rstd, row.weight(v, 4), row.bias(v, 4)), 4);
  }
  for (int v = lane + 32 * kHeld; v < full; v += 32) {
    float unused = 0.0f;
    const Four d = centred(row.again(v, 4), guess, 4, unused, unused);
    row.put(v, scaled(d, shift, rstd, row.weight(v, 4), row.bias(v, 4)), 4);
  }
  if (last_is_mine) {
    row.put(full, scaled(last, shift, rstd, row.weight(full, rest), row.bias(full, rest)), rest);
  }
}

// A row of the residual as a row of an operand.
template <typename T, typename Store>
struct OperandRow {
  const float* residual;
  const float* weights;
  const float* biases;
  const Store& store;

  DEVICE Four first(int v, int count) const { return floats_at(residual, v, count, true); }
  DEVICE Four again(int v, int count) const { return floats_at(residual, v, count, true); }
  DEVICE Four weight(int v, int count) const { return floats_at(weights, v, count, true); }
  DEVICE Four bias(int v, int count) const { return floats_at(biases, v, count, true); }
  DEVICE void put(int v, const Four& y, int count) const {
    const float second = count > 1 ? y.y : 0.0f, third = count > 2 ? y.z : 0.0f;
    store(4 * v, uint2{pack2<T>(y.x, second), pack2<T>(third, count > 3 ? y.w : 0.0f)});
  }
};

// One row of the residual (16-byte aligned, like the parameters, which may also lie in shared
// memory) as T: store(column, uint2) takes the four elements column ... column + 3, for every
// multiple of 4 below `padded`; zeros behind `width`. `padded` is a multiple of 4 and at least
// `width`. All 32 lanes of a warp call this together; no lane waits for another's stores.
template <typename T, int kHeld = 16, typename Store>
DEVICE void normalize_row(const float* row, const LayernormParameters& norm, int width, int padded,
                          const Store& store) {
  normalize<kHeld>(OperandRow<T, Store>{row, norm.weight, norm.bias, store}, norm.eps, width);
  for (int c = (width + 3) / 4 * 4 + 4 * lane_id(); c < padded; c += 128) store(c, uint2{0, 0});
}

}  // namespace gpt2f::cuda

// layernorm: out = (x - mean) / sqrt(variance + eps) * weight + bias over each row of C values.
//
// Work     rows are split over the lanes.
// Traffic  8 R C bytes (fp32); a row (6.4 KB at C = 1600) is in L1 for passes two and three.
// Numerics sixteen partial sums joined by one fixed tree; corrected two-pass variance: the second
//          pass also measures what rounding took from the mean, which matters once |mean| >>
//          spread.
// Source   Ba et al. 2016, arXiv:1607.06450, eq. 3-4; Chan, Golub, LeVeque 1983 for the correction.
#pragma once

namespace {

// sink(c, 16 values) for c = 0, 16 ...; reads exactly `width` floats of each input, and what lies
// behind comes as zeros.
template <typename Sink>
void layernorm_row(const float* x, const gpt2f::LayernormParameters& norm, int64_t width,
                   const Sink& sink) {
  F sum = fset(0.0f);
  for (int64_t c = 0; c < width; c += 16) sum = fadd(sum, load16(x + c, width - c));
  const float count = static_cast<float>(width);
  const float guess = fsum(sum) / count;

  F sum_d = fset(0.0f), sum_dd = fset(0.0f);
  for (int64_t c = 0; c < width; c += 16) {
    const F centre = fselect(first_clamped(width - c), fset(guess), fset(0.0f));
    const F d = fsub(load16(x + c, width - c), centre);
    sum_d = fadd(sum_d, d);
    sum_dd = ffma(d, d, sum_dd);
  }
  const float shift = fsum(sum_d) / count;
  const float mean = guess + shift;
  float variance = fsum(sum_dd) / count - shift * shift;
  if (variance < 0.0f) variance = 0.0f;
  const float rstd = 1.0f / __builtin_sqrtf(variance + norm.eps);

  for (int64_t c = 0; c < width; c += 16) {
    const int64_t n = width - c;
    const F xhat = fmul(fsub(load16(x + c, n), fset(mean)), fset(rstd));
    const F y = ffma(xhat, load16(norm.weight + c, n), load16(norm.bias + c, n));
    sink(c, fselect(first_clamped(n), y, fset(0.0f)));
  }
}

// Rows `asked` (or all, when null) of the residual as a product takes them; `out` is for kRowBlock.
template <Precision P>
Operand layernorm_rows(const float* residual, int64_t stride, const int32_t* asked,
                       const gpt2f::LayernormParameters& norm, void* out, int64_t rows,
                       int64_t width, const Lane& lane) {
  const int64_t row =
      Steps<P>::kQuantized ? quantized_row_words(P, width) : stride / gpt2f::word_elements(P);
  const Preparation todo(rows, lane);
  uint32_t* const to = static_cast<uint32_t*>(out) + todo.first * row;
  // They come while the first row is summed up.
  ask_for(norm.weight, width);
  ask_for(norm.bias, width);
  for (int64_t r = todo.mine.begin; r < todo.mine.end; ++r) {
    const float* const from = residual + (asked == nullptr ? r : asked[r]) * stride;
    if constexpr (Steps<P>::kQuantized) {
      GroupWriter<P> writer(to + r * row);
      layernorm_row(from, norm, width, [&](int64_t, F y) { writer.put(y); });
      writer.finish(width);
    } else {
      Element<P>* const elements = at<P>(to + r * row, 0);
      layernorm_row(from, norm, width, [&](int64_t c, F y) { store16(elements + c, y); });
    }
  }
  todo.meet(lane);
  return {to, row};
}

}  // namespace

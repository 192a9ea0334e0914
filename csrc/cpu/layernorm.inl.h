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

// Reads exactly `width` floats of each input. Full lanes are stored when `padded`, so that the
// elements between width and the row's stride become zero.
template <typename Out>
void layernorm_row(const float* x, const gpt2f::LayernormParameters& norm, Out* out, int64_t width,
                   bool padded) {
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
    if (padded) {
      store16(out + c, fselect(first_clamped(n), y, fset(0.0f)));
    } else {
      store16(out + c, y, n);
    }
  }
}

// Rows `asked` (or all, when null) of the residual as operand rows, and where they are. For a few
// rows every lane makes its own copy, which is quicker than waiting for each other; `out` holds
// kRowBlock rows. Otherwise rows are split and the lanes meet.
template <Precision P>
const void* layernorm_rows(const float* residual, int64_t stride, const int32_t* asked,
                           const gpt2f::LayernormParameters& norm, void* out, int64_t rows,
                           int64_t width, const Lane& lane) {
  const bool own = rows <= 4 && rows * lane.size <= gpt2f::kRowBlock;
  Element<P>* const to = at<P>(out, own ? lane.rank * rows * stride : 0);
  const Range mine = own ? Range{0, rows} : share(rows, 1, lane);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const int64_t from = asked == nullptr ? r : asked[r];
    layernorm_row(residual + from * stride, norm, to + r * stride, width, true);
  }
  if (!own) lane.sync();
  return to;
}

}  // namespace

// The largest relative errors of fexp, and of fexp2_short as bfloat16 has e^x from it, over all
// that is a normal float: "NAME ERROR" lines. Every instruction set has these bits (isa_bits.cc).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "core/fp_state.h"
#include "core/kernels.h"
#include "core/numbers.h"
#include "cpu/simd_scalar.h"
#include "cpu/vmath.inl.h"

int main() {
  const gpt2f::FpState state;
  double exact = 0, quick = 0;
  for (float x = -87.33f; x < 88.72f; x += 4e-4f) {
    const double truth = std::exp(static_cast<double>(x));
    F power[1] = {fmul(fset(x), fset(1.44269504088896341f))};
    fexp2_short(power);
    exact = std::max(exact, std::fabs(fexp(fset(x)).v[0] / truth - 1));
    quick = std::max(quick, std::fabs(power[0].v[0] / truth - 1));
  }
  std::printf("fexp %g\nfexp2_short %g\n", exact, quick);
}

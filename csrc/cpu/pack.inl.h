// pack: a stored matrix, in any of the stored types and either orientation, into panels.
//
// Work     panels are split over the lanes.
// Traffic  the source once, the packed matrix once. Sixteen outputs of one k are read together when
//          they are neighbours ([in, out]); [out, in] sources go through a 16 x 16 square in L1.
// Numerics float16 and bfloat16 widen exactly; bf16 words are rounded to nearest even.
#pragma once

namespace {

inline void note_bad(std::atomic<int64_t>* bad, int64_t index) {
  int64_t known = bad->load(std::memory_order_relaxed);
  while (index < known && !bad->compare_exchange_weak(known, index, std::memory_order_relaxed)) {
  }
}

// square[k][n] = source(k0 + k, n0 + n) for 16 x 16 elements, zeros outside.
inline void read_square(const gpt2f::PackArgs& a, int64_t k0, int64_t n0, float square[16][16]) {
  const int64_t ks = a.linear.inputs - k0, ns = a.linear.outputs - n0;
  for (int64_t i = 0; i < 16; ++i) {
    for (int64_t j = 0; j < 16; ++j) {
      // The inner index runs along the source's contiguous axis.
      const int64_t k = a.n_stride == 1 ? i : j, n = a.n_stride == 1 ? j : i;
      float value = 0.0f;
      if (k < ks && n < ns) {
        const int64_t index = (k0 + k) * a.k_stride + (n0 + n) * a.n_stride;
        value = gpt2f::widen(a.source, a.source_type, index);
        uint32_t word;
        __builtin_memcpy(&word, &value, sizeof word);
        if ((word & 0x7F800000u) == 0x7F800000u) note_bad(a.bad, index);
      }
      square[k][n] = value;
    }
  }
}

template <Precision P>
void pack_of(const gpt2f::PackArgs& a, const Lane& lane) {
  constexpr int64_t kGroup = gpt2f::kGroupPanels;
  const int64_t steps = gpt2f::words(P, a.linear.inputs), panels = a.linear.panels();
  const Range mine = share(panels, panel_unit(panels, lane), lane);
  alignas(64) float square[16][16];
  for (int64_t panel = mine.begin; panel < mine.end; ++panel) {
    const int64_t group = panel / kGroup * kGroup;
    const int64_t w_step = (panels - group < kGroup ? panels - group : kGroup) * kLanes;
    uint32_t* const to = a.linear.words + group * kLanes * steps + (panel - group) * kLanes;
    for (int64_t k0 = 0; k0 < a.linear.inputs; k0 += 16) {
      read_square(a, k0, panel * kLanes, square);
      const int64_t left = steps - k0 / gpt2f::word_elements(P);
      const int64_t here = 16 / gpt2f::word_elements(P);
      for (int64_t s = 0; s < (left < here ? left : here); ++s) {
        uint32_t* const words = to + (k0 / gpt2f::word_elements(P) + s) * w_step;
        if constexpr (P == kFp32) {
          ustore(words, as_u(fload(square[s])));
        } else {
          const U even = bf16_round(fload(square[2 * s]));
          const U odd = bf16_round(fload(square[2 * s + 1]));
          ustore(words, uor(ushr<16>(even), uand(odd, uset(0xFFFF0000u))));
        }
      }
    }
  }
}

inline void pack(const gpt2f::PackArgs& a, const Lane& lane) {
  if (a.precision == kInt8 || a.precision == kInt4) return gpt2f::pack_quantized(a, lane);
  a.precision == kFp32 ? pack_of<kFp32>(a, lane) : pack_of<kBf16>(a, lane);
}

}  // namespace

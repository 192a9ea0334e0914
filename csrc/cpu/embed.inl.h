// embed: residual[r] = wte[token] + wpe[position].
//
// Layout   a tied wte exists only as the packed head: output v of panel v / 16, one word (int8 and
//          int4: one group) per step. Quantised rows are what the head multiplies with.
// Work     rows are split over the lanes.
// Traffic  at decode C / (elements per word) cache lines of the packed table: 384 for GPT-2 small
//          in bf16, about 5 us. Keeping a second copy of wte would cost 77 MB instead.
#pragma once

namespace {

// Elements c ... c + 15 of an output of the packed head, zeros behind the last.
template <Precision P>
inline F packed_row(const gpt2f::PackedLinear& table, int64_t token, int64_t c) {
  using S = Steps<P>;
  constexpr int64_t kGroup = gpt2f::kGroupPanels;
  const int64_t steps = S::count(table.inputs), panels = table.panels();
  const int64_t panel = token / kLanes, group = panel / kGroup * kGroup;
  const int64_t beside = panels - group < kGroup ? panels - group : kGroup;
  const uint32_t* const from = table.words + group * S::kPanelWords * steps;
  if constexpr (S::kQuantized) {
    return packed_weights<P>(from + c / S::kGroup * beside * S::kPanelWords, beside, panel - group,
                             token % kLanes, c % S::kGroup);
  } else {
    alignas(64) uint32_t gathered[16];
    const int64_t step0 = c / gpt2f::word_elements(P);
    for (int64_t i = 0; i < 16 / gpt2f::word_elements(P); ++i) {
      gathered[i] =
          step0 + i < steps
              ? from[(step0 + i) * beside * kLanes + (panel - group) * kLanes + token % kLanes]
              : 0;
    }
    return load16(reinterpret_cast<const Element<P>*>(gathered));
  }
}

template <Precision P>
void embed_of(const gpt2f::EmbedArgs& a, const Lane& lane) {
  constexpr Precision kRows = kActivations<P>;
  const Range mine = share(a.rows, 1, lane);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const int64_t token = a.tokens[r];
    for (int64_t c = 0; c < a.width; c += 16) {
      const F row = a.rows_table != nullptr ? load16(at<kRows>(a.rows_table, token * a.stride + c))
                                            : packed_row<P>(a.packed_table, token, c);
      const F place = load16(at<kRows>(a.wpe, a.positions[r] * a.stride + c));
      fstore(a.residual + r * a.stride + c, fadd(row, place));
    }
  }
}

}  // namespace

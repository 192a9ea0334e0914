// embed: residual[r] = wte[token] + wpe[position].
//
// Layout   a tied wte exists only as the packed head: output v of panel v / 16, one word per step.
// Work     rows are split over the lanes.
// Traffic  at decode C / (elements per word) cache lines of the packed table: 384 for GPT-2 small
// in
//          bf16, about 5 us. Keeping a second copy of wte would cost 77 MB instead.
#pragma once

namespace {

template <Precision P>
void embed_of(const gpt2f::EmbedArgs& a, const Lane& lane) {
  constexpr int64_t kGroup = gpt2f::kGroupPanels;
  const int64_t steps = gpt2f::words(P, a.width);
  const int64_t panels = a.packed_table.panels();
  const Range mine = share(a.rows, 1, lane);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    const int64_t token = a.tokens[r], panel = token / kLanes, group = panel / kGroup * kGroup;
    const int64_t w_step = (panels - group < kGroup ? panels - group : kGroup) * kLanes;
    const uint32_t* const column =
        a.packed_table.words + group * kLanes * steps + (panel - group) * kLanes + token % kLanes;
    alignas(64) uint32_t gathered[16];
    for (int64_t c = 0; c < a.width; c += 16) {
      const Element<P>* from;
      if (a.rows_table != nullptr) {
        from = at<P>(a.rows_table, token * a.stride + c);
      } else {
        const int64_t step0 = c / gpt2f::word_elements(P);
        for (int64_t i = 0; i < 16 / gpt2f::word_elements(P); ++i) {
          gathered[i] = step0 + i < steps ? column[(step0 + i) * w_step] : 0;
        }
        from = reinterpret_cast<const Element<P>*>(gathered);
      }
      const F place = load16(at<P>(a.wpe, a.positions[r] * a.stride + c));
      fstore(a.residual + r * a.stride + c, fadd(load16(from), place));
    }
  }
}

inline void embed(const gpt2f::EmbedArgs& a, const Lane& lane) {
  a.precision == kFp32 ? embed_of<kFp32>(a, lane) : embed_of<kBf16>(a, lane);
}

}  // namespace

// The fused stages of a step: layer norm, product and epilogue behind one call each.
//
// Work     rows of the norm and panels of the product are split over the lanes, which meet between.
// Traffic  the weights once (product.inl.h); activations stay in cache at decode.
#pragma once

namespace {

inline F biased(const gpt2f::PackedLinear& linear, int64_t column, F sum) {
  return fadd(sum, fload(linear.bias + column));
}

// Splits the rows of qkv into query words and pages. One lane takes all rows of a head in order: the
// second of a pair of positions completes the word that the first began.
template <Precision P>
void append_cache(const gpt2f::LnQkvArgs& a, const Lane& lane) {
  const gpt2f::CacheLayout& cache = a.cache;
  const int64_t size = cache.head_size, width = cache.heads * size;
  const int64_t qkv_stride = round_up(3 * width, kLanes);
  alignas(64) uint32_t head_words[16];
  const int64_t tasks = a.sequence_count * cache.heads;
  const Range mine = share(tasks, 1, lane);
  for (int64_t task = mine.begin; task < mine.end; ++task) {
    const gpt2f::Sequence& s = a.sequences[task / cache.heads];
    const int64_t head = task % cache.heads;
    for (int64_t t = 0; t < s.rows; ++t) {
      const int64_t r = s.row + t, position = s.start + t, slot = position % gpt2f::kPagePositions;
      const float* const q = a.qkv + r * qkv_stride + head * size;
      uint32_t* const query = a.query + (r * cache.heads + head) * cache.key_steps;
      uint32_t* const page =
          s.blocks[position / gpt2f::kPagePositions] + cache.page_offset(a.layer, head);
      for (int64_t d = 0; d < size; d += 16) {
        const int64_t step0 = d / gpt2f::word_elements(P);
        const int64_t steps = gpt2f::words(P, size - d < 16 ? size - d : 16);
        store16(reinterpret_cast<Element<P>*>(head_words), load16(q + d, size - d));
        for (int64_t i = 0; i < steps; ++i) query[step0 + i] = head_words[i];
        store16(reinterpret_cast<Element<P>*>(head_words), load16(q + width + d, size - d));
        for (int64_t i = 0; i < steps; ++i) page[(step0 + i) * 16 + slot] = head_words[i];
        const F value = load16(q + 2 * width + d, size - d);
        uint32_t* const row = page + cache.key_words() + d;
        if constexpr (P == kFp32) {
          ustore(row + slot * cache.value_width, as_u(value));
        } else {
          uint32_t* const pair = row + slot / 2 * cache.value_width;
          const U rounded = bf16_round(value);
          const U odd = uor(uand(uload(pair), uset(0xFFFFu)), uand(rounded, uset(0xFFFF0000u)));
          ustore(pair, slot % 2 == 0 ? ushr<16>(rounded) : odd);
        }
      }
    }
  }
}

template <Precision P>
void ln_qkv_of(const gpt2f::LnQkvArgs& a, const Lane& lane) {
  const int64_t width = a.linear.inputs;
  layernorm_rows<P>(a.residual, a.stride, nullptr, a.norm, a.normed, a.rows, width, lane);
  lane.sync();
  const int64_t qkv_stride = round_up(a.linear.outputs, kLanes);
  product<P>(a.linear, a.normed, a.stride, a.rows, a.scratch, gpt2f::scratch_floats(a.context),
             lane, [&](int64_t row, int64_t column, F sum) {
               fstore(a.qkv + row * qkv_stride + column, biased(a.linear, column, sum));
             });
  lane.sync();
  append_cache<P>(a, lane);
}

template <Precision P>
void linear_residual_of(const gpt2f::LinearResidualArgs& a, const Lane& lane) {
  product<P>(a.linear, a.x, a.x_stride, a.rows, a.scratch, gpt2f::scratch_floats(a.context), lane,
             [&](int64_t row, int64_t column, F sum) {
               float* const to = a.residual + row * a.stride + column;
               fstore(to, fadd(fload(to), biased(a.linear, column, sum)));
             });
}

template <Precision P>
void ln_fc_gelu_of(const gpt2f::LnFcGeluArgs& a, const Lane& lane) {
  layernorm_rows<P>(a.residual, a.stride, nullptr, a.norm, a.normed, a.rows, a.linear.inputs,
                    lane);
  lane.sync();
  product<P>(a.linear, a.normed, a.stride, a.rows, a.scratch, gpt2f::scratch_floats(a.context),
             lane, [&](int64_t row, int64_t column, F sum) {
               store16(at<P>(a.out, row * a.out_stride + column),
                       fgelu(biased(a.linear, column, sum)));
             });
}

template <Precision P>
void ln_head_of(const gpt2f::LnHeadArgs& a, const Lane& lane) {
  layernorm_rows<P>(a.residual, a.stride, a.asked, a.norm, a.normed, a.rows, a.linear.inputs,
                    lane);
  lane.sync();
  product<P>(a.linear, a.normed, a.stride, a.rows, a.scratch, gpt2f::scratch_floats(a.context),
             lane, [&](int64_t row, int64_t column, F sum) {
               fstore(a.logits + row * a.logit_stride + column, sum);
             });
}

inline void ln_qkv(const gpt2f::LnQkvArgs& a, const Lane& lane) {
  a.precision == kFp32 ? ln_qkv_of<kFp32>(a, lane) : ln_qkv_of<kBf16>(a, lane);
}
inline void linear_residual(const gpt2f::LinearResidualArgs& a, const Lane& lane) {
  a.precision == kFp32 ? linear_residual_of<kFp32>(a, lane) : linear_residual_of<kBf16>(a, lane);
}
inline void ln_fc_gelu(const gpt2f::LnFcGeluArgs& a, const Lane& lane) {
  a.precision == kFp32 ? ln_fc_gelu_of<kFp32>(a, lane) : ln_fc_gelu_of<kBf16>(a, lane);
}
inline void ln_head(const gpt2f::LnHeadArgs& a, const Lane& lane) {
  a.precision == kFp32 ? ln_head_of<kFp32>(a, lane) : ln_head_of<kBf16>(a, lane);
}

}  // namespace

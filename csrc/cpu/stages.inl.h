// The fused stages of a step: layer norm, product and epilogue behind one call each.
//
// Work     rows of the norm and panels of the product are split over the lanes, which meet between.
// Traffic  the weights once (product.inl.h); activations stay in cache at decode.
#pragma once

namespace {

template <int N>
inline void add_bias(const gpt2f::PackedLinear& linear, int64_t column, F (&sums)[N]) {
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) sums[n] = fadd(sums[n], fload(linear.bias + column + n * kLanes));
}

// A product's sink: store(row, column, 16 sums with their bias).
template <typename Store>
auto biased(const gpt2f::PackedLinear& linear, const Store& store) {
  return [&linear, &store]<int N>(int64_t row, int64_t column, F(&sums)[N]) {
    add_bias(linear, column, sums);
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(row, column + n * kLanes, sums[n]);
  };
}

// Where one row's key and value go.
struct CacheSlot {
  uint32_t* page;  // of the head
  int64_t slot;
};

inline CacheSlot cache_slot(const gpt2f::LnQkvArgs& a, int64_t row, int64_t head) {
  return {a.blocks[row] + a.cache.page_offset(a.layer, head),
          a.positions[row] % gpt2f::kPagePositions};
}

// N times sixteen neighbouring outputs of one head. Of a pair of positions the even one clears the
// other half of the word; a column's rows come in order, and lanes meet before another goes on.
template <Precision P, int N>
void keep_panels(const gpt2f::LnQkvArgs& a, int64_t row, int64_t part, int64_t head, int64_t d,
                 const F (&values)[N]) {
  const gpt2f::CacheLayout& cache = a.cache;
  constexpr int64_t kWords = 16 / gpt2f::word_elements(P);  // of sixteen elements
  const int64_t step = d / gpt2f::word_elements(P);
  if (part == 0) {
    uint32_t* const to = a.query + (row * cache.heads + head) * cache.key_steps + step;
    for (int n = 0; n < N; ++n) store16(at<P>(to, n * 16), values[n]);
    return;
  }
  const CacheSlot at_slot = cache_slot(a, row, head);
  // What the row sixteen rows on writes to is asked for, a sixteenth of it with each row till then.
  if (row + gpt2f::kPagePositions < a.rows) {
    const uint32_t* const next = cache_slot(a, row + gpt2f::kPagePositions, head).page +
                                 (part - 1) * cache.key_words() + step * 16;
    for (int i = 0; i < N * kWords; i += 16) {
      __builtin_prefetch(next + at_slot.slot * N * kWords + i, 1);
    }
  }
  if (a.rows < gpt2f::kPagePositions) {  // what this row writes to of the next head
    const uint32_t* const next = at_slot.page + cache.page_words();
    if (part == 1) {
      for (int64_t i = 0; i < N * kWords; ++i) __builtin_prefetch(next + (step + i) * 16, 1);
    } else {
      const int64_t pair = at_slot.slot / gpt2f::word_elements(P);
      const uint32_t* const to = next + cache.key_words() + pair * cache.value_width + d;
      for (int n = 0; n < N; ++n) __builtin_prefetch(to + n * 16, 1);
    }
  }
  if (part == 1) {
    alignas(64) uint32_t key[N * kWords];
    for (int n = 0; n < N; ++n) store16(at<P>(key, n * 16), values[n]);
    uint32_t* const to = at_slot.page + step * 16 + at_slot.slot;
    for (int64_t i = 0; i < N * kWords; ++i) to[i * 16] = key[i];
    return;
  }
  uint32_t* const to = at_slot.page + cache.key_words() + d;
  if constexpr (P == kFp32) {
    uint32_t* const own = to + at_slot.slot * cache.value_width;
    for (int n = 0; n < N; ++n) ustore(own + n * 16, as_u(values[n]));
  } else {
    uint32_t* const pair = to + at_slot.slot / 2 * cache.value_width;
    for (int n = 0; n < N; ++n) {
      const U rounded = bf16_words(values[n]);
      const U odd = uor(uand(uload(pair + n * 16), uset(0xFFFFu)), ushl<16>(rounded));
      ustore(pair + n * 16, at_slot.slot % 2 == 0 ? rounded : odd);
    }
  }
}

// The same one output at a time, for heads that do not fill panels. Elements are stored alone: the
// other half of a word may be another lane's.
template <Precision P>
void keep_elements(const gpt2f::LnQkvArgs& a, int64_t row, int64_t column, F value) {
  const gpt2f::CacheLayout& cache = a.cache;
  const int64_t size = cache.head_size, width = cache.heads * size;
  alignas(64) Element<P> elements[16];
  store16(elements, value);
  for (int64_t i = 0; i < 16 && column + i < 3 * width; ++i) {
    const int64_t part = (column + i) / width, inside = (column + i) % width;
    const int64_t head = inside / size, d = inside % size, per_word = gpt2f::word_elements(P);
    if (part == 0) {
      uint32_t* const query = a.query + (row * cache.heads + head) * cache.key_steps;
      at<P>(query, 0)[d] = elements[i];
      if (d + 1 == size && size % per_word != 0) at<P>(query, 0)[size] = 0;
      continue;
    }
    const CacheSlot at_slot = cache_slot(a, row, head);
    if (part == 1) {
      Element<P>* const key = at<P>(at_slot.page + d / per_word * 16 + at_slot.slot, d % per_word);
      *key = elements[i];
      if (d + 1 == size && size % per_word != 0) key[1] = 0;
      continue;
    }
    uint32_t* const values = at_slot.page + cache.key_words() + d;
    Element<P>* const to =
        at<P>(values + at_slot.slot / per_word * cache.value_width, at_slot.slot % per_word);
    *to = elements[i];
    if (per_word == 2 && at_slot.slot % 2 == 0) to[1] = 0;
  }
}

template <Precision P>
void ln_qkv_of(const gpt2f::LnQkvArgs& a, const Lane& lane) {
  const Operand x = layernorm_rows<P>(a.residual, a.stride, nullptr, a.norm, a.normed, a.rows,
                                      a.linear.inputs, lane);
  const int64_t sums = gpt2f::scratch_floats(a.context);
  // Two positions share the words of a value.
  const auto cut = [&](int64_t row) {
    const bool pair = a.positions[row] % 2 != 0 && a.blocks[row] == a.blocks[row - 1];
    return row + pair;
  };
  if (a.cache.int8) {  // a scale needs the whole head
    constexpr Precision kOut = kActivations<P>;
    const int64_t stride = round_up(a.linear.outputs, kLanes);
    const auto keep = [&](int64_t row, int64_t column, F value) {
      store16(at<kOut>(a.projected, row * stride + column), value);
    };
    product<P>(a.linear, x, a.rows, a.scratch, sums, lane, biased(a.linear, keep));
    lane.sync();
    const Range mine = share(a.rows * a.cache.heads, 1, lane);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      keep_head<kOut>(a, i / a.cache.heads, i % a.cache.heads);
    }
    return;
  }
  if (a.cache.head_size % 16 == 0) {
    // In 32 bits, where processors divide several times as fast.
    const uint32_t size = static_cast<uint32_t>(a.cache.head_size);
    const uint32_t heads = static_cast<uint32_t>(a.cache.heads);
    const auto keep = [&]<int N>(int64_t row, int64_t column, const F(&values)[N]) {
      const uint32_t any_head = static_cast<uint32_t>(column) / size, d = column - any_head * size;
      keep_panels<kActivations<P>, N>(a, row, any_head / heads, any_head % heads, d, values);
    };
    product<P>(
        a.linear, x, a.rows, a.scratch, sums, lane,
        [&]<int N>(int64_t row, int64_t column, F(&values)[N]) {
          add_bias(a.linear, column, values);
          if (size % (N * kLanes) == 0) return keep(row, column, values);
          for (int n = 0; n < N; ++n) keep(row, column + n * kLanes, {values[n]});
        },
        cut);
  } else {
    const auto keep = [&](int64_t row, int64_t column, F value) {
      keep_elements<kActivations<P>>(a, row, column, value);
    };
    product<P>(a.linear, x, a.rows, a.scratch, sums, lane, biased(a.linear, keep), cut);
  }
}

template <Precision P>
void linear_residual_of(const gpt2f::LinearResidualArgs& a, const Lane& lane) {
  const Operand x = operand_of<P>(a.x, a.x_stride, a.rows, a.linear.inputs, a.operand, lane);
  const auto add = [&](int64_t row, int64_t column, F value) {
    float* const to = a.residual + row * a.stride + column;
    fstore(to, fadd(fload(to), value));
  };
  product<P>(a.linear, x, a.rows, a.scratch, gpt2f::scratch_floats(a.context), lane,
             biased(a.linear, add));
}

template <Precision P>
void ln_fc_gelu_of(const gpt2f::LnFcGeluArgs& a, const Lane& lane) {
  const Operand x = layernorm_rows<P>(a.residual, a.stride, nullptr, a.norm, a.normed, a.rows,
                                      a.linear.inputs, lane);
  product<P>(a.linear, x, a.rows, a.scratch, gpt2f::scratch_floats(a.context), lane,
             [&]<int N>(int64_t row, int64_t column, F(&sums)[N]) {
               add_bias(a.linear, column, sums);
               fgelu<kActivations<P>>(sums);
               for (int n = 0; n < N; ++n) {
                 store16(at<kActivations<P>>(a.out, row * a.out_stride + column + n * kLanes),
                         sums[n]);
               }
             });
}

template <Precision P>
void ln_head_of(const gpt2f::LnHeadArgs& a, const Lane& lane) {
  const Operand x = layernorm_rows<P>(a.residual, a.stride, a.asked, a.norm, a.normed, a.rows,
                                      a.linear.inputs, lane);
  gpt2f::PackedLinear linear = a.linear;
  linear.bias = nullptr;  // zero, and not worth a read
  product<P>(linear, x, a.rows, a.scratch, gpt2f::scratch_floats(a.context), lane,
             [&]<int N>(int64_t row, int64_t column, F(&sums)[N]) {
               for (int n = 0; n < N; ++n) {
                 fstore(a.logits + row * a.logit_stride + column + n * kLanes, sums[n]);
               }
             });
}

#define GPT2F_BY_PRECISION(name, Args)                       \
  inline void name(const gpt2f::Args& a, const Lane& lane) { \
    switch (a.precision) {                                   \
      case kFp32:                                            \
        return name##_of<kFp32>(a, lane);                    \
      case kInt8:                                            \
        return name##_of<kInt8>(a, lane);                    \
      case kInt4:                                            \
        return name##_of<kInt4>(a, lane);                    \
      default:                                               \
        return name##_of<kBf16>(a, lane);                    \
    }                                                        \
  }
GPT2F_BY_PRECISION(ln_qkv, LnQkvArgs)
GPT2F_BY_PRECISION(linear_residual, LinearResidualArgs)
GPT2F_BY_PRECISION(ln_fc_gelu, LnFcGeluArgs)
GPT2F_BY_PRECISION(ln_head, LnHeadArgs)
GPT2F_BY_PRECISION(embed, EmbedArgs)
#undef GPT2F_BY_PRECISION

}  // namespace

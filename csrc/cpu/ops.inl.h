// The kernels as single operations on plain, contiguous tensors (gpt2_fast/ops.py). They pack and
// page what they are given, then run the very functions the engine's stages run.
#pragma once

namespace {

template <Precision P>
void op_layernorm_of(const gpt2f::LayernormArgs& a, const Lane& lane) {
  float* const row = a.scratch + lane.rank * round_up(a.width, 16);
  const Range mine = share(a.rows, 1, lane);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    Element<P>* const x = at<P>(a.x, r * a.width);
    for (int64_t c = 0; c < a.width; c += 16) {
      const int64_t n = a.width - c;
      F value = load16(x + c, n);
      if (a.delta != nullptr) {
        value = fadd(value, load16(at<P>(a.delta, r * a.width + c), n));
        store16(x + c, value, n);
        value = load16(x + c, n);  // as rounded
      }
      store16(row + c, value, n);
    }
    Element<P>* const out = at<P>(a.out, r * a.width);
    layernorm_row(row, a.norm, a.width, [&](int64_t c, F y) { store16(out + c, y, a.width - c); });
  }
}

template <Precision P>
void op_gelu_of(const gpt2f::GeluArgs& a, const Lane& lane) {
  const Range mine = share(a.count, 16, lane);
  for (int64_t i = mine.begin; i < mine.end; i += 16) {
    F x[1] = {load16(at<P>(a.x, i), mine.end - i)};
    fgelu<P>(x);
    store16(at<P>(a.out, i), x[0], mine.end - i);
  }
}

template <Precision P>
void op_linear_of(const gpt2f::LinearArgs& a, const Lane& lane) {
  const int64_t stride = round_up(a.inputs, 16);
  const Range rows = share(a.rows, 1, lane);
  for (int64_t r = rows.begin; r < rows.end; ++r) {
    for (int64_t k = 0; k < a.inputs; k += 16) {
      store16(at<P>(a.operand, r * stride + k), load16(at<P>(a.x, r * a.inputs + k), a.inputs - k));
    }
  }
  const Range biases = share(round_up(a.outputs, 16), 16, lane);
  for (int64_t n = biases.begin; n < biases.end; n += 16) {
    const F value = a.bias == nullptr ? fset(0.0f) : load16(a.bias + n, a.outputs - n);
    fstore(a.padded_bias + n, value);
  }
  const gpt2f::PackedLinear linear{a.packed, a.padded_bias, a.inputs, a.outputs};
  std::atomic<int64_t> bad{INT64_MAX};
  pack_of<P>({P, a.weight, a.type, 1, a.inputs, linear, &bad}, lane);
  lane.sync();
  const Operand x = operand_of<P>(a.operand, stride, a.rows, a.inputs, nullptr, lane);
  product<P>(linear, x, a.rows, a.scratch, gpt2f::scratch_floats(0), lane,
             [&]<int N>(int64_t row, int64_t column, F(&sums)[N]) {
               add_bias(linear, column, sums);
               if (a.gelu) fgelu<P>(sums);
               for (int i = 0; i < N; ++i) {
                 const int64_t here = column + i * kLanes;
                 const int64_t n = a.outputs - here, at_out = row * a.outputs + here;
                 if (a.residual != nullptr) {
                   sums[i] = fadd(load16(at<P>(a.residual, at_out), n), sums[i]);
                 }
                 store16(at<P>(a.out, at_out), sums[i], n);
               }
             });
}

// One head of one sequence from rows into pages.
template <Precision P>
void fill_pages(const Element<P>* key, const Element<P>* value, int64_t keys,
                const gpt2f::CacheLayout& cache, uint32_t* pages) {
  const int64_t size = cache.head_size;
  alignas(64) uint32_t head_words[16];
  for (int64_t s = 0; s < keys; ++s) {
    uint32_t* const page = pages + s / 16 * cache.page_words();
    const int64_t slot = s % 16;
    for (int64_t d = 0; d < size; d += 16) {
      const int64_t step0 = d / gpt2f::word_elements(P);
      const int64_t steps = gpt2f::words(P, size - d < 16 ? size - d : 16);
      store16(reinterpret_cast<Element<P>*>(head_words), load16(key + s * size + d, size - d));
      for (int64_t i = 0; i < steps; ++i) page[(step0 + i) * 16 + slot] = head_words[i];
      const F v = load16(value + s * size + d, size - d);
      uint32_t* const row = page + cache.key_words() + d;
      if constexpr (P == kFp32) {
        ustore(row + slot * cache.value_width, as_u(v));
      } else {
        uint32_t* const pair = row + slot / 2 * cache.value_width;
        const U odd = uor(uand(uload(pair), uset(0xFFFFu)), as_u(v));
        ustore(pair, slot % 2 == 0 ? ushr<16>(as_u(v)) : odd);
      }
    }
  }
}

// Pages, then queries, then the page table of one lane.
inline int64_t dense_attention_words(const gpt2f::DenseAttentionArgs& a) {
  const gpt2f::CacheLayout cache(a.type == DType::kF32 ? kFp32 : kBf16, 1, a.head_size);
  const int64_t pages = (a.keys + 15) / 16;
  return round_up(pages * (cache.page_words() + 2) + round_up(a.queries * cache.key_steps + 16, 16),
                  16);
}

template <Precision P>
void dense_attention_of(const gpt2f::DenseAttentionArgs& a, const Lane& lane) {
  const gpt2f::CacheLayout cache(P, 1, a.head_size);
  const int64_t size = a.head_size, page_count = (a.keys + 15) / 16;
  uint32_t* const pages = a.pages + lane.rank * a.pages_words;
  uint32_t* const query = pages + page_count * cache.page_words();
  // Block pointers of this lane, behind the queries.
  uint32_t** const blocks =
      reinterpret_cast<uint32_t**>(query + round_up(a.queries * cache.key_steps + 16, 16));
  float* const scratch = a.scratch + lane.rank * gpt2f::scratch_floats(a.keys);
  for (int64_t j = 0; j < page_count; ++j) blocks[j] = pages + j * cache.page_words();
  const Range mine = share(a.batch * a.heads, 1, lane);
  for (int64_t bh = mine.begin; bh < mine.end; ++bh) {
    const int64_t length = a.lengths == nullptr ? a.keys : a.lengths[bh / a.heads];
    fill_pages<P>(at<P>(a.key, bh * a.keys * size), at<P>(a.value, bh * a.keys * size), length,
                  cache, pages);
    for (int64_t t = 0; t < a.queries; ++t) {
      Element<P>* const to = reinterpret_cast<Element<P>*>(query + t * cache.key_steps);
      for (int64_t d = 0; d < cache.key_steps * gpt2f::word_elements(P); ++d) {
        to[d] = d < size ? *at<P>(a.query, (bh * a.queries + t) * size + d) : Element<P>(0);
      }
    }
    for (int64_t t = 0; t < a.queries; t += gpt2f::kQueryTile) {
      const int64_t left = a.queries - t;
      attend_rows<P>(left < gpt2f::kQueryTile ? left : gpt2f::kQueryTile, Pages{blocks, 0}, cache,
                     query + t * cache.key_steps, cache.key_steps, length - a.queries + t + 1,
                     a.scale, scratch, a.keys, at<P>(a.out, (bh * a.queries + t) * size), size);
    }
  }
}

template <Precision P>
void op_embed_of(const gpt2f::OpEmbedArgs& a, const Lane& lane) {
  const Range mine = share(a.rows, 1, lane);
  for (int64_t r = mine.begin; r < mine.end; ++r) {
    for (int64_t c = 0; c < a.width; c += 16) {
      const int64_t n = a.width - c;
      const F sum = fadd(load16(at<P>(a.wte, a.tokens[r] * a.width + c), n),
                         load16(at<P>(a.wpe, a.positions[r] * a.width + c), n));
      store16(at<P>(a.out, r * a.width + c), sum, n);
    }
  }
}

// Reads as the products do: one stream, four registers at a time.
inline uint64_t read(const uint32_t* data, int64_t words) {
  U sums[4] = {uset(0), uset(0), uset(0), uset(0)};
  for (int64_t i = 0; i < words; i += 64) {
    for (int64_t n = 0; n < 4; ++n) sums[n] = uadd(sums[n], uload(data + i + n * 16));
  }
  alignas(64) uint32_t each[16];
  ustore(each, uadd(uadd(sums[0], sums[1]), uadd(sums[2], sums[3])));
  uint64_t total = 0;
  for (const uint32_t one : each) total += one;
  return total;
}

#define GPT2F_BY_TYPE(name, Args)                                                  \
  inline void name(const gpt2f::Args& a, const Lane& lane) {                       \
    a.type == DType::kF32 ? name##_of<kFp32>(a, lane) : name##_of<kBf16>(a, lane); \
  }
GPT2F_BY_TYPE(op_layernorm, LayernormArgs)
GPT2F_BY_TYPE(op_gelu, GeluArgs)
GPT2F_BY_TYPE(op_linear, LinearArgs)
GPT2F_BY_TYPE(dense_attention, DenseAttentionArgs)
GPT2F_BY_TYPE(op_embed, OpEmbedArgs)
#undef GPT2F_BY_TYPE

}  // namespace

// cache_int8: keys and values of the int8 cache, and what attention does with a page of them.
//
// Maths    k in groups of 64 along D, v of a head as one group: q = round(x / s), s = largest
//          magnitude / 127 rounded up to bfloat16 (engine/quantize.h's rule for int8 weights). The
//          query becomes groups as every activation beside int8 weights does (quantized.inl.h).
//          score = sum over groups of s_query s_key (sum of q q); the weight of a position takes in
//          the scale of its value: out = sum of (p s) q.
// Layout   K of a page is a packed int8 matrix of 16 outputs, the positions: for each group bytes
//          q + 128, [16][16 positions][4], and scales [16 positions]. V: bytes [16 positions]
//          [value_width], then scales [16 positions].
// Work     rows times heads are split over the lanes.
// Traffic  D + 2 bytes of K and of V a position and head (D = 64) instead of 2 D.
// Numerics sums of integers are exact; then one fused multiply-add a group. The float weights, and
//          the sums of values, are those of an fp32 cache.
#pragma once

namespace {

static_assert(gpt2f::kKeyGroup == Steps<kInt8>::kGroup);
static_assert(gpt2f::kKeyGroupWords == Steps<kInt8>::kPanelWords);

// The scale of n numbers as an int8 weight's: NaN if one is not finite, 0 if all are tiny.
template <typename T>
inline uint16_t byte_scale(const T* x, int64_t n) {
  Magnitude magnitude;
  for (int64_t i = 0; i < n; i += 16) magnitude.add(load16(x + i, n - i));
  if (!magnitude.finite()) return 0x7FC0;
  if (magnitude.most() < 0x1p-100f) return 0;
  const float scale = magnitude.most() / 127.0f;
  uint32_t word;
  __builtin_memcpy(&word, &scale, sizeof word);
  return static_cast<uint16_t>((word + 0xFFFFu) >> 16);
}

// Sixteen of them as integers, in words.
inline U to_integers(F x, uint16_t scale) {
  const bool some = scale != 0 && scale != 0x7FC0;
  if (!some) return uset(0);
  return to_u(fround(fdiv(x, fset(gpt2f::from_bits(static_cast<uint32_t>(scale) << 16)))));
}

template <typename T>
void keep_key(const T* key, int64_t size, uint32_t* page, int64_t slot) {
  constexpr int64_t kGroup = gpt2f::kKeyGroup;
  for (int64_t d0 = 0; d0 < size; d0 += kGroup, page += gpt2f::kKeyGroupWords) {
    const int64_t count = size - d0 < kGroup ? size - d0 : kGroup;
    const uint16_t scale = byte_scale(key + d0, count);
    for (int64_t d = 0; d < kGroup; d += 16) {
      const F x = d < count ? load16(key + d0 + d, count - d) : fset(0.0f);
      alignas(16) uint8_t bytes[16];
      store_bytes(bytes, uadd(to_integers(x, scale), uset(128)));
      for (int64_t i = 0; i < 4; ++i) {
        __builtin_memcpy(page + (d / 4 + i) * gpt2f::kPagePositions + slot, bytes + 4 * i, 4);
      }
    }
    __builtin_memcpy(reinterpret_cast<uint16_t*>(page + kGroup * 4) + slot, &scale, sizeof scale);
  }
}

// `values` is where V begins in the page.
template <typename T>
void keep_value(const T* value, const gpt2f::CacheLayout& cache, uint32_t* values, int64_t slot) {
  const int64_t size = cache.head_size, width = cache.value_width;
  const uint16_t scale = byte_scale(value, size);
  uint8_t* const bytes = reinterpret_cast<uint8_t*>(values);
  for (int64_t d = 0; d < size; d += 16) {
    store_bytes(bytes + slot * width + d, to_integers(load16(value + d, size - d), scale));
  }
  const int64_t scales = gpt2f::kPagePositions * width;
  __builtin_memcpy(bytes + scales + 2 * slot, &scale, sizeof scale);
}

// The query, key and value of one row and head, from the row's projections.
template <Precision P>
void keep_head(const gpt2f::LnQkvArgs& a, int64_t row, int64_t head) {
  const gpt2f::CacheLayout& cache = a.cache;
  const int64_t size = cache.head_size, width = cache.heads * size;
  const Element<P>* const query =
      at<P>(a.projected, row * round_up(3 * width, kLanes) + head * size);
  GroupWriter<kInt8> writer(a.query + (row * cache.heads + head) * cache.key_steps);
  for (int64_t d = 0; d < size; d += 16) writer.put(load16(query + d, size - d));
  writer.finish(size);
  uint32_t* const page = a.blocks[row] + cache.page_offset(a.layer, head);
  const int64_t slot = a.positions[row] % gpt2f::kPagePositions;
  keep_key(query + width, size, page, slot);
  keep_value(query + 2 * width, cache, page + cache.key_words(), slot);
}

// q . k of R queries with the sixteen positions of a page, in as many rows as registers hold.
template <int R, int kFrom = 0>
inline void byte_scores(const gpt2f::CacheLayout& cache, const uint32_t* keys,
                        const uint32_t* query, int64_t query_row, F (&scores)[R]) {
  constexpr int kRows = R - kFrom < kDotRows ? R - kFrom : kDotRows;
  F acc[kRows][1];
  for (int r = 0; r < kRows; ++r) acc[r][0] = fset(0.0f);
  add_groups<kInt8, kRows, 1>(keys, 0, 1, query + kFrom * query_row, query_row, cache.key_groups(),
                              acc);
  for (int r = 0; r < kRows; ++r) scores[kFrom + r] = acc[r][0];
  if constexpr (kFrom + kRows < R) {
    byte_scores<R, kFrom + kRows>(cache, keys, query, query_row, scores);
  }
}

inline F value_scales(const gpt2f::CacheLayout& cache, const uint32_t* page) {
  const uint32_t* const values = page + cache.key_words();
  return bf16_load(
      reinterpret_cast<const uint16_t*>(values + gpt2f::kPagePositions * cache.value_width / 4));
}

// acc[r][n] += the weighted values of `count` positions, sixteen along D in each of N panels.
template <int R, int N>
[[gnu::always_inline]] inline void byte_values(const uint32_t* v, int64_t v_step,
                                               const uint32_t* weights, int64_t weight_row,
                                               int64_t count, F (&acc)[R][N]) {
  for (int64_t s = 0; s < count; ++s) {
    F value[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      value[n] = load_bytes(reinterpret_cast<const int8_t*>(v + s * v_step + n * kLanes / 4));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F weight = as_f(uset(weights[r * weight_row + s]));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[r][n] = ffma(value[n], weight, acc[r][n]);
    }
  }
}

}  // namespace

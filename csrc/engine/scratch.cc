#include "engine/scratch.h"

namespace gpt2f {

Scratch::Scratch(const Shape& shape, Precision precision, int threads)
    : memory_(static_cast<size_t>(bytes(shape, precision, threads)), "scratch") {
  lay_out(shape, precision, threads, memory_.as<std::byte>());
}

int64_t Scratch::bytes(const Shape& shape, Precision precision, int threads) {
  Scratch counter;
  return counter.lay_out(shape, precision, threads, nullptr);
}

int64_t Scratch::lay_out(const Shape& shape, Precision precision, int threads, std::byte* memory) {
  int64_t used = 0;
  const auto take = [&](auto*& pointer, int64_t words) {
    // Without memory only the sizes count.
    using Pointer = std::remove_reference_t<decltype(pointer)>;
    pointer = memory == nullptr ? nullptr : reinterpret_cast<Pointer>(memory + used);
    used += round_up(words * 4, 64);
  };
  stride = round_up(shape.width, kLanes);
  inner_stride = round_up(shape.inner, kLanes);
  logit_stride = round_up(shape.vocab, kLanes);
  const int64_t per_word = word_elements(precision);
  const CacheLayout cache(precision, shape.heads, shape.head_size());
  take(tokens, kMaxRows);
  take(positions, kMaxRows);
  take(residual, kMaxRows * stride);
  take(normed, kMaxRows * stride / per_word);
  take(blocks, kMaxRows * 2);
  take(query, kMaxRows * shape.heads * cache.key_steps);
  take(attended, kMaxRows * stride / per_word);
  take(inner, kMaxRows * inner_stride / per_word);
  take(logits, kLogitRows * logit_stride);
  take(draw, threads * 2 * logit_stride);
  take(lanes, threads * scratch_floats(shape.context));
  return used;
}

}  // namespace gpt2f

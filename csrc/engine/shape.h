// The shape of a model and the memory it takes.
#pragma once

#include <cstdint>

#include "core/dtype.h"
#include "core/kernels.h"

namespace gpt2f {

// What a model's numbers are held in.
struct Formats {
  Precision precision;  // weights, activations and, unless it is int8, the cache
  bool int8_cache = false;  // on the CPU only
};

struct Shape {
  int64_t layers, width, heads, context, vocab, inner;
  float eps;
  bool tied;              // the head is the token embedding
  bool scale_scores;      // divide scores by sqrt(D)
  bool scale_by_layer;    // and by the layer's number, from 1

  int64_t head_size() const { return width / heads; }
  float attention_scale(int64_t layer) const;
  void validate() const;  // throws Error (kParameter)
  CacheLayout cache(const Formats& formats, const KernelTable& table) const;
};

// Bytes of each part, fixed before anything is allocated.
struct Plan {
  int64_t weights;        // packed matrices, norms, biases, embeddings
  int64_t cache;  // KV blocks for max_sequences full contexts, committed as they are used
  int64_t cache_block;  // of which one block of 16 positions
  int64_t scratch;  // activations, logits and per-thread buffers
  int64_t total() const { return weights + cache + scratch; }
};

constexpr int64_t kLogitRows = 64;  // rows whose logits exist at the same time

Plan make_plan(const Shape& shape, const Formats& formats, const KernelTable& table, int threads,
               int64_t max_sequences);

}  // namespace gpt2f

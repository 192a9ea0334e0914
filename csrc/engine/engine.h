// One model on one backend: its weights, its cache, and step(), the forward pass of a ragged batch.
#pragma once

#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "core/kernels.h"
#include "core/thread_pool.h"
#include "engine/cache.h"
#include "engine/scratch.h"
#include "engine/shape.h"
#include "engine/weights.h"

namespace gpt2f {

// What is wanted of one row of a step.
struct Wish {
  int64_t row;  // among the rows of its item
  float* logits = nullptr;  // (V), or
  SampleParameters parameters;  // a token and its log-probability
  int32_t token = -1;  // out
  float logprob = 0.0f;  // out
};

// New tokens of one sequence, and what is wanted of them.
struct StepItem {
  int64_t sequence;
  std::span<const int32_t> tokens;
  std::span<Wish> wishes;
};

class Engine {
 public:
  Engine(const Shape& shape, Precision precision, const KernelTable& table, int threads,
         int64_t max_sequences);

  void load(const std::string& name, const StoredTensor& tensor);
  std::vector<std::string> missing() const { return weights_.missing(); }

  int64_t open();  // an empty sequence; throws Error (kCapacity) at max_sequences
  int64_t fork(int64_t sequence);  // another with the same past, sharing its blocks
  void close(int64_t sequence);
  int64_t length(int64_t sequence);

  // Runs all items' tokens through the model in one pass and appends them to their sequences. At
  // most kMaxRows tokens together; a sequence appears once. Throws Error and changes no sequence
  // when an item is wrong or the cache is full.
  void step(std::span<StepItem> items);

  const Shape& shape() const { return shape_; }
  const KernelTable& table() const { return table_; }
  int threads() const { return pool_.size(); }
  int64_t free_blocks();
  int64_t blocks() const { return cache_.blocks(); }

 private:
  struct Asked {
    int32_t row;  // among all rows
    Wish* wish;
  };
  struct Batch {
    int64_t rows = 0;
    std::vector<Sequence> sequences;
    std::vector<Asked> asked;
  };

  CachedSequence& find(int64_t sequence);
  void check_items(std::span<StepItem> items);
  void gather(std::span<StepItem> items);
  void forward(const Lane& lane);
  void attend_layer(int64_t layer, const Lane& lane);
  void answer(const Lane& lane);

  const Shape shape_;
  const Precision precision_;
  const KernelTable& table_;
  ThreadPool pool_;
  Weights weights_;
  Scratch scratch_;
  const CacheLayout layout_;
  Cache cache_;
  const int64_t max_sequences_;
  int64_t next_id_ = 0;
  std::map<int64_t, CachedSequence> sequences_;
  Batch batch_;
  std::vector<int32_t> asked_rows_;
  std::vector<SampleParameters> parameters_;
  std::vector<int32_t> tokens_;
  std::vector<float> logprobs_;
  std::mutex mutex_;  // one caller at a time
};

}  // namespace gpt2f

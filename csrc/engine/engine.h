// One model on one backend: its weights, its cache, and step(), the forward pass of a ragged batch.
#pragma once

#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "core/fair_mutex.h"
#include "core/kernels.h"
#include "engine/cache.h"
#include "engine/place.h"
#include "engine/scratch.h"
#include "engine/shape.h"
#include "engine/weights.h"

namespace gpt2f {

// What is wanted of one row of a step.
struct Wish {
  int64_t row;  // among the rows of its item
  float* logits = nullptr;  // (V), or
  SampleParameters parameters;  // a token and its log-probability, at the position behind the row
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
  // `device` counts the devices of the table's backend.
  Engine(const Shape& shape, const Formats& formats, const KernelTable& table, int device,
         int threads, int64_t max_sequences);
  ~Engine();

  void load(const std::string& name, const StoredTensor& tensor);
  std::vector<std::string> missing() const { return weights_.missing(); }
  std::span<const std::byte> packed();  // as long as the engine lives
  void load_packed(PackedFile file);

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
  int threads() { return place_.pool().size(); }
  int64_t recordings() const { return static_cast<int64_t>(recordings_.size()); }
  int64_t free_blocks();
  int64_t blocks() const { return cache_.blocks(); }

 private:
  struct Asked {
    int32_t row;  // among all rows
    Wish* wish;
  };
  // Rows that follow each other, of sequences that do.
  struct Part {
    int64_t first = 0;
    int64_t rows = 0;
    int64_t sequences = 0;
    int64_t longest = 0;  // most rows of one sequence
  };
  // One step: what it holds, and the same on the host and where the kernels run.
  struct Batch {
    Part all;
    Part wanted;  // from the first row that is asked for to the last
    std::vector<Asked> asked;
    int64_t draws = 0;  // of the asked rows; those that want logits stand behind them
  };

  CachedSequence& find(int64_t sequence);
  void check_items(std::span<StepItem> items);
  void count(std::span<StepItem> items);
  Control control_at(std::byte* memory) const;
  void gather(std::span<StepItem> items);
  void run();
  void enqueue();
  void forward(const Lane& lane);
  void run_layer(int64_t layer, const Control& control, const Lane& lane);
  void answer(const Control& control, const Lane& lane);
  void draw(const Control& control, int64_t begin, int64_t rows, const Lane& lane);
  void hand_out();

  const Shape shape_;
  const Precision precision_;
  const KernelTable& table_;
  Place place_;
  Weights weights_;
  Scratch scratch_;
  const CacheLayout layout_;
  Cache cache_;
  const int64_t max_sequences_;
  int64_t next_id_ = 0;
  std::map<int64_t, CachedSequence> sequences_;
  Batch batch_;
  // Decode steps of a device, by number of sequences; null after the first of its kind, which runs
  // as it is, so that everything is loaded before it is recorded.
  const bool record_;
  std::map<int64_t, Recording*> recordings_;
  FairMutex mutex_;  // one caller at a time
};

}  // namespace gpt2f

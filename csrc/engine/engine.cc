#include "engine/engine.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "core/cpu_budget.h"
#include "core/error.h"

namespace gpt2f {
namespace {

// Refuses a model that cannot fit before any of it is allocated. The cache is committed as it is
// used, so only one sequence of it counts.
const Shape& fitting(const Shape& shape, Precision precision, int threads, int64_t max_sequences) {
  const Plan plan = make_plan(shape, precision, threads, max_sequences);
  const auto available = static_cast<int64_t>(available_memory());
  const int64_t least = plan.weights + plan.scratch + plan.cache / max_sequences;
  check(available == 0 || least <= available, ErrorKind::kCapacity, "memory: weights take ",
        plan.weights, " bytes, scratch ", plan.scratch, ", the cache of one sequence ",
        plan.cache / max_sequences, "; only ", available, " are available");
  return shape;
}

}  // namespace

Engine::Engine(const Shape& shape, Precision precision, const KernelTable& table, int threads,
               int64_t max_sequences)
    : shape_(fitting(shape, precision, threads, max_sequences)),
      precision_(precision),
      table_(table),
      pool_(threads),
      weights_(shape, precision),
      scratch_(shape, precision, threads),
      layout_(precision, shape.heads, shape.head_size()),
      cache_(max_sequences * ((shape.context + kPagePositions - 1) / kPagePositions),
             layout_.block_words(shape.layers)),
      max_sequences_(max_sequences) {}

void Engine::load(const std::string& name, const StoredTensor& tensor) {
  const std::lock_guard lock(mutex_);
  weights_.load(name, tensor, table_, pool_);
}

CachedSequence& Engine::find(int64_t sequence) {
  const auto found = sequences_.find(sequence);
  check(found != sequences_.end(), ErrorKind::kParameter, "sequence: ", sequence, " is not open");
  return found->second;
}

int64_t Engine::open() {
  const std::lock_guard lock(mutex_);
  check(static_cast<int64_t>(sequences_.size()) < max_sequences_, ErrorKind::kCapacity,
        "sequences: all ", max_sequences_, " are in use (max_batch)");
  sequences_[next_id_] = {};
  return next_id_++;
}

int64_t Engine::fork(int64_t sequence) {
  const std::lock_guard lock(mutex_);
  check(static_cast<int64_t>(sequences_.size()) < max_sequences_, ErrorKind::kCapacity,
        "sequences: all ", max_sequences_, " are in use (max_batch)");
  sequences_[next_id_] = cache_.fork(find(sequence));
  return next_id_++;
}

void Engine::close(int64_t sequence) {
  const std::lock_guard lock(mutex_);
  cache_.release(find(sequence));
  sequences_.erase(sequence);
}

int64_t Engine::length(int64_t sequence) {
  const std::lock_guard lock(mutex_);
  return find(sequence).length;
}

int64_t Engine::free_blocks() {
  const std::lock_guard lock(mutex_);
  return cache_.free_blocks();
}

void Engine::check_items(std::span<StepItem> items) {
  std::set<int64_t> seen;
  int64_t rows = 0;
  for (const StepItem& item : items) {
    const int64_t length = find(item.sequence).length;
    const auto count = static_cast<int64_t>(item.tokens.size());
    check(seen.insert(item.sequence).second, ErrorKind::kParameter, "sequence: ", item.sequence,
          " appears twice in one step");
    check(count >= 1, ErrorKind::kParameter, "tokens: sequence ", item.sequence, " has none");
    check(length + count <= shape_.context, ErrorKind::kParameter, "tokens: sequence ",
          item.sequence, " holds ", length, " positions and ", count,
          " more do not fit into the context of ", shape_.context);
    for (const int32_t token : item.tokens) {
      check(token >= 0 && token < shape_.vocab, ErrorKind::kParameter, "tokens: ", token,
            " is outside 0..", shape_.vocab - 1);
    }
    for (const Wish& wish : item.wishes) {
      check(wish.row >= 0 && wish.row < count, ErrorKind::kParameter, "wish: row ", wish.row,
            " of ", count);
      check(wish.parameters.target < shape_.vocab, ErrorKind::kParameter,
            "target: ", wish.parameters.target, " is outside 0..", shape_.vocab - 1);
    }
    rows += count;
  }
  check(rows <= kMaxRows, ErrorKind::kParameter, "tokens: ", rows, " in one step; at most ",
        kMaxRows);
  const std::vector<std::string> unloaded = weights_.missing();
  check(unloaded.empty(), ErrorKind::kCheckpoint, "weights: ", unloaded.size(),
        " parameters were not loaded, among them ", unloaded.empty() ? "" : unloaded.front());
}

void Engine::gather(std::span<StepItem> items) {
  batch_.rows = 0;
  batch_.sequences.clear();
  batch_.asked.clear();
  for (StepItem& item : items) {
    CachedSequence& cached = find(item.sequence);
    const auto count = static_cast<int32_t>(item.tokens.size());
    cache_.reserve(cached, cached.length + count);
    const auto row = static_cast<int32_t>(batch_.rows);
    batch_.sequences.push_back(
        {row, count, static_cast<int32_t>(cached.length), cached.blocks.data()});
    for (int32_t t = 0; t < count; ++t) {
      scratch_.tokens[row + t] = item.tokens[static_cast<size_t>(t)];
      const auto position = static_cast<int32_t>(cached.length) + t;
      scratch_.positions[row + t] = position;
      scratch_.blocks[row + t] = cached.blocks[static_cast<size_t>(position / kPagePositions)];
    }
    for (Wish& wish : item.wishes) {
      batch_.asked.push_back({row + static_cast<int32_t>(wish.row), &wish});
    }
    batch_.rows += count;
  }
}

void Engine::attend_layer(int64_t i, const Lane& lane) {
  const Layer& layer = weights_.layer(i);
  const Sequence* const sequences = batch_.sequences.data();
  const auto count = static_cast<int64_t>(batch_.sequences.size());
  table_.ln_qkv({precision_, scratch_.residual, scratch_.stride, layer.ln_1, layer.qkv,
                 scratch_.normed, scratch_.query, batch_.rows, scratch_.positions, scratch_.blocks,
                 layout_, i, scratch_.lanes, shape_.context},
                lane);
  lane.sync();
  table_.attention({precision_, scratch_.query, scratch_.attended, scratch_.stride, sequences,
                    count, layout_, i, shape_.attention_scale(i), scratch_.lanes, shape_.context},
                   lane);
  lane.sync();
  table_.linear_residual(
      {precision_, scratch_.attended, scratch_.stride, layer.attention_out, scratch_.residual,
       scratch_.stride, batch_.rows, scratch_.lanes, shape_.context},
      lane);
  lane.sync();
}

void Engine::forward(const Lane& lane) {
  table_.embed(
      {precision_, scratch_.tokens, scratch_.positions, weights_.embedding_rows(), weights_.head(),
       weights_.positions(), scratch_.stride, scratch_.residual, batch_.rows, shape_.width},
      lane);
  lane.sync();
  for (int64_t i = 0; i < shape_.layers; ++i) {
    attend_layer(i, lane);
    const Layer& layer = weights_.layer(i);
    table_.ln_fc_gelu(
        {precision_, scratch_.residual, scratch_.stride, layer.ln_2, layer.fc, scratch_.normed,
         scratch_.inner, scratch_.inner_stride, batch_.rows, scratch_.lanes, shape_.context},
        lane);
    lane.sync();
    table_.linear_residual(
        {precision_, scratch_.inner, scratch_.inner_stride, layer.mlp_out, scratch_.residual,
         scratch_.stride, batch_.rows, scratch_.lanes, shape_.context},
        lane);
    lane.sync();
  }
  answer(lane);
}

// Logits exist for kLogitRows rows at a time: copied out where they were wished, else drawn from.
void Engine::answer(const Lane& lane) {
  const auto total = static_cast<int64_t>(batch_.asked.size());
  for (int64_t begin = 0; begin < total; begin += kLogitRows) {
    const int64_t rows = std::min(kLogitRows, total - begin);
    table_.ln_head({precision_, scratch_.residual, scratch_.stride, asked_rows_.data() + begin,
                    weights_.final_norm(), weights_.head(), scratch_.normed, scratch_.logits,
                    scratch_.logit_stride, rows, scratch_.lanes, shape_.context},
                   lane);
    lane.sync();
    const Range mine = share(rows, 1, lane);
    for (int64_t r = mine.begin; r < mine.end; ++r) {
      const auto index = static_cast<size_t>(begin + r);
      const float* const logits = scratch_.logits + r * scratch_.logit_stride;
      float* const out = batch_.asked[index].wish->logits;
      if (out != nullptr) {
        std::memcpy(out, logits, static_cast<size_t>(shape_.vocab) * sizeof(float));
        continue;
      }
      const SampleArgs args{logits,
                            scratch_.logit_stride,
                            1,
                            shape_.vocab,
                            parameters_.data() + index,
                            tokens_.data() + index,
                            logprobs_.data() + index,
                            scratch_.draw + lane.rank * 2 * scratch_.logit_stride};
      table_.sample(args, Lane{});
    }
    lane.sync();
  }
}

void Engine::step(std::span<StepItem> items) {
  const std::lock_guard lock(mutex_);
  check_items(items);
  if (items.empty()) return;
  gather(items);
  asked_rows_.clear();
  parameters_.clear();
  for (const Asked& asked : batch_.asked) {
    asked_rows_.push_back(asked.row);
    parameters_.push_back(asked.wish->parameters);
  }
  tokens_.assign(batch_.asked.size(), -1);
  logprobs_.assign(batch_.asked.size(), 0.0f);
  pool_.run([this](const Lane& lane) { forward(lane); });
  for (size_t i = 0; i < batch_.asked.size(); ++i) {
    batch_.asked[i].wish->token = tokens_[i];
    batch_.asked[i].wish->logprob = logprobs_[i];
  }
  for (const StepItem& item : items) {
    find(item.sequence).length += static_cast<int64_t>(item.tokens.size());
  }
}

}  // namespace gpt2f

#include "engine/engine.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <set>
#include <utility>

#include "core/cpu_budget.h"
#include "core/error.h"

namespace gpt2f {
namespace {

// Refuses a model that cannot fit before any of it is allocated. The host's cache is committed as
// it is used, so only one sequence of it counts there; a device's is allocated whole.
const Shape& fitting(const Shape& shape, const Formats& formats, Place& place, int threads,
                     int64_t max_sequences) {
  const Plan plan = make_plan(shape, formats, place.table(), threads, max_sequences);
  const auto available =
      place.remote() ? place.free_memory() : static_cast<int64_t>(available_memory());
  const int64_t cache = place.remote() ? plan.cache : plan.cache / max_sequences;
  check(available == 0 || plan.weights + plan.scratch + cache <= available, ErrorKind::kCapacity,
        place.remote() ? "device memory: " : "memory: ", "weights take ", plan.weights,
        " bytes, scratch ", plan.scratch,
        place.remote() ? ", the cache of max_batch sequences " : ", the cache of one sequence ",
        cache, "; only ", available, " are available");
  return shape;
}

bool recording_wanted(const Place& place) {
  const char* const set = std::getenv("GPT2_FAST_CUDA_GRAPHS");
  return place.remote() && (set == nullptr || std::strcmp(set, "0") != 0);
}

}  // namespace

Engine::Engine(const Shape& shape, const Formats& formats, const KernelTable& table, int device,
               int threads, int64_t max_sequences)
    : shape_(shape),
      precision_(formats.precision),
      table_(table),
      place_(table, device, precision_, threads),
      weights_(fitting(shape_, formats, place_, threads, max_sequences), precision_, place_),
      scratch_(shape, formats, place_, max_sequences),
      layout_(shape.cache(formats, table)),
      cache_(place_, max_sequences * ((shape.context + kPagePositions - 1) / kPagePositions),
             layout_.block_words(shape.layers)),
      max_sequences_(max_sequences),
      record_(recording_wanted(place_)) {}

Engine::~Engine() {
  const PlaceGuard guard(place_);
  for (const auto& [sequences, recording] : recordings_) {
    if (recording != nullptr) place_.discard(recording);
  }
}

void Engine::load(const std::string& name, const StoredTensor& tensor) {
  const std::lock_guard lock(mutex_);
  const PlaceGuard guard(place_);
  weights_.load(name, tensor);
}

std::span<const std::byte> Engine::packed() {
  const std::lock_guard lock(mutex_);
  return weights_.packed();
}

void Engine::load_packed(PackedFile file) {
  const std::lock_guard lock(mutex_);
  weights_.load_packed(std::move(file));
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
  int64_t rows = 0, wishes = 0;
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
    wishes += static_cast<int64_t>(item.wishes.size());
  }
  check(rows <= table_.max_rows, ErrorKind::kParameter, "tokens: ", rows, " in one step; at most ",
        table_.max_rows);
  check(wishes <= table_.max_rows, ErrorKind::kParameter, "wishes: ", wishes,
        " in one step; at most ", table_.max_rows);
  weights_.check_complete();
}

// Rows in the order of items; of the asked, those that draw first.
void Engine::count(std::span<StepItem> items) {
  batch_ = {};
  Part& all = batch_.all;
  all.sequences = static_cast<int64_t>(items.size());
  int64_t first = INT64_MAX, end = 0;
  for (StepItem& item : items) {
    for (Wish& wish : item.wishes) {
      const int64_t row = all.rows + wish.row;
      first = std::min(first, row);
      end = std::max(end, row + 1);
      batch_.asked.push_back({static_cast<int32_t>(row), &wish});
    }
    const auto rows = static_cast<int64_t>(item.tokens.size());
    all.rows += rows;
    all.longest = std::max(all.longest, rows);
  }
  if (end > 0) {
    batch_.wanted.first = first;
    batch_.wanted.rows = end - first;
  }
  const auto logits =
      std::stable_partition(batch_.asked.begin(), batch_.asked.end(),
                            [](const Asked& a) { return a.wish->logits == nullptr; });
  batch_.draws = logits - batch_.asked.begin();
}

Control Engine::control_at(std::byte* memory) const {
  return {memory, batch_.all.rows, batch_.all.sequences, static_cast<int64_t>(batch_.asked.size()),
          (shape_.context + kPagePositions - 1) / kPagePositions};
}

void Engine::gather(std::span<StepItem> items) {
  const Control host = control_at(scratch_.host_control), there = control_at(scratch_.control);
  const int64_t width = (shape_.context + kPagePositions - 1) / kPagePositions;
  int32_t row = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    CachedSequence& cached = find(items[i].sequence);
    const auto rows = static_cast<int32_t>(items[i].tokens.size());
    const auto start = static_cast<int32_t>(cached.length);
    cache_.reserve(cached, start + rows);
    const int64_t table = static_cast<int64_t>(i) * width;
    std::copy(cached.blocks.begin(), cached.blocks.end(), host.tables + table);
    host.sequences[i] = {row, rows, start, there.tables + table};
    for (int32_t t = 0; t < rows; ++t) {
      host.tokens[row + t] = items[i].tokens[static_cast<size_t>(t)];
      host.positions[row + t] = start + t;
      host.blocks[row + t] = cached.blocks[static_cast<size_t>((start + t) / kPagePositions)];
    }
    row += rows;
  }
  Part& wanted = batch_.wanted;
  for (int64_t i = 0; i < batch_.all.sequences; ++i) {
    Sequence cut = host.sequences[i];
    const int64_t before = std::max<int64_t>(0, wanted.first - cut.row);
    const int64_t rows =
        std::min<int64_t>(cut.row + cut.rows, wanted.first + wanted.rows) - cut.row - before;
    if (rows <= 0) continue;
    cut.row += static_cast<int32_t>(before);
    cut.start += static_cast<int32_t>(before);
    cut.rows = static_cast<int32_t>(rows);
    host.wanted[wanted.sequences++] = cut;
    wanted.longest = std::max(wanted.longest, rows);
  }
  for (size_t a = 0; a < batch_.asked.size(); ++a) {
    const int32_t row_asked = batch_.asked[a].row;
    host.asked[a] = row_asked;
    host.parameters[a] = batch_.asked[a].wish->parameters;
    host.parameters[a].position = host.positions[row_asked] + 1;
  }
}

// Of the last layer nothing but keys, values and the rows asked for is used later.
void Engine::run_layer(int64_t i, const Control& control, const Lane& lane) {
  const Layer& layer = weights_.layer(i);
  table_.ln_qkv({precision_, scratch_.residual, scratch_.stride, layer.ln_1, layer.qkv,
                 scratch_.normed, scratch_.query, batch_.all.rows, control.positions,
                 control.blocks, layout_, i, scratch_.lanes, shape_.context, scratch_.projected},
                lane);
  lane.sync();
  const bool last = i + 1 == shape_.layers;
  const Part& part = last ? batch_.wanted : batch_.all;
  if (part.rows == 0) return;
  float* const residual = scratch_.residual + part.first * scratch_.stride;
  table_.attention(
      {precision_, scratch_.query, scratch_.attended, scratch_.stride,
       last ? control.wanted : control.sequences, part.sequences, layout_, i,
       shape_.attention_scale(i), scratch_.lanes, shape_.context, part.rows, part.longest},
      lane);
  lane.sync();
  const auto* const attended = static_cast<const std::byte*>(scratch_.attended) +
                               part.first * scratch_.stride * 4 / word_elements(precision_);
  table_.linear_residual(
      {precision_, attended, scratch_.stride, layer.attention_out, scratch_.normed, residual,
       scratch_.stride, part.rows, scratch_.lanes, shape_.context},
      lane);
  lane.sync();
  table_.ln_fc_gelu(
      {precision_, residual, scratch_.stride, layer.ln_2, layer.fc, scratch_.normed, scratch_.inner,
       scratch_.inner_stride, part.rows, scratch_.lanes, shape_.context},
      lane);
  lane.sync();
  table_.linear_residual(
      {precision_, scratch_.inner, scratch_.inner_stride, layer.mlp_out, scratch_.normed, residual,
       scratch_.stride, part.rows, scratch_.lanes, shape_.context},
      lane);
  lane.sync();
}

void Engine::forward(const Lane& lane) {
  const Control control = control_at(scratch_.control);
  table_.embed(
      {precision_, control.tokens, control.positions, weights_.embedding_rows(), weights_.head(),
       weights_.positions(), scratch_.stride, scratch_.residual, batch_.all.rows, shape_.width},
      lane);
  lane.sync();
  for (int64_t i = 0; i < shape_.layers; ++i) run_layer(i, control, lane);
  answer(control, lane);
}

// Logits exist for kLogitRows rows at a time: drawn from, or handed out where they were wished.
void Engine::answer(const Control& control, const Lane& lane) {
  const auto total = static_cast<int64_t>(batch_.asked.size());
  for (int64_t begin = 0; begin < total; begin += kLogitRows) {
    const int64_t rows = std::min(kLogitRows, total - begin);
    table_.ln_head({precision_, scratch_.residual, scratch_.stride, control.asked + begin,
                    weights_.final_norm(), weights_.head(), scratch_.normed, scratch_.logits,
                    scratch_.logit_stride, rows, scratch_.lanes, shape_.context,
                    control.parameters + begin, scratch_.parts},
                   lane);
    lane.sync();
    draw(control, begin, std::clamp<int64_t>(batch_.draws - begin, 0, rows), lane);
    const Range mine = share(rows, 1, lane);
    for (int64_t r = std::max(mine.begin, batch_.draws - begin); r < mine.end; ++r) {
      place_.download(batch_.asked[static_cast<size_t>(begin + r)].wish->logits,
                      scratch_.logits + r * scratch_.logit_stride, shape_.vocab * 4);
    }
    lane.sync();
  }
}

void Engine::draw(const Control& control, int64_t begin, int64_t rows, const Lane& lane) {
  if (rows == 0) return;
  table_.sample(
      {scratch_.logits, scratch_.logit_stride, rows, shape_.vocab, control.parameters + begin,
       control.drawn + begin, control.logprobs + begin, scratch_.draw, scratch_.parts},
      lane);
}

// The copies and kernels of one step.
void Engine::enqueue() {
  const Control host = control_at(scratch_.host_control);
  place_.upload(scratch_.control, scratch_.host_control, host.answers);
  place_.run([this](const Lane& lane) { forward(lane); });
  place_.download(scratch_.host_control + host.answers, scratch_.control + host.answers,
                  host.bytes - host.answers);
}

// A decode step, in which every sequence draws its next token, differs from the last one of as many
// sequences in its control data only: a device records it once and replays it.
void Engine::run() {
  const bool decode = batch_.all.rows == batch_.all.sequences && batch_.draws == batch_.all.rows &&
                      batch_.draws == static_cast<int64_t>(batch_.asked.size());
  if (!record_ || !decode) {
    enqueue();
  } else if (const auto [at, first] = recordings_.try_emplace(batch_.all.rows, nullptr); first) {
    enqueue();
  } else {
    if (at->second == nullptr) at->second = place_.record([this] { enqueue(); });
    place_.replay(at->second);
  }
  place_.finish();
}

void Engine::hand_out() {
  const Control host = control_at(scratch_.host_control);
  for (size_t i = 0; i < static_cast<size_t>(batch_.draws); ++i) {
    batch_.asked[i].wish->token = host.drawn[i];
    batch_.asked[i].wish->logprob = host.logprobs[i];
  }
}

void Engine::step(std::span<StepItem> items) {
  const std::lock_guard lock(mutex_);
  check_items(items);
  if (items.empty()) return;
  const PlaceGuard guard(place_);
  count(items);
  try {
    gather(items);
    run();
  } catch (...) {
    place_.drain();  // what is under way still reads and writes the callers' memory
    throw;
  }
  hand_out();
  for (const StepItem& item : items) {
    find(item.sequence).length += static_cast<int64_t>(item.tokens.size());
  }
}

}  // namespace gpt2f

#include "engine/weights.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "core/error.h"
#include "core/numbers.h"

namespace gpt2f {

// Hands out parts of one allocation; without memory it only counts.
class Weights::Arena {
 public:
  Arena(const KernelTable& table, std::byte* memory) : table_(table), memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    T* const at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  PackedLinear linear(Precision p, int64_t inputs, int64_t outputs) {
    PackedLinear out{nullptr, nullptr, inputs, outputs};
    out.bias = take<float>(round_up(outputs, kLanes));
    out.words = take<uint32_t>(table_.linear_words(p, inputs, outputs));
    return out;
  }
  LayernormParameters norm(int64_t width, float eps) {
    float* const weight = take<float>(round_up(width, table_.stride_unit));
    float* const bias = take<float>(round_up(width, table_.stride_unit));
    return {weight, bias, eps};
  }
  int64_t used() const { return used_; }

 private:
  const KernelTable& table_;
  std::byte* memory_;
  int64_t used_ = 0;
};

Weights::Weights(const Shape& shape, Precision precision, Place& place)
    : shape_(shape), precision_(precision), table_(place.table()), place_(&place) {
  bytes_ = bytes(shape, precision, place.table());
  memory_ = std::make_unique<Region>(place, Region::Kind::kPlace, bytes_, "weights");
  Arena arena(table_, memory_->as<std::byte>());
  lay_out(arena);
  name_targets();
}

int64_t Weights::bytes(const Shape& shape, Precision precision, const KernelTable& table) {
  Weights counter(shape, precision, table);
  Arena arena(table, nullptr);
  counter.lay_out(arena);
  return arena.used();
}

void Weights::lay_out(Arena& arena) {
  const int64_t c = shape_.width, row_words = stride() / word_elements(precision_);
  positions_ = arena.take<uint32_t>(shape_.context * row_words);
  if (!shape_.tied) embedding_rows_ = arena.take<uint32_t>(shape_.vocab * row_words);
  layers_.resize(static_cast<size_t>(shape_.layers));
  for (Layer& layer : layers_) {
    layer.ln_1 = arena.norm(c, shape_.eps);
    layer.qkv = arena.linear(precision_, c, 3 * c);
    layer.attention_out = arena.linear(precision_, c, c);
    layer.ln_2 = arena.norm(c, shape_.eps);
    layer.fc = arena.linear(precision_, c, shape_.inner);
    layer.mlp_out = arena.linear(precision_, shape_.inner, c);
  }
  final_norm_ = arena.norm(c, shape_.eps);
  head_ = arena.linear(precision_, c, shape_.vocab);
}

void Weights::name_targets() {
  const int64_t c = shape_.width;
  const auto linear = [this](const std::string& name, PackedLinear& to) {
    targets_[name + ".weight"] = {{to.inputs, to.outputs}, &to, false, nullptr, nullptr, false};
    targets_[name + ".bias"] = {{to.outputs}, nullptr, false, to.bias, nullptr, false};
  };
  const auto norm = [this, c](const std::string& name, const LayernormParameters& to) {
    targets_[name + ".weight"] = {{c},     nullptr, false, const_cast<float*>(to.weight),
                                  nullptr, false};
    targets_[name + ".bias"] = {{c}, nullptr, false, const_cast<float*>(to.bias), nullptr, false};
  };
  for (size_t i = 0; i < layers_.size(); ++i) {
    const std::string prefix = "h." + std::to_string(i) + ".";
    norm(prefix + "ln_1", layers_[i].ln_1);
    linear(prefix + "attn.c_attn", layers_[i].qkv);
    linear(prefix + "attn.c_proj", layers_[i].attention_out);
    norm(prefix + "ln_2", layers_[i].ln_2);
    linear(prefix + "mlp.c_fc", layers_[i].fc);
    linear(prefix + "mlp.c_proj", layers_[i].mlp_out);
  }
  norm("ln_f", final_norm_);
  targets_["wpe.weight"] = {{shape_.context, c}, nullptr, false, nullptr, positions_, false};
  const std::vector<int64_t> table = {shape_.vocab, c};
  if (shape_.tied) {
    targets_["wte.weight"] = {table, &head_, true, nullptr, nullptr, false};
  } else {
    targets_["wte.weight"] = {table, nullptr, false, nullptr, embedding_rows_, false};
    targets_["lm_head.weight"] = {table, &head_, true, nullptr, nullptr, false};
  }
}

void Weights::load(const std::string& name, const StoredTensor& tensor) {
  const auto found = targets_.find(name);
  check(found != targets_.end(), ErrorKind::kParameter, "load: no parameter is called '", name,
        "'");
  if (file_ != nullptr) {
    file_->finish();
    file_.reset();
  }
  Target& target = found->second;
  check(tensor.shape == target.shape, ErrorKind::kParameter, "load: ", name, " must have shape ",
        shape_text(target.shape), ", got ", shape_text(tensor.shape));
  if (target.linear != nullptr) {
    load_linear(name, tensor, target);
  } else if (target.values != nullptr) {
    load_values(name, tensor, target);
  } else {
    load_rows(name, tensor, target);
  }
  if (!target.loaded) ++loaded_;
  target.loaded = true;
}

namespace {

[[noreturn]] void fail_bad(const std::string& name, int64_t index, float value) {
  throw Error(ErrorKind::kCheckpoint, cat("tensor '", name, "': element ", index, " is ", value,
                                          "; weights must be finite"));
}

[[noreturn]] void fail_range(const std::string& name, int64_t index, float value) {
  throw Error(ErrorKind::kCheckpoint, cat("tensor '", name, "': element ", index, " is ", value,
                                          ", beyond float16's 65504; use precision 'bf16'"));
}

}  // namespace

// fill(memory) writes the bytes where the host can reach them; then they go to `to`.
template <typename Fill>
void Weights::place_bytes(void* to, int64_t bytes, const Fill& fill) {
  if (!place_->remote()) {
    fill(to);
    return;
  }
  const Buffer staging(static_cast<size_t>(bytes), "weights in preparation");
  fill(staging.as<void>());
  try {
    place_->upload(to, staging.as<void>(), bytes);
    place_->finish();
  } catch (...) {
    place_->drain();  // the copy reads what is about to be released
    throw;
  }
}

void Weights::load_linear(const std::string& name, const StoredTensor& tensor,
                          const Target& target) {
  const int64_t columns = tensor.shape[1];
  const PackedLinear& linear = *target.linear;
  std::atomic<int64_t> bad{INT64_MAX};
  const auto fill = [&](void* memory) {
    PackArgs args{precision_,
                  tensor.data,
                  tensor.type,
                  target.transposed ? 1 : columns,
                  target.transposed ? columns : 1,
                  linear,
                  &bad};
    args.linear.words = static_cast<uint32_t*>(memory);
    place_->pool().run([&](const Lane& lane) { table_.pack(args, lane); });
  };
  place_bytes(linear.words, table_.linear_words(precision_, linear.inputs, linear.outputs) * 4,
              fill);
  const int64_t index = bad.load();
  if (index == INT64_MAX) return;
  const float value = widen(tensor.data, tensor.type, index);
  if (std::isfinite(value)) fail_range(name, index, value);
  fail_bad(name, index, value);
}

void Weights::load_values(const std::string& name, const StoredTensor& tensor,
                          const Target& target) {
  place_bytes(target.values, tensor.shape[0] * 4, [&](void* memory) {
    float* const values = static_cast<float*>(memory);
    for (int64_t i = 0; i < tensor.shape[0]; ++i) {
      values[i] = widen(tensor.data, tensor.type, i);
      if (!std::isfinite(values[i])) fail_bad(name, i, values[i]);
    }
  });
}

void Weights::load_rows(const std::string& name, const StoredTensor& tensor, const Target& target) {
  const int64_t width = tensor.shape[1], row = stride(), rows = tensor.shape[0];
  const DType half = precision_ == Precision::kBf16   ? DType::kBF16
                     : precision_ == Precision::kFp16 ? DType::kF16
                                                      : table_.half;
  place_bytes(target.rows, rows * row * 4 / word_elements(precision_), [&](void* memory) {
    for (int64_t i = 0; i < rows * width; ++i) {
      const float value = widen(tensor.data, tensor.type, i);
      if (!std::isfinite(value)) fail_bad(name, i, value);
      const int64_t at = i / width * row + i % width;
      if (precision_ == Precision::kFp32) {
        static_cast<float*>(memory)[at] = value;
      } else if (half == DType::kBF16) {
        static_cast<uint16_t*>(memory)[at] = to_bf16(value);
      } else {
        if (!(std::fabs(value) < 65520.0f)) fail_range(name, i, value);
        static_cast<uint16_t*>(memory)[at] = to_f16(value);
      }
    }
  });
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (const auto& [name, target] : targets_) {
    if (!target.loaded) names.push_back(name);
  }
  return names;
}

void Weights::check_host(const char* what) const {
  check(!place_->remote(), ErrorKind::kParameter, what,
        ": packed weights are for the CPU, this model is on a device");
}

void Weights::check_complete() const {
  if (loaded_ < targets_.size()) {
    const std::vector<std::string> names = missing();
    throw Error(
        ErrorKind::kCheckpoint,
        cat("weights: ", names.size(), " parameters were not loaded, among them ", names.front()));
  }
  if (file_ != nullptr) file_->check();
}

std::span<const std::byte> Weights::packed() {
  check_host("packed");
  const std::vector<std::string> names = missing();
  check(names.empty(), ErrorKind::kParameter, "packed: ", names.size(),
        " parameters were not loaded, the first is '", names.empty() ? "" : names.front(), "'");
  if (file_ != nullptr) file_->finish();
  return {memory_->as<std::byte>(), static_cast<size_t>(bytes_)};
}

void Weights::load_packed(PackedFile file) {
  check_host("load_packed");
  check(file.bytes == bytes_, ErrorKind::kCheckpoint, "wanted ", bytes_,
        " bytes of packed weights, got ", file.bytes);
  for (auto& [name, target] : targets_) target.loaded = false;
  loaded_ = 0;
  file_.reset();
  file_ = std::make_unique<LoadedFile>(place_->pool(), std::move(file), memory_->as<std::byte>());
  for (auto& [name, target] : targets_) target.loaded = true;
  loaded_ = targets_.size();
}

}  // namespace gpt2f

#include "engine/weights.h"

#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/numbers.h"

namespace gpt2f {

// Hands out parts of one allocation; without memory it only counts.
class Weights::Arena {
 public:
  explicit Arena(std::byte* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    T* const at = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
  PackedLinear linear(Precision p, int64_t inputs, int64_t outputs) {
    PackedLinear out{nullptr, nullptr, inputs, outputs};
    out.bias = take<float>(round_up(outputs, kLanes));
    out.words = take<uint32_t>(out.word_count(p));
    return out;
  }
  LayernormParameters norm(int64_t width, float eps) {
    float* const weight = take<float>(round_up(width, kLanes));
    float* const bias = take<float>(round_up(width, kLanes));
    return {weight, bias, eps};
  }
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

namespace {

int64_t row_words(Precision p, int64_t width) { return round_up(width, kLanes) / word_elements(p); }

}  // namespace

Weights::Weights(const Shape& shape, Precision precision) : shape_(shape), precision_(precision) {
  memory_ = Buffer(static_cast<size_t>(bytes(shape, precision)), "weights");
  Arena arena(memory_.as<std::byte>());
  lay_out(arena);
  name_targets();
}

int64_t Weights::bytes(const Shape& shape, Precision precision) {
  Weights counter(shape, precision, nullptr);
  Arena arena(nullptr);
  counter.lay_out(arena);
  return arena.used();
}

void Weights::lay_out(Arena& arena) {
  const int64_t c = shape_.width;
  positions_ = arena.take<uint32_t>(shape_.context * row_words(precision_, c));
  if (!shape_.tied) {
    embedding_rows_ = arena.take<uint32_t>(shape_.vocab * row_words(precision_, c));
  }
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

void Weights::load(const std::string& name, const StoredTensor& tensor, const KernelTable& table,
                   ThreadPool& pool) {
  const auto found = targets_.find(name);
  check(found != targets_.end(), ErrorKind::kParameter, "load: no parameter is called '", name,
        "'");
  Target& target = found->second;
  check(tensor.shape == target.shape, ErrorKind::kParameter, "load: ", name, " must have shape ",
        shape_text(target.shape), ", got ", shape_text(tensor.shape));
  if (target.linear != nullptr) {
    load_linear(name, tensor, target, table, pool);
  } else if (target.values != nullptr) {
    load_values(name, tensor, target);
  } else {
    load_rows(name, tensor, target);
  }
  target.loaded = true;
}

namespace {

[[noreturn]] void fail_bad(const std::string& name, int64_t index, float value) {
  throw Error(ErrorKind::kCheckpoint, cat("tensor '", name, "': element ", index, " is ", value,
                                          "; weights must be finite"));
}

}  // namespace

void Weights::load_linear(const std::string& name, const StoredTensor& tensor, Target& target,
                          const KernelTable& table, ThreadPool& pool) {
  const int64_t columns = tensor.shape[1];
  std::atomic<int64_t> bad{INT64_MAX};
  const PackArgs args{precision_,
                      tensor.data,
                      tensor.type,
                      target.transposed ? 1 : columns,
                      target.transposed ? columns : 1,
                      *target.linear,
                      &bad};
  pool.run([&](const Lane& lane) { table.pack(args, lane); });
  const int64_t index = bad.load();
  if (index != INT64_MAX) fail_bad(name, index, widen(tensor.data, tensor.type, index));
}

void Weights::load_values(const std::string& name, const StoredTensor& tensor, Target& target) {
  for (int64_t i = 0; i < tensor.shape[0]; ++i) {
    target.values[i] = widen(tensor.data, tensor.type, i);
    if (!std::isfinite(target.values[i])) fail_bad(name, i, target.values[i]);
  }
}

void Weights::load_rows(const std::string& name, const StoredTensor& tensor, Target& target) {
  const int64_t width = tensor.shape[1], stride = round_up(width, kLanes);
  for (int64_t r = 0; r < tensor.shape[0]; ++r) {
    for (int64_t c = 0; c < width; ++c) {
      const float value = widen(tensor.data, tensor.type, r * width + c);
      if (!std::isfinite(value)) fail_bad(name, r * width + c, value);
      if (precision_ == Precision::kFp32) {
        static_cast<float*>(target.rows)[r * stride + c] = value;
      } else {
        static_cast<uint16_t*>(target.rows)[r * stride + c] = to_bf16(value);
      }
    }
  }
}

std::vector<std::string> Weights::missing() const {
  std::vector<std::string> names;
  for (const auto& [name, target] : targets_) {
    if (!target.loaded) names.push_back(name);
  }
  return names;
}

}  // namespace gpt2f

// The parameters of a model in the form kernels stream them, in one allocation, in the order of
// use.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/kernels.h"
#include "engine/packed_file.h"
#include "engine/place.h"
#include "engine/shape.h"

namespace gpt2f {

struct StoredTensor {
  const void* data;
  DType type;
  std::vector<int64_t> shape;
};

struct Layer {
  LayernormParameters ln_1, ln_2;
  PackedLinear qkv, attention_out, fc, mlp_out;
};

class Weights {
 public:
  Weights(const Shape& shape, Precision precision, Place& place);

  static int64_t bytes(const Shape& shape, Precision precision, const KernelTable& table);

  // Packs one parameter, named as in Hugging Face checkpoints without `transformer.`; linear
  // weights are [in, out]. Throws Error: kParameter for an unknown name or wrong shape, kCheckpoint
  // for a NaN or an infinity.
  void load(const std::string& name, const StoredTensor& tensor);
  std::vector<std::string> missing() const;

  // All parameters as they lie in memory, the same for every instruction set, for load_packed().
  // Throws Error: kParameter where the weights are not on the host or a parameter is missing, and
  // as LoadedFile::finish().
  std::span<const std::byte> packed();
  // In place of load(): what packed() gave for the same shape and precision. Throws Error:
  // kParameter where the weights are not on the host, kCheckpoint for a wrong size and as
  // LoadedFile; every parameter is missing then.
  void load_packed(PackedFile file);
  // Throws Error (kCheckpoint) where a parameter is missing, and as LoadedFile::check().
  void check_complete() const;

  const Layer& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const LayernormParameters& final_norm() const { return final_norm_; }
  const PackedLinear& head() const { return head_; }
  const void* embedding_rows() const { return embedding_rows_; }  // null when tied
  const void* positions() const { return positions_; }

 private:
  struct Target {
    std::vector<int64_t> shape;
    PackedLinear* linear = nullptr;  // packed matrix ...
    bool transposed = false;         // ... from [out, in]
    float* values = nullptr;         // or floats
    void* rows = nullptr;            // or operand rows
    bool loaded = false;
  };
  class Arena;

  // For counting bytes only: has no memory.
  Weights(const Shape& shape, Precision precision, const KernelTable& table)
      : shape_(shape), precision_(precision), table_(table) {}

  void check_host(const char* what) const;
  void lay_out(Arena& arena);
  void name_targets();
  int64_t stride() const { return round_up(shape_.width, table_.stride_unit); }
  void load_linear(const std::string& name, const StoredTensor& tensor, const Target& target);
  void load_values(const std::string& name, const StoredTensor& tensor, const Target& target);
  void load_rows(const std::string& name, const StoredTensor& tensor, const Target& target);
  template <typename Fill>
  void place_bytes(void* to, int64_t bytes, const Fill& fill);

  Shape shape_;
  Precision precision_;
  const KernelTable& table_;
  Place* place_ = nullptr;
  int64_t bytes_ = 0;
  std::unique_ptr<Region> memory_;
  std::unique_ptr<LoadedFile> file_;  // null unless load_packed() filled the memory
  std::vector<Layer> layers_;
  LayernormParameters final_norm_{};
  PackedLinear head_;
  void* embedding_rows_ = nullptr;
  void* positions_ = nullptr;
  std::map<std::string, Target> targets_;
  size_t loaded_ = 0;  // of them; each step asks, and a walk through them costs 90 us at 774M
};

}  // namespace gpt2f

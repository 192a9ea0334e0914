#include "engine/shape.h"

#include <cmath>

#include "core/error.h"
#include "engine/scratch.h"
#include "engine/weights.h"

namespace gpt2f {

float Shape::attention_scale(int64_t layer) const {
  double scale = scale_scores ? 1.0 / std::sqrt(static_cast<double>(head_size())) : 1.0;
  if (scale_by_layer) scale /= static_cast<double>(layer + 1);
  return static_cast<float>(scale);
}

CacheLayout Shape::cache(const Formats& formats, const KernelTable& table) const {
  if (formats.int8_cache) {
    const int64_t query = table.quantized_row_words(Precision::kInt8, head_size());
    return CacheLayout::of_int8(heads, head_size(), query);
  }
  return {formats.precision, heads, head_size(), table.key_unit, table.value_unit};
}

void Shape::validate() const {
  const auto in = [](const char* name, int64_t value, int64_t most) {
    check(value >= 1 && value <= most, ErrorKind::kParameter, name, " must be in 1..", most,
          ", got ", value);
  };
  // Ceilings far above any GPT-2, far below where a product of two dimensions could overflow.
  in("n_layer", layers, 1024);
  in("n_embd", width, 65536);
  in("n_head", heads, 4096);
  in("n_ctx", context, 1 << 20);
  in("vocab_size", vocab, 1 << 24);
  in("n_inner", inner, 1 << 20);
  check(width % heads == 0, ErrorKind::kParameter,
        "n_embd must be divisible by n_head, got n_embd ", width, ", n_head ", heads);
  check(eps > 0.0f && eps < 1.0f, ErrorKind::kParameter,
        "layer_norm_epsilon must be in (0, 1), got ", eps);
}

Plan make_plan(const Shape& shape, const Formats& formats, const KernelTable& table, int threads,
               int64_t max_sequences) {
  shape.validate();
  check(!formats.int8_cache || table.device == nullptr, ErrorKind::kParameter,
        "kv_precision must be None on CUDA, got 'int8', which is for the CPU");
  check(max_sequences >= 1 && max_sequences <= 65536, ErrorKind::kParameter,
        "max_batch must be in 1..65536, got ", max_sequences);
  const int64_t block = shape.cache(formats, table).block_words(shape.layers) * 4;
  const int64_t blocks = max_sequences * ((shape.context + kPagePositions - 1) / kPagePositions);
  return {Weights::bytes(shape, formats.precision, table), blocks * block, block,
          Scratch::bytes(shape, formats, table, threads, max_sequences)};
}

}  // namespace gpt2f

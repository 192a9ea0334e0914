#include "engine/scratch.h"

#include <algorithm>

namespace gpt2f {
namespace {

// Hands out parts of one piece of memory; without memory only the sizes count.
class Cutter {
 public:
  explicit Cutter(std::byte* memory) : memory_(memory) {}

  template <typename T>
  void take(T*& pointer, int64_t bytes) {
    pointer = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + used_);
    used_ += round_up(bytes, 64);
  }
  int64_t used() const { return used_; }

 private:
  std::byte* memory_;
  int64_t used_ = 0;
};

int64_t table_width(const Shape& shape) {
  return (shape.context + kPagePositions - 1) / kPagePositions;
}

int64_t control_bytes(const Shape& shape, const KernelTable& table, int64_t max_sequences) {
  const int64_t rows = table.max_rows;
  return Control(nullptr, rows, std::min(rows, max_sequences), rows, table_width(shape)).bytes;
}

}  // namespace

Control::Control(std::byte* memory, int64_t row_count, int64_t sequence_count, int64_t asked_count,
                 int64_t width) {
  Cutter cut(memory);
  cut.take(tokens, row_count * 4);
  cut.take(positions, row_count * 4);
  cut.take(blocks, row_count * 8);
  cut.take(sequences, sequence_count * static_cast<int64_t>(sizeof(Sequence)));
  cut.take(wanted, sequence_count * static_cast<int64_t>(sizeof(Sequence)));
  cut.take(tables, sequence_count * width * 8);
  cut.take(asked, asked_count * 4);
  cut.take(parameters, asked_count * static_cast<int64_t>(sizeof(SampleParameters)));
  answers = cut.used();
  cut.take(drawn, asked_count * 4);
  cut.take(logprobs, asked_count * 4);
  bytes = cut.used();
}

Scratch::Scratch(const Shape& shape, const Formats& formats, Place& place, int64_t max_sequences) {
  const KernelTable& table = place.table();
  const int threads = place.remote() ? 1 : place.pool().size();
  const int64_t size = bytes(shape, formats, table, threads, max_sequences);
  memory_ = std::make_unique<Region>(place, Region::Kind::kPlace, size, "scratch");
  lay_out(shape, formats, table, threads, max_sequences, memory_->as<std::byte>());
  host_control = control;
  if (place.remote()) {
    host_ = std::make_unique<Region>(place, Region::Kind::kHost,
                                     control_bytes(shape, table, max_sequences), "control");
    host_control = host_->as<std::byte>();
  }
}

int64_t Scratch::bytes(const Shape& shape, const Formats& formats, const KernelTable& table,
                       int threads, int64_t max_sequences) {
  Scratch counter;
  return counter.lay_out(shape, formats, table, table.device == nullptr ? threads : 1,
                         max_sequences, nullptr);
}

int64_t Scratch::lay_out(const Shape& shape, const Formats& formats, const KernelTable& table,
                         int threads, int64_t max_sequences, std::byte* memory) {
  stride = round_up(shape.width, table.stride_unit);
  inner_stride = round_up(shape.inner, table.stride_unit);
  logit_stride = round_up(shape.vocab, table.stride_unit);
  const Precision precision = formats.precision;
  const int64_t element = 4 / word_elements(precision), rows = table.max_rows;
  const int64_t parts_of_row = table.head_parts(shape.vocab);
  Cutter cut(memory);
  cut.take(control, control_bytes(shape, table, max_sequences));
  cut.take(residual, rows * stride * 4);
  const auto quantized = [&](int64_t inputs) {
    return rows * table.quantized_row_words(precision, inputs) * 4;
  };
  cut.take(normed,
           std::max({rows * stride * element, quantized(shape.width), quantized(shape.inner)}));
  cut.take(query, rows * shape.heads * shape.cache(formats, table).key_steps * 4);
  cut.take(projected, formats.int8_cache ? rows * round_up(3 * shape.width, kLanes) * element : 0);
  cut.take(attended, rows * stride * element);
  cut.take(inner, rows * inner_stride * element);
  cut.take(logits, kLogitRows * logit_stride * 4);
  cut.take(parts, kLogitRows * parts_of_row * static_cast<int64_t>(sizeof(HeadPart)));
  if (parts_of_row == 0) parts = nullptr;
  cut.take(draw, table.device == nullptr ? threads * 2 * logit_stride * 4 : 0);
  cut.take(lanes,
           threads * 4 *
               table.scratch_floats({shape.heads, shape.head_size(), shape.context, shape.vocab}));
  return cut.used();
}

}  // namespace gpt2f

// Runs kernels of one instruction set on fixed data and prints a checksum of each result, so that
// tests/native/test_elsewhere.py can compare processors that do not live in the same machine.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "core/fp_state.h"
#include "core/kernels.h"
#include "core/numbers.h"
#include "cpu/isa.h"

namespace gpt2f {
void Barrier::wait(int) {}
}  // namespace gpt2f

namespace {

using gpt2f::DType;

uint32_t state = 1;

float next() {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
}

template <typename T>
std::vector<T> filled(size_t count, float scale) {
  std::vector<T> out(count);
  for (T& each : out) {
    const float value = next() * scale;
    if constexpr (sizeof(T) == 4) {
      each = value;
    } else {
      each = gpt2f::to_bf16(value);
    }
  }
  return out;
}

template <typename T>
void report(const char* name, const char* type, const std::vector<T>& data) {
  uint64_t hash = 14695981039346656037ull;
  const auto* const bytes = reinterpret_cast<const unsigned char*>(data.data());
  for (size_t i = 0; i < data.size() * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211ull;
  std::printf("%s %s %016llx\n", name, type, static_cast<unsigned long long>(hash));
}

template <typename T>
void report(const char* name, DType type, const std::vector<T>& data) {
  report(name, type == DType::kF32 ? "fp32" : "bf16", data);
}

template <typename T>
void run(const gpt2f::KernelTable& table, DType type) {
  const gpt2f::Lane lane;
  std::vector<float> scratch(static_cast<size_t>(gpt2f::scratch_floats(1024)));
  {
    const int64_t rows = 7, k = 331, n = 77;
    auto x = filled<T>(rows * k, 1), w = filled<T>(n * k, 0.1f), res = filled<T>(rows * n, 1);
    auto bias = filled<float>(n, 1);
    std::vector<T> out(rows * n), operand(rows * 336);
    std::vector<uint32_t> packed(80 * k + 16);
    std::vector<float> padded(80);
    table.linear({type, x.data(), w.data(), bias.data(), res.data(), true, out.data(), rows, k, n,
                  operand.data(), packed.data(), padded.data(), scratch.data()},
                 lane);
    report("linear", type, out);
  }
  {
    const int64_t rows = 5, c = 101;
    auto x = filled<T>(rows * c, 30);
    auto weight = filled<float>(c, 1), bias = filled<float>(c, 1);
    std::vector<T> out(rows * c);
    table.layernorm({type,
                     x.data(),
                     nullptr,
                     {weight.data(), bias.data(), 1e-5f},
                     out.data(),
                     rows,
                     c,
                     scratch.data()},
                    lane);
    report("layernorm", type, out);
  }
  {
    auto x = filled<T>(1003, 12);
    std::vector<T> out(x.size());
    table.gelu({type, x.data(), out.data(), static_cast<int64_t>(x.size())}, lane);
    report("gelu", type, out);
  }
  // The second is large, all its keys count, and its values are of very different size: results are
  // rounded to bfloat16, which else hides what another order of sums does.
  for (const bool large : {false, true}) {
    const int64_t b = large ? 4 : 2, h = large ? 8 : 3, t = large ? 60 : 9, s = 77;
    const int64_t d = large ? 64 : 20;
    auto q = filled<T>(b * h * t * d, 3), k = filled<T>(b * h * s * d, 3);
    auto v = filled<T>(b * h * s * d, 1);
    for (size_t i = 0; large && i < v.size(); ++i) {
      v[i] = filled<T>(1, std::ldexp(1.0f, -static_cast<int>(state >> 28)))[0];
    }
    std::vector<T> out(b * h * t * d);
    std::vector<uint32_t> pages(1 << 16);
    table.dense_attention({type, q.data(), k.data(), v.data(), nullptr, out.data(), b, h, t, s, d,
                           large ? 0.02f : 0.3f, pages.data(), 1 << 16, scratch.data()},
                          lane);
    report("attention", type, out);
  }
}

// Every height of a tile; a width that fills neither a group nor a panel; a spoilt row.
void run_quantized(const gpt2f::KernelTable& table, gpt2f::Precision precision, const char* name) {
  const gpt2f::Lane lane;
  const int64_t most = 9, k = 331, n = 77, stride = 336;
  const auto weight = filled<float>(n * k, 0.1f);
  auto bias = filled<float>(80, 1);
  std::vector<uint32_t> words(static_cast<size_t>(table.linear_words(precision, k, n)));
  const gpt2f::PackedLinear linear{words.data(), bias.data(), k, n};
  std::atomic<int64_t> bad{INT64_MAX};
  table.pack({precision, weight.data(), DType::kF32, 1, k, linear, &bad}, lane);
  report("pack", name, words);
  auto x = filled<uint16_t>(most * stride, 3);
  for (int64_t i = 0; i < most * stride; ++i) {
    if (i % stride >= k) x[static_cast<size_t>(i)] = 0;
  }
  x[8 * stride + 70] = 0x7F80;  // infinity
  std::vector<float> scratch(static_cast<size_t>(gpt2f::scratch_floats(1024)));
  std::vector<uint32_t> operand(
      static_cast<size_t>(gpt2f::kRowBlock * table.quantized_row_words(precision, k)));
  for (int64_t rows = 1; rows <= most; ++rows) {
    std::vector<float> residual(static_cast<size_t>(rows * 80), 0.5f);
    table.linear_residual({precision, x.data(), stride, linear, operand.data(), residual.data(), 80,
                           rows, scratch.data(), 1024},
                          lane);
    report("linear_residual", name, residual);
  }
}

// An int8 cache of one layer: 37 positions of a sequence, 3 heads, as every tile of queries sees
// it.
void run_cache(const gpt2f::KernelTable& table, int64_t head_size) {
  const gpt2f::Lane lane;
  const int64_t heads = 3, rows = 37, width = heads * head_size, context = 48;
  const int64_t stride = gpt2f::round_up(width, 16), outputs = gpt2f::round_up(3 * width, 16);
  const auto precision = gpt2f::Precision::kBf16;
  const auto weight = filled<float>(static_cast<size_t>(3 * width * width), 0.1f);
  const auto gain = filled<float>(static_cast<size_t>(stride), 1);
  const auto residual = filled<float>(static_cast<size_t>(rows * stride), 9);
  auto bias = filled<float>(static_cast<size_t>(outputs), 1);
  std::vector<uint32_t> packed(
      static_cast<size_t>(table.linear_words(precision, width, 3 * width)));
  const gpt2f::PackedLinear linear{packed.data(), bias.data(), width, 3 * width};
  std::atomic<int64_t> bad{INT64_MAX};
  table.pack({precision, weight.data(), DType::kF32, 1, width, linear, &bad}, lane);

  const auto cache = gpt2f::CacheLayout::of_int8(
      heads, head_size, table.quantized_row_words(gpt2f::Precision::kInt8, head_size));
  const int64_t block_words = cache.block_words(1);
  std::vector<uint32_t> pages(static_cast<size_t>(context / 16 * block_words));
  std::vector<uint32_t*> blocks, row_blocks;
  std::vector<int32_t> positions;
  for (int64_t j = 0; j < context / 16; ++j) blocks.push_back(pages.data() + j * block_words);
  for (int32_t r = 0; r < rows; ++r) {
    positions.push_back(r);
    row_blocks.push_back(blocks[static_cast<size_t>(r / 16)]);
  }
  std::vector<uint16_t> normed(static_cast<size_t>(rows * stride));
  std::vector<uint16_t> projected(static_cast<size_t>(rows * outputs));
  std::vector<uint32_t> query(static_cast<size_t>(rows * heads * cache.key_steps));
  std::vector<float> scratch(static_cast<size_t>(gpt2f::scratch_floats(context)));
  table.ln_qkv({precision,
                residual.data(),
                stride,
                {gain.data(), gain.data(), 1e-5f},
                linear,
                normed.data(),
                query.data(),
                rows,
                positions.data(),
                row_blocks.data(),
                cache,
                0,
                scratch.data(),
                context,
                projected.data()},
               lane);
  report("ln_qkv", "int8 cache", pages);
  const gpt2f::Sequence sequence{0, rows, 0, blocks.data()};
  std::vector<uint16_t> out(static_cast<size_t>(rows * stride));
  table.attention({precision, query.data(), out.data(), stride, &sequence, 1, cache, 0, 0.3f,
                   scratch.data(), context, rows, rows},
                  lane);
  report("attention", "int8 cache", out);
}

void run_sample(const gpt2f::KernelTable& table) {
  const int64_t rows = 40, vocab = 1003;
  auto logits = filled<float>(rows * vocab, 6);
  std::vector<gpt2f::SampleParameters> parameters(rows);
  for (size_t r = 0; r < parameters.size(); ++r) {
    parameters[r].temperature = 0.2f * static_cast<float>(r % 8);
    parameters[r].top_k = r % 3 == 0 ? 20 : 0;
    parameters[r].top_p = r % 2 == 0 ? 0.8f : 1.0f;
    parameters[r].min_p = r % 5 == 0 ? 0.01f : 0.0f;
    parameters[r].openai_top_p = r % 4 == 0;
    parameters[r].seed = r * 0x123456789ull;
    parameters[r].position = static_cast<int64_t>(r);
  }
  std::vector<int32_t> tokens(rows);
  std::vector<float> logprobs(rows), scratch(2 * 1008);
  table.sample({logits.data(), vocab, rows, vocab, parameters.data(), tokens.data(),
                logprobs.data(), scratch.data()},
               gpt2f::Lane{});
  report("sample", DType::kF32, tokens);
  report("logprobs", DType::kF32, logprobs);
}

}  // namespace

int main() {
  const gpt2f::FpState fp;
  const gpt2f::KernelTable& table = *gpt2f::GPT2F_TABLE();
  run<float>(table, DType::kF32);
  run<uint16_t>(table, DType::kBF16);
  run_quantized(table, gpt2f::Precision::kInt8, "int8");
  run_quantized(table, gpt2f::Precision::kInt4, "int4");
  run_cache(table, 20);
  run_cache(table, 80);
  run_sample(table);
}

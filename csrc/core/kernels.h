// The contract between the engine and a backend: one plain struct of arguments per kernel, one
// table of functions per backend. The maths and shapes stand here; layouts and splits of work stand
// with each kernel.
//
// Letters: R rows (new tokens of all sequences together), C width, H heads, D head size, I inner
// width, V vocabulary, K inputs and N outputs of a product, S positions a row attends to.
//
// Operand: rows that a product consumes, float (fp32), bfloat16 (bf16), float16 (fp16) or
// KernelTable::half (int8, int4), with a row stride that is a multiple of KernelTable::stride_unit
// elements and zeros behind the last one. Float rows have the same kind of stride. Products are
// summed in blocks of fixed size along K, each block in order of k, the block sums in order: a
// value depends on nothing but its own row and column.
//
// Pointers are the backend's: on CUDA everything an Args struct points to is device memory.
#pragma once

#include <atomic>
#include <cstdint>

#include "core/device.h"
#include "core/dtype.h"
#include "core/lane.h"

namespace gpt2f {

// A weight matrix in the backend's own order, KernelTable::linear_words words. On the CPU: words
// [group][step][panel of the group][16 outputs]; a group is up to four panels, a step one operand
// word of K (int8, int4: cpu/quantized.inl.h), outputs padded to whole panels with zeros. On CUDA:
// cuda/layout.h.
struct PackedLinear {
  uint32_t* words = nullptr;
  float* bias = nullptr;  // (round_up(N, 16)), zeros behind N
  int64_t inputs = 0;  // K
  int64_t outputs = 0;  // N

  int64_t panels() const { return (outputs + kLanes - 1) / kLanes; }
};

struct LayernormParameters {
  const float* weight;  // (C)
  const float* bias;  // (C)
  float eps;  // added to the variance
};

// New tokens of one sequence: rows [row, row + rows) are its positions start, start + 1, ...
struct Sequence {
  int32_t row;
  int32_t rows;
  int32_t start;
  uint32_t* const* blocks;  // block j holds positions 16 j ... 16 j + 15 of all layers and heads
};

// Int8 keys: elements along D that share a scale, and words of one such group of a page.
constexpr int64_t kKeyGroup = 64;
constexpr int64_t kKeyGroupWords = (kKeyGroup * kPagePositions + 2 * kPagePositions) / 4;

// Where the page of one layer and head lies in a block, K words, then V words
// [position or pair of positions][value_width]. K on the CPU: [step][16 positions]; on CUDA:
// [16 positions][step], where head sizes are padded to a multiple of 32 with zeros (unit 32). An
// int8 cache, on the CPU only: cpu/cache_int8.inl.h.
struct CacheLayout {
  int64_t heads;  // H
  int64_t head_size;  // D
  int64_t key_steps;  // operand words of one query, and of one key that is not int8
  int64_t value_rows;  // 16 positions, or 8 pairs
  int64_t value_width;  // D rounded up
  bool int8 = false;

  CacheLayout(Precision p, int64_t heads_, int64_t head_size_, int64_t key_unit = 1,
              int64_t value_unit = kLanes)
      : heads(heads_),
        head_size(head_size_),
        key_steps(words(p, round_up(head_size_, key_unit))),
        value_rows(kPagePositions / word_elements(p)),
        value_width(round_up(head_size_, value_unit)) {}
  static CacheLayout of_int8(int64_t heads, int64_t head_size, int64_t query_words) {
    CacheLayout layout(Precision::kFp32, heads, head_size);
    layout.key_steps = query_words;
    layout.int8 = true;
    return layout;
  }
  int64_t key_groups() const { return (head_size + kKeyGroup - 1) / kKeyGroup; }  // of int8
  int64_t key_words() const {
    return int8 ? key_groups() * kKeyGroupWords : key_steps * kPagePositions;
  }
  int64_t value_words() const {
    return int8 ? value_rows * value_width / 4 + kPagePositions / 2 : value_rows * value_width;
  }
  int64_t page_words() const { return key_words() + value_words(); }
  int64_t block_words(int64_t layers) const { return layers * heads * page_words(); }
  int64_t page_offset(int64_t layer, int64_t head) const {
    return (layer * heads + head) * page_words();
  }
};

// residual[r] = wte[token[r]] + wpe[position[r]], both as stored (fp32 or bf16).
struct EmbedArgs {
  Precision precision;
  const int32_t* tokens;  // (R)
  const int32_t* positions;  // (R)
  const void* rows_table;  // wte row by row (V, stride), or null: then it is the packed head
  PackedLinear packed_table;
  const void* wpe;  // (n_ctx, stride)
  int64_t stride;  // round_up(C, 16)
  float* residual;  // (R, stride)
  int64_t rows;
  int64_t width;  // C
};

// [q k v] = layernorm(residual) W + b; q is kept, k and v are appended to the pages.
struct LnQkvArgs {
  Precision precision;
  const float* residual;  // (R, stride)
  int64_t stride;
  LayernormParameters norm;
  PackedLinear linear;  // C -> 3 C
  void* normed;  // operand (max_rows, stride), scratch
  uint32_t* query;  // words (R, H, key_steps)
  int64_t rows;
  const int32_t* positions;  // (R)
  uint32_t* const* blocks;  // (R) the block that holds each row's position
  CacheLayout cache;
  int64_t layer;
  float* scratch;  // per lane scratch_floats(context)
  int64_t context;
  void* projected = nullptr;  // operand (R, round_up(3 C, 16)), scratch of an int8 cache
};

// out[r, h] = sum_j softmax_j(scale q[r, h] . k[j, h]) v[j, h], j = 0 ... position of r.
struct AttentionArgs {
  Precision precision;
  const uint32_t* query;  // words (R, H, key_steps)
  void* out;  // operand (R, stride)
  int64_t stride;  // round_up(C, 16)
  const Sequence* sequences;
  int64_t sequence_count;
  CacheLayout cache;
  int64_t layer;
  float scale;
  float* scratch;
  int64_t context;  // n_ctx: sizes the lane's part of scratch
  int64_t rows;  // R
  int64_t longest;  // most rows of one sequence
};

// residual[r] += x[r] W + b.
struct LinearResidualArgs {
  Precision precision;
  const void* x;  // operand (R, x_stride)
  int64_t x_stride;
  PackedLinear linear;  // K -> C
  void* operand;  // scratch (max_rows, quantized_row_words)
  float* residual;  // (R, stride)
  int64_t stride;
  int64_t rows;
  float* scratch;
  int64_t context;
};

// out = gelu(layernorm(residual) W + b), gelu in the tanh form.
struct LnFcGeluArgs {
  Precision precision;
  const float* residual;  // (R, stride)
  int64_t stride;
  LayernormParameters norm;
  PackedLinear linear;  // C -> I
  void* normed;  // operand (max_rows, stride), scratch
  void* out;  // operand (R, out_stride)
  int64_t out_stride;
  int64_t rows;
  float* scratch;
  int64_t context;
};

struct SampleParameters;

// What a backend that fuses sampling into the head knows of one part of a row of logits.
struct HeadPart {
  float best;  // of logit (greedy) or logit / T + noise, among the drawable
  int32_t id;  // its token, -1 if none is above minus infinity
  float highest;  // largest logit; NaN if one is NaN
  float sum;  // of exp(logit - highest)
};

// logits[a] = layernorm(residual[asked[a]]) W^T, for the rows asked only.
struct LnHeadArgs {
  Precision precision;
  const float* residual;  // (R, stride)
  int64_t stride;
  const int32_t* asked;  // (rows) row numbers
  LayernormParameters norm;
  PackedLinear linear;  // C -> V; its bias is zero
  void* normed;  // operand (max_rows, stride), scratch
  float* logits;  // (rows, logit_stride)
  int64_t logit_stride;
  int64_t rows;
  float* scratch;
  int64_t context;
  const SampleParameters* parameters;  // (rows) of the draw that follows; the CPU needs none
  HeadPart* parts;  // (rows, KernelTable::head_parts), or null where there are none
};

// How to turn one row of logits into a token. See gpt2_fast/reference.py, sample, for the rules.
struct SampleParameters {
  float temperature = 1.0f;  // 0: argmax
  float top_p = 1.0f;
  float min_p = 0.0f;
  int32_t top_k = 0;  // 0: off
  bool openai_top_p = false;  // drop the token that crosses top_p
  uint64_t seed = 0;
  uint32_t sample = 0;  // number of this sample among n
  int64_t position = 0;  // of the token being drawn
  int32_t target = -1;  // >= 0: draw nothing, give this token's log-probability
  int64_t drawable = 0;  // ids below this may be drawn; 0: all (vocabularies can be padded)
};

// token[r] and its log-probability under the model (T = 1, unfiltered); -1 and NaN if a logit is
// NaN.
struct SampleArgs {
  const float* logits;  // (rows, stride)
  int64_t stride;
  int64_t rows;
  int64_t vocab;
  const SampleParameters* parameters;  // (rows)
  int32_t* tokens;
  float* logprobs;
  float* scratch;  // per lane: 2 round_up(V, 16) floats
  const HeadPart* parts;  // from ln_head, or null
};

// Copies a matrix into its packed form. Source element (k, n) is at k * k_stride + n * n_stride.
struct PackArgs {
  Precision precision;
  const void* source;
  DType source_type;
  int64_t k_stride;
  int64_t n_stride;
  PackedLinear linear;
  std::atomic<int64_t>* bad;  // lowest source offset of a NaN or infinity; starts at INT64_MAX
};

// The kernels as single operations on plain tensors of `type` (F32 or BF16), for gpt2_fast/ops.py.
struct LayernormArgs {
  DType type;
  void* x;  // (rows, C); with delta it becomes x + delta
  const void* delta;  // (rows, C) or null
  LayernormParameters norm;
  void* out;
  int64_t rows;
  int64_t width;
  float* scratch;  // per lane round_up(C, 16) floats
};

struct GeluArgs {
  DType type;
  const void* x;
  void* out;
  int64_t count;
};

// out = epilogue(x W^T + bias); W is (N, K). The residual is added last.
struct LinearArgs {
  DType type;
  const void* x;  // (rows, K)
  const void* weight;  // (N, K)
  const float* bias;  // (N) or null
  const void* residual;  // (rows, N) or null
  bool gelu;
  void* out;  // (rows, N)
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  void* operand;  // scratch (rows, round_up(K, stride_unit)) elements
  uint32_t* packed;  // scratch (round_up(N, 16), round_up(K, stride_unit)) words
  float* padded_bias;  // scratch (round_up(N, 16))
  float* scratch;
};

// As sample, with parameters and results as tensors of the device, which the host cannot look at:
// a row whose parameters are out of range gives -1 and NaN.
struct OpSampleArgs {
  const float* logits;  // (rows, V)
  int64_t rows;
  int64_t vocab;
  const float* temperature;  // (rows), as all that follow
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  bool openai_top_p;
  const int64_t* seeds;
  const int64_t* samples;
  const int64_t* positions;
  int64_t* tokens;
  float* logprobs;
  SampleParameters* parameters;  // scratch (rows)
  int32_t* drawn;  // scratch (rows)
  float* scratch;  // (rows, head_parts) HeadParts
};

// Query t of sequence b attends keys 0 ... lengths[b] - T + t.
struct DenseAttentionArgs {
  DType type;
  const void* query;  // (B, H, T, D)
  const void* key;  // (B, H, S, D)
  const void* value;  // (B, H, S, D)
  const int32_t* lengths;  // (B) in 1 ... S, or null: all S
  void* out;  // (B, H, T, D)
  int64_t batch, heads, queries, keys, head_size;
  float scale;
  uint32_t* pages;  // scratch per lane: pages, then queries, then the page table
  int64_t pages_words;  // per lane
  float* scratch;
};

struct OpEmbedArgs {
  DType type;
  const int64_t* tokens;  // (R)
  const int64_t* positions;  // (R)
  const void* wte;  // (V, C)
  const void* wpe;  // (n_ctx, C)
  void* out;  // (R, C)
  int64_t rows;
  int64_t width;
  int64_t vocab;  // a device answers an id outside with a row of NaN
  int64_t contexts;  // n_ctx
};

constexpr int64_t kRowBlock = 256;  // rows a product takes at a time
constexpr int64_t kQueryTile = 6;  // queries attention takes at a time
constexpr int64_t kChunk = 64;  // keys whose weighted values are summed before they join the rest

// Floats of scratch each lane needs: block sums of a product, or scores and weights of a query
// tile.
constexpr int64_t scratch_floats(int64_t context) {
  const int64_t sums = kRowBlock * kLanes * kGroupPanels;
  const int64_t scores = kQueryTile * round_up(context, kChunk);
  return round_up(sums > scores ? sums : scores, 1024);
}

struct ScratchShape {
  int64_t heads, head_size, context, vocab;
};

struct KernelTable {
  const char* name;
  int64_t max_rows;  // new tokens of one step
  int64_t stride_unit;  // row strides are multiples of this many elements
  int64_t key_unit, value_unit;  // of CacheLayout
  DType half;  // of activations, cache and position table beside int8 and int4 weights
  int64_t (*linear_words)(Precision, int64_t inputs, int64_t outputs);
  // Words of a row that a product quantises for itself; 0 where it takes operand rows as they are.
  int64_t (*quantized_row_words)(Precision, int64_t inputs);
  int64_t (*scratch_floats)(const ScratchShape&);  // of the scratch of all stages, per lane
  int64_t (*head_parts)(int64_t vocab);  // 0: the head knows nothing of sampling
  void (*embed)(const EmbedArgs&, const Lane&);
  void (*ln_qkv)(const LnQkvArgs&, const Lane&);
  void (*attention)(const AttentionArgs&, const Lane&);
  void (*linear_residual)(const LinearResidualArgs&, const Lane&);
  void (*ln_fc_gelu)(const LnFcGeluArgs&, const Lane&);
  void (*ln_head)(const LnHeadArgs&, const Lane&);
  void (*sample)(const SampleArgs&, const Lane&);
  void (*pack)(const PackArgs&, const Lane&);
  // single operations
  void (*layernorm)(const LayernormArgs&, const Lane&);
  void (*gelu)(const GeluArgs&, const Lane&);
  void (*linear)(const LinearArgs&, const Lane&);
  void (*dense_attention)(const DenseAttentionArgs&, const Lane&);
  int64_t (*dense_attention_words)(const DenseAttentionArgs&);  // of pages, per lane
  void (*op_embed)(const OpEmbedArgs&, const Lane&);
  void (*op_sample)(const OpSampleArgs&, const Lane&);  // null on the CPU
  // Sums words, a multiple of 1024: how fast this instruction set reads memory.
  uint64_t (*read)(const uint32_t* data, int64_t words);
  const DeviceTable* device;  // null on the CPU
};

}  // namespace gpt2f

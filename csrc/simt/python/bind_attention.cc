// Attention of csrc/cuda over numpy arrays: host memory is the device's. Arrays are written in
// place; 16-bit floats come as uint16.
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/attention.cuh"
#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "simt/python/arrays.h"
#include "simt/python/bindings.h"

namespace py = pybind11;

namespace gpt2f::simt {
namespace {

// `way`: decode, prefill, or empty for the stage's own choice. `tables`: the rows of `blocks`
// (blocks, words of a block) that hold each sequence, exactly as many as it needs.
void attention(const std::string& way, const std::string& precision, const py::array& query,
               const py::array& out, int64_t head_size, const py::array& blocks,
               const std::vector<std::vector<int64_t>>& tables, const std::vector<int32_t>& rows,
               const std::vector<int32_t>& starts, int64_t layer, float scale,
               const py::object& scratch, int64_t context) {
  std::vector<std::vector<uint32_t*>> pointers(tables.size());
  std::vector<Sequence> sequences;
  AttentionArgs args{
      precision == "bf16" ? Precision::kBf16 : Precision::kFp16,
      reinterpret_cast<uint32_t*>(data<uint16_t>(query)),
      data<uint16_t>(out),
      out.shape(1),
      nullptr,
      static_cast<int64_t>(tables.size()),
      CacheLayout(Precision::kFp16, query.shape(1), head_size, cuda::kHeadUnit, cuda::kHeadUnit),
      layer,
      scale,
      data<float>(scratch),
      context,
      query.shape(0),
      0};
  int32_t row = 0;
  for (size_t i = 0; i < tables.size(); ++i) {
    for (const int64_t block : tables[i]) {
      pointers[i].push_back(data<uint32_t>(blocks) + block * blocks.shape(1));
    }
    sequences.push_back({row, rows[i], starts[i], pointers[i].data()});
    row += rows[i];
    args.longest = std::max<int64_t>(args.longest, rows[i]);
  }
  args.sequences = sequences.data();
  way == "decode"    ? cuda::attention_decode(args, {})
  : way == "prefill" ? cuda::attention_prefill(args, {})
                     : cuda::attention(args, {});
}

// query (B, H, T, D), key and value (B, H, S, D); `pages` gets what dense_attention_words says.
void dense_attention(const std::string& type, const py::array& query, const py::array& key,
                     const py::object& value, const py::object& lengths, const py::object& out,
                     float scale, const py::array& pages, const py::object& scratch) {
  const DenseAttentionArgs args{type == "bf16" ? DType::kBF16 : DType::kF16,
                                data<uint16_t>(query),
                                data<uint16_t>(key),
                                data<uint16_t>(value),
                                data<int32_t>(lengths),
                                data<uint16_t>(out),
                                query.shape(0),
                                query.shape(1),
                                query.shape(2),
                                key.shape(2),
                                query.shape(3),
                                scale,
                                data<uint32_t>(pages),
                                pages.size(),
                                data<float>(scratch)};
  check(pages.size() >= cuda::dense_attention_words(args), ErrorKind::kParameter,
        "pages: at least ", cuda::dense_attention_words(args), " words wanted, got ", pages.size());
  cuda::dense_attention(args, {});
}

int64_t dense_attention_words(int64_t batch, int64_t heads, int64_t queries, int64_t keys,
                              int64_t head_size) {
  DenseAttentionArgs args{};
  args.batch = batch;
  args.heads = heads;
  args.queries = queries;
  args.keys = keys;
  args.head_size = head_size;
  return cuda::dense_attention_words(args);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", attention);
  m.def("dense_attention", dense_attention);
  m.def("dense_attention_words", dense_attention_words);
  m.def("attention_scratch_floats", [](int64_t heads, int64_t head_size, int64_t context) {
    return cuda::scratch_bytes(heads, head_size, context) / 4;
  });
}

}  // namespace gpt2f::simt

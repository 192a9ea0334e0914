// The product stages and pack of csrc/cuda over numpy arrays: host memory is the device's. Arrays
// are written in place; 16-bit floats come as uint16, packed weights as uint32.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/layout.h"
#include "simt/python/arrays.h"
#include "simt/python/bindings.h"

namespace py = pybind11;

namespace gpt2f::simt {
namespace {

PackedLinear linear_of(const py::array& words, const py::array& bias, int64_t inputs,
                       int64_t outputs) {
  return {data<uint32_t>(words), data<float>(bias), inputs, outputs};
}

LayernormParameters norm_of(const py::array& weight, const py::array& bias, float eps) {
  return {data<float>(weight), data<float>(bias), eps};
}

// Row r's position lies in row block_of_row[r] of `blocks` (blocks, words of a block).
void ln_qkv(const std::string& precision, const py::array& residual, const py::array& weight,
            const py::array& bias, float eps, const py::array& words, const py::array& linear_bias,
            int64_t width, const py::array& normed, const py::array& query, int64_t head_size,
            const py::array& positions, const py::array& blocks,
            const std::vector<int64_t>& block_of_row, int64_t layer) {
  std::vector<uint32_t*> pointers;
  for (const int64_t block : block_of_row) {
    pointers.push_back(data<uint32_t>(blocks) + block * blocks.shape(1));
  }
  LnQkvArgs args{precision_of(precision),
                 data<float>(residual),
                 residual.shape(1),
                 norm_of(weight, bias, eps),
                 linear_of(words, linear_bias, width, 3 * width),
                 data<uint16_t>(normed),
                 reinterpret_cast<uint32_t*>(data<uint16_t>(query)),
                 residual.shape(0),
                 data<int32_t>(positions),
                 pointers.data(),
                 CacheLayout(precision_of(precision), width / head_size, head_size, cuda::kHeadUnit,
                             cuda::kHeadUnit),
                 layer,
                 nullptr,
                 0};
  cuda::ln_qkv(args, {});
}

void ln_fc_gelu(const std::string& precision, const py::array& residual, const py::array& weight,
                const py::array& bias, float eps, const py::array& words,
                const py::array& linear_bias, int64_t inputs, int64_t outputs,
                const py::array& normed, const py::array& out) {
  LnFcGeluArgs args{precision_of(precision),
                    data<float>(residual),
                    residual.shape(1),
                    norm_of(weight, bias, eps),
                    linear_of(words, linear_bias, inputs, outputs),
                    data<uint16_t>(normed),
                    data<uint16_t>(out),
                    out.shape(1),
                    residual.shape(0),
                    nullptr,
                    0};
  cuda::ln_fc_gelu(args, {});
}

void linear_residual(const std::string& precision, const py::array& x, const py::array& words,
                     const py::array& bias, int64_t inputs, int64_t outputs,
                     const py::array& residual) {
  LinearResidualArgs args{precision_of(precision),
                          data<uint16_t>(x),
                          x.shape(1),
                          linear_of(words, bias, inputs, outputs),
                          nullptr,
                          data<float>(residual),
                          residual.shape(1),
                          x.shape(0),
                          nullptr,
                          0};
  cuda::linear_residual(args, {});
}

// source (inputs, outputs), or (outputs, inputs) when `transposed`, of `type`. Every lane packs its
// share. Returns the lowest index of an element that the weights cannot hold, or -1.
int64_t pack(const std::string& precision, const py::array& source, const std::string& type,
             bool transposed, const py::array& words, int lanes) {
  const int64_t rows = source.shape(0), columns = source.shape(1);
  std::atomic<int64_t> bad{INT64_MAX};
  const PackArgs args{
      precision_of(precision),
      source.data(),
      type == "fp32"   ? DType::kF32
      : type == "bf16" ? DType::kBF16
                       : DType::kF16,
      transposed ? 1 : columns,
      transposed ? columns : 1,
      {data<uint32_t>(words), nullptr, transposed ? columns : rows, transposed ? rows : columns},
      &bad};
  for (int rank = 0; rank < lanes; ++rank) {
    Lane lane;
    lane.rank = rank;
    lane.size = lanes;
    cuda::pack(args, lane);
  }
  return bad == INT64_MAX ? -1 : bad.load();
}

}  // namespace

void bind_products(py::module_& m) {
  m.def("ln_qkv", ln_qkv);
  m.def("ln_fc_gelu", ln_fc_gelu);
  m.def("linear_residual", linear_residual);
  m.def("pack", pack);
  m.def("linear_words", [](const std::string& precision, int64_t inputs, int64_t outputs) {
    return cuda::linear_words(precision_of(precision), inputs, outputs);
  });
}

}  // namespace gpt2f::simt

// quantize: the integers and scales of a matrix as every backend packs them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "core/error.h"
#include "engine/quantize.h"
#include "python/arg.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

py::tuple quantize(py::handle weights_, const std::string& precision) {
  const Arg weights("quantize", "weights", weights_);
  weights.kind(Kind::kF32).rank(2);
  check(precision == "int8" || precision == "int4", ErrorKind::kParameter,
        "quantize: precision must be int8 or int4, got '", precision, "'");
  const Precision p = precision == "int8" ? Precision::kInt8 : Precision::kInt4;
  const int64_t outputs = weights.size(0), inputs = weights.size(1);
  const float* const values = weights.data<float>();
  for (int64_t i = 0; i < weights.count(); ++i) {
    if (!std::isfinite(values[i])) weights.fail("must be finite, got ", values[i], " at ", i);
  }
  const int64_t padded = round_up(inputs, 64), groups = padded / group_size(p);
  py::array_t<int8_t> q({outputs, padded});
  py::array_t<uint16_t> scales({outputs, groups});
  int8_t* const q_out = q.mutable_data();
  uint16_t* const scales_out = scales.mutable_data();
  without_gil([&] {
    std::vector<float> row(static_cast<size_t>(padded));
    for (int64_t n = 0; n < outputs; ++n) {
      std::copy_n(values + n * inputs, inputs, row.begin());
      quantize_row(p, row.data(), padded, q_out + n * padded, scales_out + n * groups);
    }
  });
  return py::make_tuple(q, scales);
}

}  // namespace

void bind_quantize(py::module_& m) {
  m.def("quantize", quantize, py::arg("weights"), py::arg("precision"));
}

}  // namespace gpt2f

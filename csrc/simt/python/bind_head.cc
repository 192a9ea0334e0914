// ln_head and sample of csrc/cuda over numpy arrays: host memory is the device's. Arrays are
// written in place; 16-bit floats come as uint16, packed weights as uint32, parts as four words
// each.
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "core/error.h"
#include "cuda/kernels.h"
#include "simt/python/arrays.h"
#include "simt/python/bindings.h"

namespace py = pybind11;

namespace gpt2f::simt {
namespace {

static_assert(sizeof(HeadPart) == 16);

HeadPart* parts_of(const py::object& object) {
  return reinterpret_cast<HeadPart*>(data<uint32_t>(object));
}

// One dict per row; what it leaves out has its default.
std::vector<SampleParameters> parameters_of(const py::list& rows) {
  std::vector<SampleParameters> out;
  for (const py::handle row : rows) {
    SampleParameters p;
    for (const auto& [key, value] : row.cast<py::dict>()) {
      const auto name = key.cast<std::string>();
      if (name == "temperature") {
        p.temperature = value.cast<float>();
      } else if (name == "top_p") {
        p.top_p = value.cast<float>();
      } else if (name == "min_p") {
        p.min_p = value.cast<float>();
      } else if (name == "top_k") {
        p.top_k = value.cast<int32_t>();
      } else if (name == "openai_top_p") {
        p.openai_top_p = value.cast<bool>();
      } else if (name == "seed") {
        p.seed = value.cast<uint64_t>();
      } else if (name == "sample") {
        p.sample = value.cast<uint32_t>();
      } else if (name == "position") {
        p.position = value.cast<int64_t>();
      } else if (name == "target") {
        p.target = value.cast<int32_t>();
      } else {
        check(name == "drawable", ErrorKind::kParameter, "parameter: ", name);
        p.drawable = value.cast<int64_t>();
      }
    }
    out.push_back(p);
  }
  return out;
}

// `scratch` and `parts`: (rows, head_parts, 4); without parts they are made in scratch.
void sample(const py::array& logits, int64_t vocab, const py::list& parameters,
            const py::array& tokens, const py::array& logprobs, const py::object& scratch,
            const py::object& parts) {
  const std::vector<SampleParameters> rows = parameters_of(parameters);
  check(logits.shape(0) == static_cast<py::ssize_t>(rows.size()), ErrorKind::kParameter,
        "parameters: one for each of ", logits.shape(0), " rows");
  const SampleArgs args{
      data<float>(logits), logits.shape(1),       logits.shape(0),       vocab,
      rows.data(),         data<int32_t>(tokens), data<float>(logprobs), data<float>(scratch),
      parts_of(parts)};
  cuda::sample(args, {});
}

void ln_head(const std::string& precision, const py::array& residual, const py::array& asked,
             const py::array& weight, const py::array& bias, float eps, const py::array& words,
             int64_t width, int64_t vocab, const py::array& normed, const py::array& logits,
             const py::object& parameters, const py::object& parts) {
  std::vector<SampleParameters> rows;
  if (!parameters.is_none()) rows = parameters_of(parameters.cast<py::list>());
  LnHeadArgs args{precision_of(precision),
                  data<float>(residual),
                  residual.shape(1),
                  data<int32_t>(asked),
                  {data<float>(weight), data<float>(bias), eps},
                  {data<uint32_t>(words), nullptr, width, vocab},
                  data<uint16_t>(normed),
                  data<float>(logits),
                  logits.shape(1),
                  asked.shape(0),
                  nullptr,
                  0,
                  parameters.is_none() ? nullptr : rows.data(),
                  parts_of(parts)};
  cuda::ln_head(args, {});
}

}  // namespace

void bind_head(py::module_& m) {
  m.def("sample", sample);
  m.def("ln_head", ln_head);
}

}  // namespace gpt2f::simt

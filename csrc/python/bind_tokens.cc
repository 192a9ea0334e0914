// read_tokens: the table of a vocabulary as Python's objects.
#include <pybind11/pybind11.h>

#include <string_view>

#include "core/token_lines.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

py::tuple read_tokens(const py::bytes& data) {
  TokenLines lines;
  without_gil([&, text = std::string_view(data)] { lines = read_token_lines(text); });
  py::tuple tokens(lines.ends.size());
  size_t begin = 0;
  for (size_t i = 0; i < lines.ends.size(); begin = lines.ends[i++]) {
    tokens[i] = py::bytes(lines.bytes.data() + begin, lines.ends[i] - begin);
  }
  return tokens;
}

}  // namespace

void bind_tokens(py::module_& m) { m.def("read_tokens", read_tokens, py::arg("data")); }

}  // namespace gpt2f

// Layer norm, gelu and embed of csrc/cuda over numpy arrays: host memory is the device's. Arrays
// are written in place; 16-bit floats come as uint16.

#include <string>

#include "core/error.h"
#include "cuda/kernels.h"
#include "cuda/norm.cuh"
#include "simt/python/arrays.h"
#include "simt/python/bindings.h"

namespace py = pybind11;

namespace gpt2f::simt {
namespace {

DType type_of(const std::string& name) {
  if (name == "fp32") return DType::kF32;
  check(name == "bf16" || name == "fp16", ErrorKind::kParameter, "type: ", name);
  return name == "bf16" ? DType::kBF16 : DType::kF16;
}

void* bytes(const py::object& object, DType type) {
  return type == DType::kF32 ? static_cast<void*>(data<float>(object))
                             : static_cast<void*>(data<uint16_t>(object));
}

LayernormParameters norm_of(const py::object& weight, const py::object& bias, float eps) {
  return {data<float>(weight), data<float>(bias), eps};
}

void layernorm_rows(const py::array& residual, const py::object& asked, const py::object& weight,
                    const py::object& bias, float eps, const py::array& out, int64_t width,
                    const std::string& precision) {
  cuda::layernorm_rows(data<float>(residual), residual.shape(1), data<int32_t>(asked),
                       norm_of(weight, bias, eps), data<uint16_t>(out), out.shape(1), out.shape(0),
                       width, precision_of(precision), nullptr);
}

void op_layernorm(const py::array& x, const py::object& delta, const py::object& weight,
                  const py::object& bias, float eps, const py::object& out,
                  const std::string& type_name) {
  const DType type = type_of(type_name);
  cuda::op_layernorm({type, bytes(x, type), bytes(delta, type), norm_of(weight, bias, eps),
                      bytes(out, type), x.shape(0), x.shape(1), nullptr},
                     {});
}

void op_gelu(const py::array& x, const py::object& out, const std::string& type_name) {
  const DType type = type_of(type_name);
  cuda::op_gelu({type, bytes(x, type), bytes(out, type), x.size()}, {});
}

// `table`: rows of 16-bit elements, or the words of a packed head of `vocab` outputs.
void embed(const py::object& tokens, const py::object& positions, const py::array& table,
           int64_t vocab, const py::array& wpe, const py::array& residual, int64_t width,
           const std::string& precision) {
  const bool packed = table.itemsize() == 4;
  EmbedArgs args{};
  args.precision = precision_of(precision);
  args.tokens = data<int32_t>(tokens);
  args.positions = data<int32_t>(positions);
  args.rows_table = packed ? nullptr : data<uint16_t>(table);
  args.packed_table = {packed ? data<uint32_t>(table) : nullptr, nullptr, width, vocab};
  args.wpe = data<uint16_t>(wpe);
  args.stride = wpe.shape(1);
  args.residual = data<float>(residual);
  args.rows = residual.shape(0);
  args.width = width;
  cuda::embed(args, {});
}

void op_embed(const py::object& tokens, const py::object& positions, const py::array& wte,
              const py::array& wpe, const py::array& out, const std::string& type_name) {
  const DType type = type_of(type_name);
  cuda::op_embed(
      {type, data<int64_t>(tokens), data<int64_t>(positions), bytes(wte, type), bytes(wpe, type),
       bytes(out, type), out.shape(0), out.shape(1), wte.shape(0), wpe.shape(0)},
      {});
}

}  // namespace

void bind_norms(py::module_& m) {
  m.def("layernorm_rows", layernorm_rows);
  m.def("op_layernorm", op_layernorm);
  m.def("op_gelu", op_gelu);
  m.def("embed", embed);
  m.def("op_embed", op_embed);
}

}  // namespace gpt2f::simt

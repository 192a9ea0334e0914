// Single operations over caller-allocated tensors: check, fill the struct, let go of the GIL, call.
#include <pybind11/pybind11.h>

#include <memory>

#include "core/error.h"
#include "core/numbers.h"
#include "python/arg.h"
#include "python/bindings.h"
#include "python/call.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

void run_layernorm(Call& call, std::initializer_list<const Arg*> all, LayernormArgs args) {
  if (args.rows == 0) return;
  args.scratch = call.take<float>(call.lanes() * round_up(args.width, 16) * 4);
  call.run(all, [&](const KernelTable& table, const Lane& lane) { table.layernorm(args, lane); });
}

void check_norm(const Arg& x, const Arg& weight, const Arg& bias) {
  x.floating().rank_at_least(1);
  if (x.size(-1) == 0) x.fail("must have a last dimension of at least 1");
  weight.kind(Kind::kF32).shape({x.size(-1)});
  bias.kind(Kind::kF32).shape({x.size(-1)});
}

void layernorm(py::handle x_, py::handle weight_, py::handle bias_, float eps, py::handle out_,
               const py::object& cuda) {
  constexpr const char* kOp = "layernorm";
  Call call(kOp, cuda);
  const Where at = call.where();
  const Arg x(kOp, "x", x_, at), weight(kOp, "weight", weight_, at), bias(kOp, "bias", bias_, at);
  const Arg out(kOp, "out", out_, at);
  check_norm(x, weight, bias);
  out.writable().same_kind(x).shape(x.sizes());
  run_layernorm(call, {&x, &weight, &bias, &out},
                {x.dtype(),
                 x.data(),
                 nullptr,
                 {weight.data<float>(), bias.data<float>(), eps},
                 out.data(),
                 x.rows(),
                 x.size(-1),
                 nullptr});
}

void add_layernorm(py::handle residual_, py::handle delta_, py::handle weight_, py::handle bias_,
                   float eps, py::handle out_, const py::object& cuda) {
  constexpr const char* kOp = "add_layernorm";
  Call call(kOp, cuda);
  const Where at = call.where();
  const Arg residual(kOp, "residual", residual_, at), delta(kOp, "delta", delta_, at);
  const Arg weight(kOp, "weight", weight_, at), bias(kOp, "bias", bias_, at);
  const Arg out(kOp, "out", out_, at);
  check_norm(residual, weight, bias);
  residual.writable();
  delta.same_kind(residual).shape(residual.sizes());
  out.writable().same_kind(residual).shape(residual.sizes());
  run_layernorm(call, {&residual, &delta, &weight, &bias, &out},
                {residual.dtype(),
                 residual.data(),
                 delta.data(),
                 {weight.data<float>(), bias.data<float>(), eps},
                 out.data(),
                 residual.rows(),
                 residual.size(-1),
                 nullptr});
}

void gelu(py::handle x_, py::handle out_, const py::object& cuda) {
  Call call("gelu", cuda);
  const Arg x("gelu", "x", x_, call.where()), out("gelu", "out", out_, call.where());
  x.floating();
  out.writable().same_kind(x).shape(x.sizes());
  const GeluArgs args{x.dtype(), x.data(), out.data(), x.count()};
  if (args.count == 0) return;
  call.run({&x, &out}, [&](const KernelTable& table, const Lane& lane) { table.gelu(args, lane); });
}

void check_ids(const Arg& ids, int64_t limit) {
  for (int64_t i = 0; i < ids.count(); ++i) {
    const int64_t id = ids.data<int64_t>()[i];
    if (id < 0 || id >= limit) {
      ids.fail("must be in 0..", limit - 1, ", got ", id, " at position ", i);
    }
  }
}

void embed(py::handle tokens_, py::handle positions_, py::handle wte_, py::handle wpe_,
           py::handle out_, const py::object& cuda) {
  constexpr const char* kOp = "embed";
  Call call(kOp, cuda);
  const Where at = call.where();
  const Arg tokens(kOp, "tokens", tokens_, at), positions(kOp, "positions", positions_, at);
  const Arg wte(kOp, "wte", wte_, at), wpe(kOp, "wpe", wpe_, at), out(kOp, "out", out_, at);
  tokens.kind(Kind::kI64).rank(1);
  positions.kind(Kind::kI64).shape(tokens.sizes());
  wte.floating().rank(2);
  wpe.same_kind(wte).rank(2).shape({wpe.size(0), wte.size(1)});
  out.writable().same_kind(wte).shape({tokens.size(0), wte.size(1)});
  if (!call.cuda()) {  // a device's ids are its own: it answers one that is out of range with NaN
    check_ids(tokens, wte.size(0));
    check_ids(positions, wpe.size(0));
  }
  const OpEmbedArgs args{wte.dtype(),
                         tokens.data<int64_t>(),
                         positions.data<int64_t>(),
                         wte.data(),
                         wpe.data(),
                         out.data(),
                         tokens.size(0),
                         wte.size(1),
                         wte.size(0),
                         wpe.size(0)};
  if (args.rows * args.width == 0) return;
  call.run({&wte, &wpe, &tokens, &positions, &out},
           [&](const KernelTable& table, const Lane& lane) { table.op_embed(args, lane); });
}

void linear(py::handle x_, py::handle weight_, const py::object& bias_, const py::object& residual_,
            bool gelu, py::handle out_, const py::object& cuda) {
  constexpr const char* kOp = "linear";
  Call call(kOp, cuda);
  const Where at = call.where();
  const Arg x(kOp, "x", x_, at), weight(kOp, "weight", weight_, at), out(kOp, "out", out_, at);
  (call.cuda() ? x.half() : x.floating()).rank_at_least(1);
  call.check_product(x);
  const int64_t inputs = x.size(-1);
  weight.same_kind(x).rank(2).shape({weight.size(0), inputs});
  const int64_t outputs = weight.size(0);
  if (inputs == 0 || outputs == 0)
    weight.fail("must not be empty, got shape ", shape_text(weight.sizes()));
  std::vector<int64_t> shape = x.sizes();
  shape.back() = outputs;
  out.writable().same_kind(x).shape(shape);
  LinearArgs args{x.dtype(), x.data(), weight.data(), nullptr, nullptr, gelu,    out.data(),
                  x.rows(),  inputs,   outputs,       nullptr, nullptr, nullptr, nullptr};
  std::unique_ptr<Arg> bias, residual;
  if (!bias_.is_none()) {
    bias = std::make_unique<Arg>(kOp, "bias", bias_, at);
    args.bias = bias->kind(Kind::kF32).shape({outputs}).data<float>();
  }
  if (!residual_.is_none()) {
    residual = std::make_unique<Arg>(kOp, "residual", residual_, at);
    args.residual = residual->same_kind(x).shape(shape).data();
  }
  if (args.rows == 0) return;
  const int64_t padded = round_up(inputs, call.table().stride_unit);
  args.operand = call.take<void>(args.rows * padded * dtype_bytes(args.type));
  args.packed = call.take<uint32_t>(round_up(outputs, 16) * padded * 4 + 64);
  args.padded_bias = call.take<float>(round_up(outputs, 16) * 4);
  args.scratch = call.take<float>(call.lanes() * call.table().scratch_floats({1, 1, 1, 1}) * 4);
  call.run({&x, &weight, bias.get(), residual.get(), &out},
           [&](const KernelTable& table, const Lane& lane) { table.linear(args, lane); });
}

void run_attention(Call& call, std::initializer_list<const Arg*> all, DenseAttentionArgs args) {
  if (args.batch * args.heads * args.queries == 0) return;
  const KernelTable& table = call.table();
  args.pages_words = table.dense_attention_words(args);
  args.pages = call.take<uint32_t>(call.lanes() * args.pages_words * 4);
  args.scratch = call.take<float>(
      call.lanes() * table.scratch_floats({args.heads, args.head_size, args.keys, 1}) * 4);
  call.run(all,
           [&](const KernelTable& used, const Lane& lane) { used.dense_attention(args, lane); });
}

// Queries and keys of a type the kernels multiply, with a head size they take.
void check_query(const Call& call, const Arg& q, size_t rank) {
  (call.cuda() ? q.half() : q.floating()).rank(rank);
  call.check_product(q);
  const int64_t size = q.size(-1);
  if (size == 0) q.fail("must have a head size of at least 1");
  if (call.cuda() && size > kMaxDeviceHeadSize) {
    q.fail("must have a head size of at most ", kMaxDeviceHeadSize, " on CUDA, got ", size);
  }
}

void attention_prefill(py::handle q_, py::handle k_, py::handle v_, float scale, py::handle out_,
                       const py::object& cuda) {
  constexpr const char* kOp = "attention_prefill";
  Call call(kOp, cuda);
  const Where at = call.where();
  const Arg q(kOp, "q", q_, at), k(kOp, "k", k_, at), v(kOp, "v", v_, at),
      out(kOp, "out", out_, at);
  check_query(call, q, 4);
  k.same_kind(q).rank(4).shape({q.size(0), q.size(1), k.size(2), q.size(3)});
  v.same_kind(q).shape(k.sizes());
  out.writable().same_kind(q).shape(q.sizes());
  if (k.size(2) < q.size(2)) {
    k.fail("must have at least as many positions as q has queries, got ", k.size(2), " for ",
           q.size(2));
  }
  run_attention(call, {&q, &k, &v, &out},
                {q.dtype(), q.data(), k.data(), v.data(), nullptr, out.data(), q.size(0), q.size(1),
                 q.size(2), k.size(2), q.size(3), scale, nullptr, 0, nullptr});
}

void attention_decode(py::handle q_, py::handle k_, py::handle v_, py::handle lengths_, float scale,
                      py::handle out_, const py::object& cuda) {
  constexpr const char* kOp = "attention_decode";
  Call call(kOp, cuda);
  const Where at = call.where();
  const Arg q(kOp, "q", q_, at), k(kOp, "k", k_, at), v(kOp, "v", v_, at),
      out(kOp, "out", out_, at);
  const Arg lengths(kOp, "lengths", lengths_, at);
  check_query(call, q, 3);
  k.same_kind(q).rank(4).shape({q.size(0), q.size(1), k.size(2), q.size(2)});
  v.same_kind(q).shape(k.sizes());
  lengths.kind(Kind::kI32).shape({q.size(0)});
  out.writable().same_kind(q).shape(q.sizes());
  // Lengths on a device stay there: one that is out of range is taken as the nearest in range.
  for (int64_t b = 0; !call.cuda() && b < q.size(0); ++b) {
    const int32_t length = lengths.data<int32_t>()[b];
    if (length < 1 || length > k.size(2)) {
      lengths.fail("must be in 1..", k.size(2), ", got ", length, " at position ", b);
    }
  }
  run_attention(call, {&q, &k, &v, &lengths, &out},
                {q.dtype(), q.data(), k.data(), v.data(), lengths.data<int32_t>(), out.data(),
                 q.size(0), q.size(1), 1, k.size(2), q.size(2), scale, nullptr, 0, nullptr});
}

// The arguments of sample.
struct SampleTensors {
  const Arg logits, temperature, top_k, top_p, min_p, seeds, samples, positions, ids, logprobs;

  int64_t rows() const { return logits.size(0); }
  int64_t vocab() const { return logits.size(1); }
  void check() const {
    logits.kind(Kind::kF32).rank(2);
    if (vocab() < 1 || vocab() > 1 << 24) {
      logits.fail("must have 1..", 1 << 24, " columns, got ", vocab());
    }
    const std::vector<int64_t> shape = {rows()};
    for (const Arg* arg : {&temperature, &top_p, &min_p}) arg->kind(Kind::kF32).shape(shape);
    for (const Arg* arg : {&seeds, &samples, &positions}) arg->kind(Kind::kI64).shape(shape);
    top_k.kind(Kind::kI32).shape(shape);
    ids.writable().kind(Kind::kI64).shape(shape);
    logprobs.writable().kind(Kind::kF32).shape(shape);
  }
  SampleParameters row(size_t r, bool openai_top_p) const {
    SampleParameters p;
    p.temperature = temperature.data<float>()[r];
    p.top_p = top_p.data<float>()[r];
    p.min_p = min_p.data<float>()[r];
    p.top_k = top_k.data<int32_t>()[r];
    p.openai_top_p = openai_top_p;
    p.seed = static_cast<uint64_t>(seeds.data<int64_t>()[r]);
    p.sample = static_cast<uint32_t>(samples.data<int64_t>()[r]);
    p.position = positions.data<int64_t>()[r];
    if (!(p.temperature >= 0.0f && p.temperature < __builtin_inff())) {
      temperature.fail("must be at least 0 and finite, got ", p.temperature);
    }
    if (!(p.top_p >= 0.0f && p.top_p <= 1.0f)) top_p.fail("must be in [0, 1], got ", p.top_p);
    if (!(p.min_p >= 0.0f && p.min_p <= 1.0f)) min_p.fail("must be in [0, 1], got ", p.min_p);
    if (p.top_k < 0) top_k.fail("must be at least 0, got ", p.top_k);
    return p;
  }
};

void sample_on_cpu(Call& call, const SampleTensors& t, bool openai_top_p) {
  std::vector<SampleParameters> parameters;
  for (size_t r = 0; r < static_cast<size_t>(t.rows()); ++r) {
    parameters.push_back(t.row(r, openai_top_p));
  }
  std::vector<int32_t> tokens(parameters.size());
  const SampleArgs args{t.logits.data<float>(),
                        t.vocab(),
                        t.rows(),
                        t.vocab(),
                        parameters.data(),
                        tokens.data(),
                        t.logprobs.data<float>(),
                        call.take<float>(call.lanes() * 2 * round_up(t.vocab(), 16) * 4),
                        nullptr};
  call.run({&t.logits},
           [&](const KernelTable& table, const Lane& lane) { table.sample(args, lane); });
  for (size_t r = 0; r < tokens.size(); ++r) t.ids.data<int64_t>()[r] = tokens[r];
}

void sample_on_cuda(Call& call, const SampleTensors& t, bool openai_top_p) {
  const int64_t rows = t.rows(), parts = call.table().head_parts(t.vocab());
  const OpSampleArgs args{
      t.logits.data<float>(),
      rows,
      t.vocab(),
      t.temperature.data<float>(),
      t.top_k.data<int32_t>(),
      t.top_p.data<float>(),
      t.min_p.data<float>(),
      openai_top_p,
      t.seeds.data<int64_t>(),
      t.samples.data<int64_t>(),
      t.positions.data<int64_t>(),
      t.ids.data<int64_t>(),
      t.logprobs.data<float>(),
      call.take<SampleParameters>(rows * static_cast<int64_t>(sizeof(SampleParameters))),
      call.take<int32_t>(rows * 4),
      call.take<float>(rows * parts * static_cast<int64_t>(sizeof(HeadPart)))};
  call.run({&t.logits, &t.temperature, &t.top_k, &t.top_p, &t.min_p, &t.seeds, &t.samples,
            &t.positions, &t.ids, &t.logprobs},
           [&](const KernelTable& table, const Lane& lane) { table.op_sample(args, lane); });
}

void sample(py::handle logits, py::handle temperature, py::handle top_k, py::handle top_p,
            py::handle min_p, bool openai_top_p, py::handle seeds, py::handle samples,
            py::handle positions, py::handle out_ids, py::handle out_logprobs,
            const py::object& cuda) {
  constexpr const char* kOp = "sample";
  Call call(kOp, cuda);
  const Where at = call.where();
  const SampleTensors tensors{
      Arg(kOp, "logits", logits, at),   Arg(kOp, "temperature", temperature, at),
      Arg(kOp, "top_k", top_k, at),     Arg(kOp, "top_p", top_p, at),
      Arg(kOp, "min_p", min_p, at),     Arg(kOp, "seeds", seeds, at),
      Arg(kOp, "samples", samples, at), Arg(kOp, "positions", positions, at),
      Arg(kOp, "out_ids", out_ids, at), Arg(kOp, "out_logprobs", out_logprobs, at)};
  tensors.check();
  if (tensors.rows() == 0) return;
  call.cuda() ? sample_on_cuda(call, tensors, openai_top_p)
              : sample_on_cpu(call, tensors, openai_top_p);
}

}  // namespace

void bind_ops(py::module_& m) {
  m.def("set_op_backend", set_op_backend, py::arg("isa"), py::arg("threads"));
  m.def("layernorm", layernorm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
        py::arg("out"), py::arg("cuda") = py::none());
  m.def("add_layernorm", add_layernorm, py::arg("residual"), py::arg("delta"), py::arg("weight"),
        py::arg("bias"), py::arg("eps"), py::arg("out"), py::arg("cuda") = py::none());
  m.def("gelu", gelu, py::arg("x"), py::arg("out"), py::arg("cuda") = py::none());
  m.def("embed", embed, py::arg("tokens"), py::arg("positions"), py::arg("wte"), py::arg("wpe"),
        py::arg("out"), py::arg("cuda") = py::none());
  m.def("linear", linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("gelu"), py::arg("out"), py::arg("cuda") = py::none());
  m.def("attention_prefill", attention_prefill, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("scale"), py::arg("out"), py::arg("cuda") = py::none());
  m.def("attention_decode", attention_decode, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("lengths"), py::arg("scale"), py::arg("out"), py::arg("cuda") = py::none());
  m.def("sample", sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("openai_top_p"), py::arg("seeds"),
        py::arg("samples"), py::arg("positions"), py::arg("out_ids"), py::arg("out_logprobs"),
        py::arg("cuda") = py::none());
}

}  // namespace gpt2f

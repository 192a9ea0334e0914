// Single operations over caller-allocated tensors: check, fill the struct, let go of the GIL, call.
#include <pybind11/pybind11.h>

#include <memory>
#include <mutex>

#include "core/buffer.h"
#include "core/error.h"
#include "core/numbers.h"
#include "core/thread_pool.h"
#include "cpu/select.h"
#include "python/arg.h"
#include "python/bindings.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

// What operations run on; the engine has its own.
struct Backend {
  const KernelTable* table;
  ThreadPool pool;
  std::mutex mutex;

  Backend(const KernelTable* table_, int threads) : table(table_), pool(threads) {}
};

std::shared_ptr<Backend>& backend() {
  static auto* const kBackend = new std::shared_ptr<Backend>();  // outlives every thread
  if (*kBackend == nullptr) {
    *kBackend = std::make_shared<Backend>(find_table(default_isa()), default_threads());
  }
  return *kBackend;
}

void set_op_backend(const std::string& isa, int threads) {
  backend() = std::make_shared<Backend>(find_table(isa), threads);
}

template <typename Function>
void run(const Function& function) {
  const std::shared_ptr<Backend> used = backend();
  without_gil([&] {
    const std::lock_guard lock(used->mutex);
    function(*used);
  });
}

template <typename T>
T* take(Buffer& buffer, int64_t bytes) {
  buffer = Buffer(static_cast<size_t>(bytes), "scratch");
  return buffer.as<T>();
}

void run_layernorm(const LayernormArgs& checked) {
  if (checked.rows == 0) return;
  run([&](Backend& b) {
    Buffer memory;
    LayernormArgs args = checked;
    args.scratch = take<float>(memory, b.pool.size() * round_up(args.width, 16) * 4);
    b.pool.run([&](const Lane& lane) { b.table->layernorm(args, lane); });
  });
}

void check_norm(const Arg& x, const Arg& weight, const Arg& bias) {
  x.floating().rank_at_least(1);
  if (x.size(-1) == 0) x.fail("must have a last dimension of at least 1");
  weight.kind(Kind::kF32).shape({x.size(-1)});
  bias.kind(Kind::kF32).shape({x.size(-1)});
}

void layernorm(py::handle x_, py::handle weight_, py::handle bias_, float eps, py::handle out_) {
  constexpr const char* kOp = "layernorm";
  const Arg x(kOp, "x", x_), weight(kOp, "weight", weight_), bias(kOp, "bias", bias_);
  const Arg out(kOp, "out", out_);
  check_norm(x, weight, bias);
  out.writable().same_kind(x).shape(x.sizes());
  run_layernorm({x.dtype(),
                 x.data(),
                 nullptr,
                 {weight.data<float>(), bias.data<float>(), eps},
                 out.data(),
                 x.rows(),
                 x.size(-1),
                 nullptr});
}

void add_layernorm(py::handle residual_, py::handle delta_, py::handle weight_, py::handle bias_,
                   float eps, py::handle out_) {
  constexpr const char* kOp = "add_layernorm";
  const Arg residual(kOp, "residual", residual_), delta(kOp, "delta", delta_);
  const Arg weight(kOp, "weight", weight_), bias(kOp, "bias", bias_), out(kOp, "out", out_);
  check_norm(residual, weight, bias);
  residual.writable();
  delta.same_kind(residual).shape(residual.sizes());
  out.writable().same_kind(residual).shape(residual.sizes());
  run_layernorm({residual.dtype(),
                 residual.data(),
                 delta.data(),
                 {weight.data<float>(), bias.data<float>(), eps},
                 out.data(),
                 residual.rows(),
                 residual.size(-1),
                 nullptr});
}

void gelu(py::handle x_, py::handle out_) {
  const Arg x("gelu", "x", x_), out("gelu", "out", out_);
  x.floating();
  out.writable().same_kind(x).shape(x.sizes());
  const GeluArgs args{x.dtype(), x.data(), out.data(), x.count()};
  run([&](Backend& b) { b.pool.run([&](const Lane& lane) { b.table->gelu(args, lane); }); });
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
           py::handle out_) {
  constexpr const char* kOp = "embed";
  const Arg tokens(kOp, "tokens", tokens_), positions(kOp, "positions", positions_);
  const Arg wte(kOp, "wte", wte_), wpe(kOp, "wpe", wpe_), out(kOp, "out", out_);
  tokens.kind(Kind::kI64).rank(1);
  positions.kind(Kind::kI64).shape(tokens.sizes());
  wte.floating().rank(2);
  wpe.same_kind(wte).rank(2).shape({wpe.size(0), wte.size(1)});
  out.writable().same_kind(wte).shape({tokens.size(0), wte.size(1)});
  check_ids(tokens, wte.size(0));
  check_ids(positions, wpe.size(0));
  const OpEmbedArgs args{wte.dtype(),
                         tokens.data<int64_t>(),
                         positions.data<int64_t>(),
                         wte.data(),
                         wpe.data(),
                         out.data(),
                         tokens.size(0),
                         wte.size(1)};
  run([&](Backend& b) { b.pool.run([&](const Lane& lane) { b.table->op_embed(args, lane); }); });
}

void linear(py::handle x_, py::handle weight_, const py::object& bias_, const py::object& residual_,
            bool gelu, py::handle out_) {
  constexpr const char* kOp = "linear";
  const Arg x(kOp, "x", x_), weight(kOp, "weight", weight_), out(kOp, "out", out_);
  x.floating().rank_at_least(1);
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
    bias = std::make_unique<Arg>(kOp, "bias", bias_);
    args.bias = bias->kind(Kind::kF32).shape({outputs}).data<float>();
  }
  if (!residual_.is_none()) {
    residual = std::make_unique<Arg>(kOp, "residual", residual_);
    args.residual = residual->same_kind(x).shape(shape).data();
  }
  if (args.rows == 0) return;
  run([&](Backend& b) {
    Buffer operand, packed, padded, sums;
    args.operand = take<void>(operand, args.rows * round_up(inputs, 16) * dtype_bytes(args.type));
    args.packed = take<uint32_t>(packed, round_up(outputs, 16) * inputs * 4 + 64);
    args.padded_bias = take<float>(padded, round_up(outputs, 16) * 4);
    args.scratch = take<float>(sums, b.pool.size() * scratch_floats(0) * 4);
    b.pool.run([&](const Lane& lane) { b.table->linear(args, lane); });
  });
}

void run_attention(const DenseAttentionArgs& checked) {
  if (checked.batch * checked.heads * checked.queries == 0) return;
  run([&](Backend& b) {
    DenseAttentionArgs args = checked;
    const Precision p = args.type == DType::kF32 ? Precision::kFp32 : Precision::kBf16;
    const CacheLayout layout(p, 1, args.head_size);
    const int64_t pages = (args.keys + kPagePositions - 1) / kPagePositions;
    // Pages, then queries, then the page table.
    args.pages_words = round_up(
        pages * (layout.page_words() + 2) + round_up(args.queries * layout.key_steps + 16, 16), 16);
    Buffer memory, scores;
    args.pages = take<uint32_t>(memory, b.pool.size() * args.pages_words * 4);
    args.scratch = take<float>(scores, b.pool.size() * scratch_floats(args.keys) * 4);
    b.pool.run([&](const Lane& lane) { b.table->dense_attention(args, lane); });
  });
}

void attention_prefill(py::handle q_, py::handle k_, py::handle v_, float scale, py::handle out_) {
  constexpr const char* kOp = "attention_prefill";
  const Arg q(kOp, "q", q_), k(kOp, "k", k_), v(kOp, "v", v_), out(kOp, "out", out_);
  q.floating().rank(4);
  k.same_kind(q).rank(4).shape({q.size(0), q.size(1), k.size(2), q.size(3)});
  v.same_kind(q).shape(k.sizes());
  out.writable().same_kind(q).shape(q.sizes());
  if (k.size(2) < q.size(2)) {
    k.fail("must have at least as many positions as q has queries, got ", k.size(2), " for ",
           q.size(2));
  }
  if (q.size(3) == 0) q.fail("must have a head size of at least 1");
  run_attention({q.dtype(), q.data(), k.data(), v.data(), nullptr, out.data(), q.size(0), q.size(1),
                 q.size(2), k.size(2), q.size(3), scale, nullptr, 0, nullptr});
}

void attention_decode(py::handle q_, py::handle k_, py::handle v_, py::handle lengths_, float scale,
                      py::handle out_) {
  constexpr const char* kOp = "attention_decode";
  const Arg q(kOp, "q", q_), k(kOp, "k", k_), v(kOp, "v", v_), out(kOp, "out", out_);
  const Arg lengths(kOp, "lengths", lengths_);
  q.floating().rank(3);
  k.same_kind(q).rank(4).shape({q.size(0), q.size(1), k.size(2), q.size(2)});
  v.same_kind(q).shape(k.sizes());
  lengths.kind(Kind::kI32).shape({q.size(0)});
  out.writable().same_kind(q).shape(q.sizes());
  if (q.size(2) == 0) q.fail("must have a head size of at least 1");
  for (int64_t b = 0; b < q.size(0); ++b) {
    const int32_t length = lengths.data<int32_t>()[b];
    if (length < 1 || length > k.size(2)) {
      lengths.fail("must be in 1..", k.size(2), ", got ", length, " at position ", b);
    }
  }
  run_attention({q.dtype(), q.data(), k.data(), v.data(), lengths.data<int32_t>(), out.data(),
                 q.size(0), q.size(1), 1, k.size(2), q.size(2), scale, nullptr, 0, nullptr});
}

void sample(py::handle logits_, py::handle temperature_, py::handle top_k_, py::handle top_p_,
            py::handle min_p_, bool openai_top_p, py::handle seeds_, py::handle samples_,
            py::handle positions_, py::handle out_ids_, py::handle out_logprobs_) {
  constexpr const char* kOp = "sample";
  const Arg logits(kOp, "logits", logits_), temperature(kOp, "temperature", temperature_);
  const Arg top_k(kOp, "top_k", top_k_), top_p(kOp, "top_p", top_p_), min_p(kOp, "min_p", min_p_);
  const Arg seeds(kOp, "seeds", seeds_), samples(kOp, "samples", samples_);
  const Arg positions(kOp, "positions", positions_), ids(kOp, "out_ids", out_ids_);
  const Arg logprobs(kOp, "out_logprobs", out_logprobs_);
  logits.kind(Kind::kF32).rank(2);
  if (logits.size(1) < 1 || logits.size(1) > 1 << 24) {
    logits.fail("must have 1..", 1 << 24, " columns, got ", logits.size(1));
  }
  const std::vector<int64_t> rows = {logits.size(0)};
  for (const Arg* arg : {&temperature, &top_p, &min_p}) arg->kind(Kind::kF32).shape(rows);
  for (const Arg* arg : {&seeds, &samples, &positions}) arg->kind(Kind::kI64).shape(rows);
  top_k.kind(Kind::kI32).shape(rows);
  ids.writable().kind(Kind::kI64).shape(rows);
  logprobs.writable().kind(Kind::kF32).shape(rows);
  std::vector<SampleParameters> parameters(static_cast<size_t>(rows[0]));
  for (size_t r = 0; r < parameters.size(); ++r) {
    SampleParameters& p = parameters[r];
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
  }
  std::vector<int32_t> tokens(parameters.size());
  run([&](Backend& b) {
    Buffer memory;
    const int64_t vocab = logits.size(1);
    const SampleArgs args{logits.data<float>(),
                          vocab,
                          rows[0],
                          vocab,
                          parameters.data(),
                          tokens.data(),
                          logprobs.data<float>(),
                          take<float>(memory, b.pool.size() * 2 * round_up(vocab, 16) * 4),
                          nullptr};
    b.pool.run([&](const Lane& lane) { b.table->sample(args, lane); });
  });
  for (size_t r = 0; r < tokens.size(); ++r) ids.data<int64_t>()[r] = tokens[r];
}

}  // namespace

void bind_ops(py::module_& m) {
  m.def("set_op_backend", set_op_backend, py::arg("isa"), py::arg("threads"));
  m.def("layernorm", layernorm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
        py::arg("out"));
  m.def("add_layernorm", add_layernorm, py::arg("residual"), py::arg("delta"), py::arg("weight"),
        py::arg("bias"), py::arg("eps"), py::arg("out"));
  m.def("gelu", gelu, py::arg("x"), py::arg("out"));
  m.def("embed", embed, py::arg("tokens"), py::arg("positions"), py::arg("wte"), py::arg("wpe"),
        py::arg("out"));
  m.def("linear", linear, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("residual"),
        py::arg("gelu"), py::arg("out"));
  m.def("attention_prefill", attention_prefill, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("scale"), py::arg("out"));
  m.def("attention_decode", attention_decode, py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("lengths"), py::arg("scale"), py::arg("out"));
  m.def("sample", sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("openai_top_p"), py::arg("seeds"),
        py::arg("samples"), py::arg("positions"), py::arg("out_ids"), py::arg("out_logprobs"));
}

}  // namespace gpt2f

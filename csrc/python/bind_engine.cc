// The engine for gpt2_fast/model.py and generation.py, which check what users pass.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <memory>
#include <span>
#include <tuple>
#include <utility>
#include <vector>

#include "core/error.h"
#include "cpu/select.h"
#include "engine/engine.h"
#include "python/arg.h"
#include "python/bindings.h"
#include "python/cuda_backend.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

using Logits = py::array_t<float>;

// The backend of a device, by its instruction set on the CPU.
const KernelTable& table_of(const std::string& device, const std::string& isa) {
  return device == "cuda" ? *cuda_table() : *find_table(isa);
}

Precision precision_of(const std::string& name, const std::string& device) {
  static const std::pair<const char*, Precision> kNames[] = {{"fp32", Precision::kFp32},
                                                             {"bf16", Precision::kBf16},
                                                             {"fp16", Precision::kFp16},
                                                             {"int8", Precision::kInt8},
                                                             {"int4", Precision::kInt4}};
  for (const auto& [known, precision] : kNames) {
    if (name != known) continue;
    const Precision only_elsewhere = device == "cpu" ? Precision::kFp16 : Precision::kFp32;
    if (precision != only_elsewhere) return precision;
  }
  throw Error(ErrorKind::kParameter,
              cat("precision must be ",
                  device == "cpu" ? "'fp32', 'bf16', 'int8' or 'int4' on the CPU"
                                  : "'bf16', 'fp16', 'int8' or 'int4' on CUDA",
                  ", got '", name, "'"));
}

Shape shape_of(const py::dict& config, const std::string& device) {
  const auto integer = [&](const char* key) { return config[key].cast<int64_t>(); };
  Shape shape{};
  shape.layers = integer("n_layer");
  shape.width = integer("n_embd");
  shape.heads = integer("n_head");
  shape.context = integer("n_ctx");
  shape.vocab = integer("vocab_size");
  shape.inner = config["n_inner"].is_none() ? 4 * shape.width : integer("n_inner");
  shape.eps = config["layer_norm_epsilon"].cast<float>();
  shape.tied = config["tie_word_embeddings"].cast<bool>();
  shape.scale_scores = config["scale_attn_weights"].cast<bool>();
  shape.scale_by_layer = config["scale_attn_by_inverse_layer_idx"].cast<bool>();
  shape.validate();
  check(device == "cpu" || shape.head_size() <= kMaxDeviceHeadSize, ErrorKind::kParameter,
        "head size (n_embd / n_head) must be at most ", kMaxDeviceHeadSize, " on CUDA, got ",
        shape.head_size());
  return shape;
}

py::dict plan_of(const py::dict& config, const std::string& precision, int threads,
                 int64_t max_sequences, const std::string& device, bool int8_cache) {
  const Plan plan =
      make_plan(shape_of(config, device), {precision_of(precision, device), int8_cache},
                table_of(device, ""), threads, max_sequences);
  py::dict out;
  out["weights"] = plan.weights;
  out["cache"] = plan.cache;
  out["cache_block"] = plan.cache_block;
  out["scratch"] = plan.scratch;
  out["total"] = plan.total();
  return out;
}

std::unique_ptr<Engine> make_engine(const py::dict& config, const std::string& precision,
                                    const std::string& isa, int threads, int64_t max_sequences,
                                    const std::string& device, int index, bool int8_cache) {
  const Shape shape = shape_of(config, device);
  const Formats chosen{precision_of(precision, device), int8_cache};
  const KernelTable& table = table_of(device, isa);
  std::unique_ptr<Engine> engine;
  without_gil([&] {
    engine = std::make_unique<Engine>(shape, chosen, table, index, threads, max_sequences);
  });
  return engine;
}

void load(Engine& engine, const std::string& name, py::handle array, const std::string& dtype) {
  const Arg tensor("load", name.c_str(), array);
  const bool bf16 = dtype == "BF16";
  tensor.kind(bf16 ? Kind::kU16 : dtype == "F16" ? Kind::kF16 : Kind::kF32);
  const StoredTensor stored{tensor.data(), bf16 ? DType::kBF16 : tensor.dtype(), tensor.sizes()};
  without_gil([&] { engine.load(name, stored); });
}

// A read-only view, which keeps the engine.
py::array packed(const py::object& self) {
  Engine& engine = self.cast<Engine&>();
  std::span<const std::byte> bytes;
  without_gil([&] { bytes = engine.packed(); });
  const py::array_t<uint8_t> view(static_cast<py::ssize_t>(bytes.size()),
                                  reinterpret_cast<const uint8_t*>(bytes.data()), self);
  view.attr("setflags")(py::arg("write") = false);
  return view;
}

void load_packed(Engine& engine, int descriptor, int64_t offset, int64_t bytes, int64_t piece,
                 std::vector<uint32_t> checksums) {
  PackedFile file{descriptor, offset, bytes, piece, std::move(checksums)};
  without_gil([&] { engine.load_packed(std::move(file)); });
}

SampleParameters draw(float temperature, int32_t top_k, float top_p, float min_p, bool openai_top_p,
                      uint64_t seed, uint32_t sample, int64_t drawable) {
  SampleParameters p;
  p.temperature = temperature;
  p.top_k = top_k;
  p.top_p = top_p;
  p.min_p = min_p;
  p.openai_top_p = openai_top_p;
  p.seed = seed;
  p.sample = sample;
  p.drawable = drawable;
  return p;
}

// What step() was asked for one sequence: nothing (None), a Draw for its last token, "last" or
// "all" for logits, or a list of targets, one per token, -1 for none.
struct Request {
  std::vector<int32_t> tokens;
  std::vector<Wish> wishes;
  py::object logits = py::none();
  bool draws = false;
};

void ask_logits(Request& request, int64_t rows, int64_t vocab) {
  const auto count = static_cast<int64_t>(request.tokens.size());
  Logits out({rows, vocab});
  for (int64_t r = 0; r < rows; ++r) {
    Wish wish{count - rows + r, out.mutable_data(r, 0), {}};
    request.wishes.push_back(wish);
  }
  request.logits = std::move(out);
}

Request make_request(const Engine& engine, std::vector<int32_t> tokens, const py::object& want) {
  Request request{std::move(tokens), {}};
  const auto count = static_cast<int64_t>(request.tokens.size());
  if (want.is_none()) return request;
  if (py::isinstance<SampleParameters>(want)) {
    request.wishes.push_back({count - 1, nullptr, want.cast<SampleParameters>()});
    request.draws = true;
  } else if (py::isinstance<py::str>(want)) {
    ask_logits(request, want.cast<std::string>() == "all" ? count : 1, engine.shape().vocab);
  } else {
    const auto targets = want.cast<std::vector<int32_t>>();
    check(targets.size() == request.tokens.size(), ErrorKind::kParameter,
          "targets: ", targets.size(), " for ", count, " tokens");
    for (int64_t r = 0; r < count; ++r) {
      Wish wish{r, nullptr, {}};
      wish.parameters.target = targets[static_cast<size_t>(r)];
      if (wish.parameters.target >= 0) request.wishes.push_back(wish);
    }
  }
  return request;
}

py::object answer_of(const Request& request) {
  if (!request.logits.is_none()) return request.logits;
  if (request.draws) {
    return py::make_tuple(request.wishes.front().token, request.wishes.front().logprob);
  }
  if (request.wishes.empty()) return py::none();
  py::list logprobs;
  for (const Wish& wish : request.wishes) logprobs.append(wish.logprob);
  return py::object(std::move(logprobs));
}

using Item = std::tuple<int64_t, std::vector<int32_t>, py::object>;

py::list step(Engine& engine, std::vector<Item> items) {
  std::vector<Request> requests;
  requests.reserve(items.size());
  std::vector<StepItem> steps;
  for (auto& [sequence, tokens, want] : items) {
    requests.push_back(make_request(engine, std::move(tokens), want));
    steps.push_back({sequence, requests.back().tokens, requests.back().wishes});
  }
  without_gil([&] { engine.step(steps); });
  py::list answers;
  for (const Request& request : requests) answers.append(answer_of(request));
  return answers;
}

// Sequences that draw, each with its last token, which no pass has taken yet.
using Drawing = std::tuple<int64_t, int32_t, SampleParameters>;

// Up to `passes` passes without the interpreter, which costs 60 us when a pass has just gone
// through all caches. The last one is that in which a sequence draws `end` or, its logits not being
// finite, -1, or that after which an interrupt has waited for long enough.
py::list decode(Engine& engine, const std::vector<Drawing>& items, int64_t passes, int32_t end) {
  constexpr std::chrono::milliseconds kPatience{50};
  std::vector<int32_t> tokens;
  std::vector<Wish> wishes;
  for (const auto& [sequence, token, parameters] : items) {
    tokens.push_back(token);
    wishes.push_back({0, nullptr, parameters});
  }
  std::vector<StepItem> steps;
  for (size_t i = 0; i < items.size(); ++i) {
    steps.push_back({std::get<0>(items[i]), {&tokens[i], 1}, {&wishes[i], 1}});
  }
  std::vector<std::pair<int32_t, float>> drawn;  // [pass][item]
  without_gil([&] {
    const auto begin = std::chrono::steady_clock::now();
    for (bool ended = false; passes > 0 && !ended; --passes) {
      engine.step(steps);
      for (size_t i = 0; i < items.size(); ++i) {
        drawn.emplace_back(wishes[i].token, wishes[i].logprob);
        tokens[i] = wishes[i].token;
        ended = ended || tokens[i] < 0 || tokens[i] == end;
      }
      ended = ended || std::chrono::steady_clock::now() - begin > kPatience;
    }
  });
  py::list answers;
  for (size_t i = 0; i < drawn.size(); ++i) {
    if (i % items.size() == 0) answers.append(py::list());
    answers[answers.size() - 1].cast<py::list>().append(drawn[i]);
  }
  return answers;
}

// Another thread's pass may hold the engine for a while: nobody waits for it with the interpreter's
// lock in hand.
template <typename Work>
int64_t unlocked(const Work& work) {
  int64_t out = 0;
  without_gil([&] { out = work(); });
  return out;
}

}  // namespace

void bind_engine(py::module_& m) {
  m.def("plan", plan_of, py::arg("config"), py::arg("precision"), py::arg("threads"),
        py::arg("max_sequences"), py::arg("device") = "cpu", py::arg("int8_cache") = false);
  py::class_<SampleParameters>(m, "Draw").def(
      py::init(&draw), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("min_p"),
      py::arg("openai_top_p"), py::arg("seed"), py::arg("sample"), py::arg("drawable"));
  py::class_<Engine>(m, "Engine")
      .def(py::init(&make_engine), py::arg("config"), py::arg("precision"), py::arg("isa"),
           py::arg("threads"), py::arg("max_sequences"), py::arg("device") = "cpu",
           py::arg("index") = 0, py::arg("int8_cache") = false)
      .def("load", load, py::arg("name"), py::arg("array"), py::arg("dtype"))
      .def("missing", &Engine::missing)
      .def("packed", packed)
      .def("load_packed", load_packed, py::arg("descriptor"), py::arg("offset"), py::arg("bytes"),
           py::arg("piece"), py::arg("checksums"))
      .def("open", [](Engine& engine) { return unlocked([&] { return engine.open(); }); })
      .def(
          "fork",
          [](Engine& engine, int64_t id) { return unlocked([&] { return engine.fork(id); }); },
          py::arg("sequence"))
      .def(
          "close", [](Engine& engine, int64_t id) { without_gil([&] { engine.close(id); }); },
          py::arg("sequence"))
      .def(
          "length",
          [](Engine& engine, int64_t id) { return unlocked([&] { return engine.length(id); }); },
          py::arg("sequence"))
      .def("step", step, py::arg("items"))
      .def("decode", decode, py::arg("items"), py::arg("passes"), py::arg("end"))
      .def_property_readonly(
          "free_blocks",
          [](Engine& engine) { return unlocked([&] { return engine.free_blocks(); }); })
      .def_property_readonly("blocks", &Engine::blocks)
      .def_property_readonly("max_rows",
                             [](const Engine& engine) { return engine.table().max_rows; })
      .def_property_readonly("recordings", &Engine::recordings)
      .def_property_readonly("threads", &Engine::threads)
      .def_property_readonly("isa", [](const Engine& engine) { return engine.table().name; });
}

}  // namespace gpt2f

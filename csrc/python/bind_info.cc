#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <cstdlib>

#include "core/buffer.h"
#include "core/cpu_budget.h"
#include "core/crc32c.h"
#include "core/error.h"
#include "core/thread_pool.h"
#include "cpu/select.h"
#include "python/arg.h"
#include "python/bindings.h"
#include "python/cuda_backend.h"

namespace py = pybind11;

namespace gpt2f {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = GPT2_FAST_VERSION;
  info["build_type"] = GPT2_FAST_BUILD_TYPE;
  info["compiler"] = cat(
#if defined(__clang__)
      "clang ", __clang_version__
#else
      "gcc ", __VERSION__
#endif
  );
  info["isas_compiled"] = compiled_isas();
  info["cuda"] = GPT2_FAST_CUDA_VERSION;
  info["cuda_note"] = GPT2_FAST_CUDA_NOTE;
  return info;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const KernelTable* table : runnable_tables()) names.emplace_back(table->name);
  return names;
}

// Every lane sums its own contiguous part of one buffer, as the products of a decode step read
// weights: sixteen words at a time, one stream per thread.
double measure_read(int64_t bytes, int threads, int repeats) {
  const int64_t words = bytes / 4 / 1024 * 1024;
  const Buffer buffer(static_cast<size_t>(words) * 4, "read_bandwidth");
  uint32_t* const data = buffer.as<uint32_t>();
  ThreadPool pool(threads);
  std::vector<uint64_t> totals(static_cast<size_t>(threads) * 8);
  pool.run([&](const Lane& lane) {
    const Range mine = share(words, 1024, lane);
    for (int64_t i = mine.begin; i < mine.end; ++i)
      data[i] = static_cast<uint32_t>(i * 2654435761u);
  });
  double best = 0;
  for (int i = 0; i < repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](const Lane& lane) {
      const Range mine = share(words, 1024, lane);
      totals[static_cast<size_t>(lane.rank) * 8] +=
          runnable_tables().back()->read(data + mine.begin, mine.end - mine.begin);
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(words) * 4 / took.count());
  }
  volatile uint64_t used = 0;  // the sums are of no interest, but must not be optimised away
  for (const uint64_t total : totals) used = used + total;
  return best;
}

double read_bandwidth(int64_t bytes, int threads, int repeats) {
  check(bytes >= 4096 && repeats >= 1, ErrorKind::kParameter,
        "read_bandwidth: bytes must be at least 4096 and repeats at least 1, got ", bytes, " and ",
        repeats);
  double best = 0;
  without_gil([&] { best = measure_read(bytes, threads, repeats); });
  return best;
}

uint32_t checksum(const py::buffer& data, uint32_t seed) {
  const py::buffer_info info = data.request();
  const auto bytes = static_cast<size_t>(info.size * info.itemsize);
  uint32_t sum = 0;
  without_gil([&] { sum = crc32c(info.ptr, bytes, seed); });
  return sum;
}

py::list cuda_devices() {
  const DeviceTable& device = *cuda_table()->device;
  py::list all;
  for (int index = 0; index < device.count(); ++index) {
    const DeviceFacts facts = device.facts(index);
    py::dict one;
    one["index"] = index;
    one["name"] = facts.name;
    one["capability"] = py::make_tuple(facts.capability / 10, facts.capability % 10);
    one["memory_bytes"] = facts.memory;
    one["multiprocessors"] = facts.multiprocessors;
    all.append(one);
  }
  return all;
}

}  // namespace

std::string default_isa() {
  const char* const forced = std::getenv("GPT2_FAST_ISA");
  return find_table(forced == nullptr ? "" : forced)->name;
}

int default_threads() {
  const char* const forced = std::getenv("GPT2_FAST_THREADS");
  if (forced == nullptr || *forced == '\0') return cpu_budget().threads;
  char* end = nullptr;
  const long count = std::strtol(forced, &end, 10);
  check(*end == '\0' && count >= 1 && count <= 1024, ErrorKind::kParameter,
        "GPT2_FAST_THREADS must be an integer in 1..1024, got '", forced, "'");
  return static_cast<int>(count);
}

void bind_info(py::module_& module) {
  module.def("build_info", build_info);
  module.def("cuda_devices", cuda_devices);
  module.def("isas", isas);
  module.def("default_isa", default_isa);
  module.def("available_threads", default_threads);
  module.def("available_memory", available_memory, py::arg("root") = "");
  module.def(
      "cpu_budget",
      [](const std::string& root) {
        const CpuBudget budget = cpu_budget(root);
        return py::make_tuple(budget.cores, budget.quota, budget.threads);
      },
      py::arg("root") = "");
  module.def("read_bandwidth", read_bandwidth, py::arg("bytes"), py::arg("threads"),
             py::arg("repeats"));
  module.def("crc32c", checksum, py::arg("data"), py::arg("seed") = 0);
}

}  // namespace gpt2f

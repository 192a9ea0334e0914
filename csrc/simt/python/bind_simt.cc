// _C.simt: how the simulated device runs, what its checks have found, and failures on request.
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdio>
#include <string>

#include "cuda/launch.h"
#include "simt/host.h"
#include "simt/python/bindings.h"
#include "simt/race.h"

namespace py = pybind11;

namespace gpt2f::simt {
namespace {

// "module.so+0x12" at the end of a race becomes file and line, where addr2line is at hand.
std::string with_line(const std::string& race) {
  const size_t begin = race.rfind("; "), plus = race.rfind("+0x");
  if (begin == std::string::npos || plus == std::string::npos || plus < begin) return race;
  const std::string file = race.substr(begin + 2, plus - begin - 2);
  if (file.find('\'') != std::string::npos) return race;
  const std::string command =
      cat("addr2line -s -e '", file, "' ", race.substr(plus + 1), " 2>/dev/null");
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return race;
  std::array<char, 256> line{};
  const bool read = std::fgets(line.data(), line.size(), pipe) != nullptr;
  pclose(pipe);
  std::string place = read ? line.data() : "";
  while (!place.empty() && place.back() == '\n') place.pop_back();
  return place.empty() || place[0] == '?' ? race : race.substr(0, begin + 2) + place;
}

py::list races() {
  py::list found;
  for (const std::string& race : take_races()) found.append(with_line(race));
  return found;
}

py::dict stats_dict() {
  const Stats& s = stats();
  py::dict out;
  out["launches"] = s.launches;
  out["blocks"] = s.blocks;
  out["threads"] = s.threads;
  out["switches"] = s.switches;
  out["barriers"] = s.barriers;
  out["collectives"] = s.collectives;
  out["async_copies"] = s.async_copies;
  out["device_bytes"] = device_bytes_in_use();
  return out;
}

py::list traffic() {
  py::list out;
  for (const Traffic& t : take_traffic()) {
    py::dict entry;
    entry["kernel"] = t.kernel;
    entry["loaded"] = t.loaded;
    entry["loaded_once"] = t.loaded_once;
    entry["stored"] = t.stored;
    entry["stored_once"] = t.stored_once;
    out.append(entry);
  }
  return out;
}

void set_device(int count, int major, int minor, size_t memory, int missing) {
  change_device({.count = count,
                 .missing = static_cast<cudaError_t>(missing),
                 .major = major,
                 .minor = minor,
                 .memory = memory});
  cuda::launch_cache().forget();
}

}  // namespace

void bind_simt(py::module_& m) {
  m.doc() = "The simulated CUDA device: schedules, checks and planned failures.";
  py::register_exception<KernelError>(m, "KernelError", PyExc_RuntimeError);
  m.attr("has_race_checker") = instrumented;
  m.def(
      "set_schedule", [](const std::string& name) { schedule() = named_schedule(name); },
      py::arg("name"));
  m.def("races", &races, "What the race checker has found since the last call.");
  m.def("stats", &stats_dict);
  m.def("traffic", &traffic,
        "Per launch since the last call: bytes loaded and stored, all and each byte once.");
  m.def(
      "track",
      [](const py::buffer& array) {
        const py::buffer_info info = array.request();
        track(info.ptr, static_cast<size_t>(info.size * info.itemsize));
      },
      py::arg("array"), "Counts the traffic of this array, instead of that of device memory.");
  m.def("track_nothing", &track_nothing);
  m.def(
      "fail_next",
      [](const std::string& function, int error, int skip) {
        fail_next(function, static_cast<cudaError_t>(error), skip);
      },
      py::arg("function"), py::arg("error"), py::arg("skip") = 0,
      "Makes a call of a function of the CUDA runtime fail, once.");
  m.def("forget_failures", &forget_failures);
  m.def(
      "new_stream",
      [] {
        cudaStream_t stream = nullptr;
        cuda::check_cuda(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "new_stream");
        return reinterpret_cast<uintptr_t>(stream);
      },
      "A stream of its own, as a number; finish_stream waits for it and destroys it.");
  m.def(
      "finish_stream",
      [](uintptr_t number) {
        const auto stream = reinterpret_cast<cudaStream_t>(number);
        cuda::check_cuda(cudaStreamSynchronize(stream), "finish_stream");
        cuda::check_cuda(cudaStreamDestroy(stream), "finish_stream");
      },
      py::arg("stream"));
  m.def("current_device", [] {
    int index = 0;
    cuda::check_cuda(cudaGetDevice(&index), "cudaGetDevice");
    return index;
  });
  m.def("set_device", &set_device, py::arg("count") = 1, py::arg("major") = 9, py::arg("minor") = 0,
        py::arg("memory") = size_t{8} << 30, py::arg("missing") = 0,
        "The devices there are; missing: the error every call returns (35: no driver).");
}

}  // namespace gpt2f::simt

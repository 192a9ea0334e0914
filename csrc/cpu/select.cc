#include "cpu/select.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstring>

#include "core/error.h"
#include "core/fp_state.h"
#include "cpu/isa.h"

namespace gpt2f {
namespace {

struct Candidate {
  const char* name;
  const KernelTable* (*table)();
  bool (*runs)();
};

#if defined(__x86_64__)
// These builtins also ask whether the operating system saves the registers.
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
// Not every compiler's builtin knows this one.
bool runs_avx2_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return runs_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Bits of a small bfloat16 product, with elements of very different size, denormals included.
std::vector<uint16_t> probe(const KernelTable& table) {
  constexpr int64_t kRows = 4, kInputs = 512, kOutputs = 64;
  std::vector<uint16_t> x(kRows * kInputs), weight(kOutputs * kInputs), out(kRows * kOutputs);
  uint32_t state = 12345;
  const auto fill = [&state](std::vector<uint16_t>& to) {
    for (uint16_t& element : to) {
      state = state * 1664525u + 1013904223u;
      const uint32_t exponent = (state >> 24) % 16 == 0 ? (state >> 20) % 4 : 97 + state % 60;
      element = static_cast<uint16_t>((state >> 9 & 0x807Fu) | exponent << 7);
    }
  };
  fill(x);
  fill(weight);
  std::vector<uint16_t> operand(kRows * kInputs);
  std::vector<uint32_t> packed(kOutputs * kInputs);
  std::vector<float> bias(kOutputs), scratch(scratch_floats(0));
  const FpState fp;
  table.linear({DType::kBF16, x.data(), weight.data(), nullptr, nullptr, false, out.data(), kRows,
                kInputs, kOutputs, operand.data(), packed.data(), bias.data(), scratch.data()},
               Lane{});
  return out;
}

bool runs_avx512_vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool runs_avx512_bf16() {
  return runs_avx512_vnni() && __builtin_cpu_supports("avx512bf16") &&
         probe(*table_avx512_bf16()) == probe(*table_avx512());
}
#endif

const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> kAll = {
      {"scalar", table_scalar, [] { return true; }},
#if defined(__x86_64__)
      {"avx2", table_avx2, runs_avx2},
      {"avx2_vnni", table_avx2_vnni, runs_avx2_vnni},
      {"avx512", table_avx512, runs_avx512},
      {"avx512_vnni", table_avx512_vnni, runs_avx512_vnni},
      {"avx512_bf16", table_avx512_bf16, runs_avx512_bf16},
#elif defined(__aarch64__)
      {"neon", table_neon, [] { return true; }},
#endif
  };
  return kAll;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& each : candidates()) names.emplace_back(each.name);
  return names;
}

const std::vector<const KernelTable*>& runnable_tables() {
  static const std::vector<const KernelTable*> kTables = [] {
    std::vector<const KernelTable*> tables;
    for (const Candidate& each : candidates()) {
      if (each.runs()) tables.push_back(each.table());
    }
    return tables;
  }();
  return kTables;
}

const KernelTable* find_table(const std::string& name) {
  if (name.empty()) return runnable_tables().back();
  std::string choices;
  for (const KernelTable* table : runnable_tables()) {
    if (name == table->name) return table;
    if (!choices.empty()) choices += ", ";
    choices += table->name;
  }
  throw Error(ErrorKind::kDevice,
              cat("isa: '", name, "' is not available here; this machine runs ", choices));
}

}  // namespace gpt2f

// simt_cases <command>: what tests/simt runs, one process per case. Prints what happened.
//   case <name> <right|faulty> <schedule>    "result: ...", "error: ...", "race: ..."
//   list | matrices <schedule> | speed | runtime <name> | halves | fma
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cases.h"
#include "runtime_cases.h"
#include "simt/half.h"
#include "simt/race.h"

namespace {

using namespace gpt2f;

std::vector<cuda::Case> cases() {
  std::vector<cuda::Case> all = cuda::block_cases();
  for (const cuda::Case& one : cuda::order_cases()) all.push_back(one);
  return all;
}

int run_case(const std::string& name, bool faulty, const std::string& schedule) {
  simt::schedule() = simt::named_schedule(schedule);
  for (const cuda::Case& one : cases()) {
    if (name != one.name) continue;
    try {
      const std::string wrong = one.run(faulty);
      std::printf("result: %s\n", wrong.empty() ? "right" : wrong.c_str());
    } catch (const simt::KernelError& error) {
      std::printf("error: %s\n", error.what());
    }
    for (const std::string& race : simt::take_races()) std::printf("race: %s\n", race.c_str());
    return 0;
  }
  return 2;
}

int run_runtime_case(const std::string& name) {
  cuda::RuntimeCases all = cuda::stream_cases();
  for (const auto& one : cuda::memory_cases()) all.push_back(one);
  for (const auto& [known, run] : all) {
    if (name != known) continue;
    const std::string wrong = run();
    std::printf("%s\n", wrong.empty() ? "ok" : wrong.c_str());
    for (const std::string& race : simt::take_races()) std::printf("race: %s\n", race.c_str());
    return 0;
  }
  return 2;
}

// Every conversion of 16 bits, then floats around every rounding boundary, as raw words.
int write_halves() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const float both[2] = {simt::bf16_to_float(static_cast<uint16_t>(bits)),
                           simt::fp16_to_float(static_cast<uint16_t>(bits))};
    std::fwrite(both, sizeof(both), 1, stdout);
  }
  float x = 0;
  while (std::fread(&x, sizeof(x), 1, stdin) == 1) {
    const uint16_t both[2] = {simt::bf16_from_float(x), simt::fp16_from_float(x)};
    std::fwrite(both, sizeof(both), 1, stdout);
  }
  return 0;
}

// fma of pairs: three words in, one out.
int write_products() {
  uint32_t words[3];
  while (std::fread(words, sizeof(words), 1, stdin) == 1) {
    const uint32_t product = simt::fp16x2_fma(words[0], words[1], words[2]);
    std::fwrite(&product, sizeof(product), 1, stdout);
  }
  return 0;
}

int run(int count, char** words) {
  const std::string command = count > 1 ? words[1] : "";
  if (command == "list") {
    for (const cuda::Case& one : cases()) std::printf("%s\n", one.name);
    return 0;
  }
  if (command == "case" && count == 5) {
    return run_case(words[2], std::strcmp(words[3], "faulty") == 0, words[4]);
  }
  if (command == "matrices" && count == 3) {
    simt::schedule() = simt::named_schedule(words[2]);
    std::printf("wrong: %s\n", cuda::check_matrices().c_str());
    return 0;
  }
  if (command == "runtime" && count == 3) return run_runtime_case(words[2]);
  if (command == "speed") return std::printf("%s\n", cuda::measure_speed().c_str()) < 0;
  if (command == "halves") return write_halves();
  if (command == "fma") return write_products();
  return 2;
}

}  // namespace

int main(int count, char** words) {
  try {
    return run(count, words);
  } catch (const std::exception& error) {
    std::printf("failed: %s\n", error.what());
    return 1;
  }
}

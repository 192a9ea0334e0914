#include <cstring>

#include "simt/runtime.h"

namespace gpt2f::simt {

Schedule& schedule() {
  static Schedule current;
  return current;
}

Schedule named_schedule(const std::string& name) {
  using Order = Schedule::Order;
  if (name == "forward_late") return {Order::kForward, true, 1, 0};
  if (name == "reverse_early") return {Order::kReverse, false, 1, 0};
  const std::string prefix = "random_";
  const std::string digits = name.rfind(prefix, 0) == 0 ? name.substr(prefix.size()) : "";
  check(!digits.empty() && digits.size() <= 9 &&
            digits.find_first_not_of("0123456789") == std::string::npos,
        ErrorKind::kParameter,
        "schedule must be forward_late, reverse_early or random_<number>, got '", name, "'");
  const auto seed = static_cast<uint64_t>(std::stoll(digits));
  return {Order::kRandom, seed % 2 == 1, seed % 2 == 1 ? 4 : 2, seed};
}

const char* file_name(const Where& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return slash == nullptr ? where.file_name() : slash + 1;
}

std::string describe(const Where& where) {
  return where.line() == 0 ? std::string("no synchronisation")
                           : cat(file_name(where), ":", where.line());
}

}  // namespace gpt2f::simt

// Errors of the native code. csrc/python turns each kind into the class of gpt2_fast/errors.py with
// the same name; a message names the argument, what was wanted and what came.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace gpt2f {

enum class ErrorKind { kParameter, kCheckpoint, kCapacity, kDevice };

class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(message), kind_(kind) {}
  ErrorKind kind() const { return kind_; }

 private:
  ErrorKind kind_;
};

template <typename... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <typename... Parts>
void check(bool good, ErrorKind kind, const Parts&... parts) {
  if (!good) throw Error(kind, cat(parts...));
}

}  // namespace gpt2f

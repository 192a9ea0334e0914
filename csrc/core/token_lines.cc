#include "core/token_lines.h"

#include <array>
#include <charconv>

#include "core/error.h"

namespace gpt2f {
namespace {

constexpr uint32_t kNoDigit = 1 << 24;

constexpr std::array<uint32_t, 256> digits() {
  std::array<uint32_t, 256> values{};
  values.fill(kNoDigit);
  constexpr std::string_view kAlphabet =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (uint32_t i = 0; i < kAlphabet.size(); ++i) {
    values[static_cast<uint8_t>(kAlphabet[i])] = i;
  }
  return values;
}

// Writes what `coded` stands for to `to`, which has room for three bytes where `coded` has four,
// and gives the end of it; null if that is nothing or it is no base64.
char* decode_base64(std::string_view coded, char* to) {
  static constexpr auto kDigits = digits();
  if (coded.empty() || coded.size() % 4 != 0) return nullptr;
  const size_t padding = coded.ends_with("==") ? 2 : coded.ends_with('=') ? 1 : 0;
  const auto digit = [&](size_t at) { return kDigits[static_cast<uint8_t>(coded[at])]; };
  const size_t whole = coded.size() - (padding == 0 ? 0 : 4);
  uint32_t wrong = 0;
  for (size_t at = 0; at < coded.size(); at += 4) {
    uint32_t word = digit(at) << 18 | digit(at + 1) << 12;
    if (at < whole) {
      word |= digit(at + 2) << 6 | digit(at + 3);
    } else if (padding == 1) {
      word |= digit(at + 2) << 6;
    }
    wrong |= digit(at) | digit(at + 1) | word;
    *to++ = static_cast<char>(word >> 16);
    *to++ = static_cast<char>(word >> 8);
    *to++ = static_cast<char>(word);
  }
  return wrong >= kNoDigit ? nullptr : to - padding;
}

// The beginning of a line for a message, which must be text.
std::string shown(std::string_view line) {
  std::string text(line.substr(0, 80));
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

}  // namespace

TokenLines read_token_lines(std::string_view text) {
  TokenLines lines;
  lines.bytes.resize(text.size());
  char* to = lines.bytes.data();
  while (!text.empty()) {
    const size_t rank = lines.ends.size(), end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    const size_t space = line.find(' ');
    bool good = end != text.npos && space != line.npos;
    if (good) {
      size_t found = rank + 1;
      const char* const last = line.data() + line.size();
      const auto [stop, error] = std::from_chars(line.data() + space + 1, last, found);
      to = decode_base64(line.substr(0, space), to);
      good = to != nullptr && error == std::errc() && stop == last && found == rank;
    }
    check(good, ErrorKind::kParameter, "line ", rank + 1, ": wanted base64, a space and ", rank,
          ", got '", good ? std::string() : shown(line), "'");
    lines.ends.push_back(static_cast<size_t>(to - lines.bytes.data()));
    text.remove_prefix(end + 1);
  }
  lines.bytes.resize(static_cast<size_t>(to - lines.bytes.data()));
  return lines;
}

}  // namespace gpt2f

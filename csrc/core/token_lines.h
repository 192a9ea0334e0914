// The lines of a vocabulary in tiktoken's format: the bytes of a token in base64, a space, its
// rank.
//
// Source   RFC 4648, section 4 for base64; the file format is that of tiktoken's load_tiktoken_bpe.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gpt2f {

// Tokens in order of their ranks, one after the other; ends[i] is where token i ends in bytes.
struct TokenLines {
  std::string bytes;
  std::vector<size_t> ends;
};

// Ranks must be 0, 1, 2 ... in this order; each line, the last too, ends with "\n". Throws Error
// (kParameter), which names the line.
TokenLines read_token_lines(std::string_view text);

}  // namespace gpt2f

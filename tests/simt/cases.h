// Small kernels for tests/simt, each in a right form and with one fault planted.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gpt2f::cuda {

struct Case {
  const char* name;
  // Runs the kernel, right or with its fault; "" if what it computed is right.
  std::string (*run)(bool faulty);
};
std::vector<Case> block_cases();
std::vector<Case> order_cases();

constexpr int kThreads = 128;  // of a block
inline std::string right_if(bool right) { return right ? "" : "wrong numbers"; }

// matrices.cu: what the fragments of mma and ldmatrix hold, against a plain product; speed.
std::string check_matrices();
std::string measure_speed();

}  // namespace gpt2f::cuda

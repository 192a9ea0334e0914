// mma and ldmatrix against a plain product, and how fast the simulated device is.
#include <cstdio>
#include <ctime>
#include <vector>

#include "cases.h"
#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

// C (16, 8) = A (16, 16) B (16, 8), everything row-major in global memory, fragments by hand.
template <typename T>
KERNEL product(const uint16_t* a, const uint16_t* b, float* c) {
  wait_for_previous();
  const int g = lane_id() / 4, t = lane_id() % 4;
  const auto pair = [](uint16_t low, uint16_t high) {
    return low | static_cast<uint32_t>(high) << 16;
  };
  const auto a_pair = [&](int row, int k) { return pair(a[row * 16 + k], a[row * 16 + k + 1]); };
  const auto b_pair = [&](int k) { return pair(b[k * 8 + g], b[(k + 1) * 8 + g]); };
  const uint32_t fragment[4] = {a_pair(g, 2 * t), a_pair(g + 8, 2 * t), a_pair(g, 2 * t + 8),
                                a_pair(g + 8, 2 * t + 8)};
  float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma<T>(sum, fragment, b_pair(2 * t), b_pair(2 * t + 8));
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The same by ldmatrix: A as it lies, B transposed.
template <typename T>
KERNEL product_by_ldmatrix(const uint16_t* a, const uint16_t* b, float* c) {
  SHARED(uint16_t, rows_a, [16][16]);
  SHARED(uint16_t, rows_b, [16][8]);
  wait_for_previous();
  const int lane = lane_id();
  for (int i = lane; i < 256; i += 32) rows_a[i / 16][i % 16] = a[i];
  for (int i = lane; i < 128; i += 32) rows_b[i / 8][i % 8] = b[i];
  sync_block();
  uint32_t fragment[4], columns[4];
  ldmatrix_x4(fragment, &rows_a[lane % 16][lane / 16 * 8]);
  ldmatrix_x4_trans(columns, rows_b[lane % 16]);
  float sum[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  mma<T>(sum, fragment, columns[0], columns[1]);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <typename T>
std::string check_product(const char* what,
                          void (*kernel)(const uint16_t*, const uint16_t*, float*)) {
  std::vector<uint16_t> a(256), b(128);
  std::vector<float> c(128), wanted(128, 1.0f);
  // Small integers: every sum is exact.
  for (size_t i = 0; i < a.size(); ++i) a[i] = from_float<T>(static_cast<float>(i * 7 % 23) - 11);
  for (size_t i = 0; i < b.size(); ++i) b[i] = from_float<T>(static_cast<float>(i * 5 % 19) - 9);
  for (size_t m = 0; m < 16; ++m) {
    for (size_t n = 0; n < 8; ++n) {
      for (size_t k = 0; k < 16; ++k) {
        wanted[m * 8 + n] += to_float<T>(a[m * 16 + k]) * to_float<T>(b[k * 8 + n]);
      }
    }
  }
  launch("product", kernel, Grid{1}, 32, 0, nullptr, a.data(), b.data(), c.data());
  return c == wanted ? "" : what;
}

KERNEL barriers(float* out, int count) {
  wait_for_previous();
  for (int i = 0; i < count; ++i) sync_block();
  out[threadIdx.x] = 1.0f;
}
KERNEL shuffles(float* out, int count) {
  wait_for_previous();
  float value = static_cast<float>(lane_id());
  for (int i = 0; i < count; ++i) value = shuffle_xor(value, 1);
  out[threadIdx.x] = value;
}
KERNEL products(float* out, int count) {
  wait_for_previous();
  const uint32_t a[4] = {0x3C003C00, 0, 0, 0x3C003C00};
  float c[4] = {};
  for (int i = 0; i < count; ++i) mma<Fp16>(c, a, 0x3C003C00, 0);
  out[threadIdx.x] = c[0];
}

// Millions a second.
double rate(const char* name, void (*kernel)(float*, int), int threads, int blocks, int count) {
  std::vector<float> out(static_cast<size_t>(threads));
  const std::clock_t before = std::clock();
  for (int i = 0; i < blocks; ++i)
    launch(name, kernel, Grid{1}, threads, 0, nullptr, out.data(), count);
  const double seconds = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
  return static_cast<double>(threads) * blocks * (count > 0 ? count : 1) / seconds / 1e6;
}

}  // namespace

std::string check_matrices() {
  std::string wrong = check_product<Bf16>("mma bf16 ", product<Bf16>);
  wrong += check_product<Fp16>("mma fp16 ", product<Fp16>);
  wrong += check_product<Bf16>("ldmatrix bf16 ", product_by_ldmatrix<Bf16>);
  wrong += check_product<Fp16>("ldmatrix fp16 ", product_by_ldmatrix<Fp16>);
  return wrong;
}

std::string measure_speed() {
  char text[256];
  std::snprintf(
      text, sizeof(text),
      "million thread x: barriers %.1f, shuffles %.1f, mma %.1f, starts %.1f a second",
      rate("barriers", barriers, 256, 1, 10000), rate("shuffles", shuffles, 128, 1, 20000),
      rate("products", products, 128, 1, 20000), rate("barriers", barriers, 256, 2000, 0));
  return text;
}

}  // namespace gpt2f::cuda

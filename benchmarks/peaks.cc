// Peak arithmetic of this processor: `peaks THREADS SECONDS` prints "NAME GIGAOPS" lines.
//
// Every loop keeps 12 independent sums in registers, which covers the latency of the units (4-5
// cycles, two units) without spilling, and touches no memory. A multiplication and an addition are
// two operations. Instruction sets that the processor lacks are not run.
//
// Compiled by peaks.py with -O2 alone; each loop names the instruction set it needs.

#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr long kSteps = 1 << 16;  // a few hundred microseconds a call

// One call makes kSteps rounds of 12 operations on vectors of type V. Operands: 0-11 the sums, 12 a
// register to spare, 13 and 14 the factors. Assembly, because a compiler may spill or skip.
#define GPT2_FAST_LOOP(NAME, TARGET, V, OP)                                                    \
  __attribute__((target(TARGET), noinline)) void NAME() {                                      \
    V a{}, b{}, t{}, s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{}; \
    for (long step = 0; step < kSteps; ++step) {                                               \
      asm volatile(OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)   \
                   : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6),     \
                     "+v"(s7), "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11), "+v"(t)               \
                   : "v"(a), "v"(b));                                                          \
    }                                                                                          \
  }
#define GPT2_FAST_FMA(i) "vfmadd231ps %13, %14, %" #i "\n\t"
#define GPT2_FAST_BF16(i) "vdpbf16ps %13, %14, %" #i "\n\t"
#define GPT2_FAST_VNNI(i) "vpdpbusd %13, %14, %" #i "\n\t"
#define GPT2_FAST_VEX_VNNI(i) "%{vex%} vpdpbusd %13, %14, %" #i "\n\t"
// Products of bytes as AVX2 has them: pairs into 16 bits, pairs of these into 32, added.
#define GPT2_FAST_MADD(i)        \
  "vpmaddubsw %13, %14, %12\n\t" \
  "vpmaddwd %13, %12, %12\n\t"   \
  "vpaddd %12, %" #i ", %" #i "\n\t"

GPT2_FAST_LOOP(fp32_avx2, "avx2,fma", __m256, GPT2_FAST_FMA)
GPT2_FAST_LOOP(int8_avx2, "avx2", __m256i, GPT2_FAST_MADD)
GPT2_FAST_LOOP(int8_avx_vnni, "avx2", __m256i, GPT2_FAST_VEX_VNNI)
GPT2_FAST_LOOP(fp32_avx512, "avx512f", __m512, GPT2_FAST_FMA)
GPT2_FAST_LOOP(bf16_avx512, "avx512f", __m512, GPT2_FAST_BF16)
GPT2_FAST_LOOP(int8_avx512_vnni, "avx512f", __m512i, GPT2_FAST_VNNI)

struct Loop {
  const char* name;
  bool here;
  int lanes;  // multiplications of one operation
  void (*run)();
};

double giga_ops(const Loop& loop, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  std::atomic<int> ready{0};
  std::atomic<long> calls{0};
  std::vector<double> took(threads);
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    pool.emplace_back([&, t] {
      loop.run();
      ++ready;
      while (ready < threads) {
      }
      const auto start = Clock::now();
      long mine = 0;
      do {
        loop.run();
        ++mine;
        took[t] = std::chrono::duration<double>(Clock::now() - start).count();
      } while (took[t] < seconds);
      calls += mine;
    });
  }
  double longest = 0;
  for (int t = 0; t < threads; ++t) {
    pool[t].join();
    if (took[t] > longest) longest = took[t];
  }
  return 2.0 * loop.lanes * 12 * kSteps * calls / longest / 1e9;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int threads = std::atoi(arguments[1]);
  const double seconds = std::atof(arguments[2]);
  if (threads < 1 || seconds <= 0) return 2;
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  unsigned leaf = 0;
  {
    unsigned a = 7, b = 0, c = 1, d = 0;
    asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    leaf = a;  // leaf 7, subleaf 1: bit 4 AVX-VNNI, bit 5 AVX512-BF16
  }
  const Loop loops[] = {
      {"fp32 avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), 8, fp32_avx2},
      {"fp32 avx512", avx512, 16, fp32_avx512},
      {"bf16 avx512_bf16", avx512 && (leaf >> 5 & 1), 32, bf16_avx512},
      {"int8 avx2", bool(__builtin_cpu_supports("avx2")), 32, int8_avx2},
      {"int8 avx_vnni", bool(leaf >> 4 & 1), 32, int8_avx_vnni},
      {"int8 avx512_vnni", avx512 && __builtin_cpu_supports("avx512vnni"), 64, int8_avx512_vnni},
  };
  for (const Loop& loop : loops) {
    if (loop.here) std::printf("%s %.2f\n", loop.name, giga_ops(loop, threads, seconds));
  }
  return 0;
}

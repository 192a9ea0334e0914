// op_sample: sample over tensors of the device, for torch.
//
// Maths     that of sample.cu; this file only turns tensors into SampleParameters and the drawn
//           int32 tokens into int64.
// Work      one thread a row, in blocks of 128.
// Traffic   44 bytes read and 64 written per row before, 4 read and 8 written after: nothing beside
//           the 201 KB of a row of logits.
// Numerics  none. Parameters that the CPU op would refuse (it can look at them; here they are on a
//           device, and looking would stop the stream) give token -1 and NaN.
#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kLargest = 3.402823466e38f;
constexpr uint32_t kNotANumber = 0x7FC00000u;

DEVICE bool in_range(const SampleParameters& p) {
  const bool temperature = p.temperature >= 0.0f && p.temperature <= kLargest;
  const bool filters = p.top_p >= 0.0f && p.top_p <= 1.0f && p.min_p >= 0.0f && p.min_p <= 1.0f;
  return temperature && filters && p.top_k >= 0;
}

DEVICE SampleParameters parameters_of(const OpSampleArgs& a, int64_t row) {
  SampleParameters p;
  p.temperature = a.temperature[row];
  p.top_p = a.top_p[row];
  p.min_p = a.min_p[row];
  p.top_k = a.top_k[row];
  p.openai_top_p = a.openai_top_p;
  p.seed = static_cast<uint64_t>(a.seeds[row]);
  p.sample = static_cast<uint32_t>(a.samples[row]);
  p.position = a.positions[row];
  return p;
}

KERNEL LAUNCH_BOUNDS(kThreads, 1) gather(OpSampleArgs args) {
  wait_for_previous();
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= args.rows) return;
  SampleParameters p = parameters_of(args, row);
  if (!in_range(p)) p = SampleParameters{};
  args.parameters[row] = p;
}

KERNEL LAUNCH_BOUNDS(kThreads, 1) widen_tokens(OpSampleArgs args) {
  wait_for_previous();
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= args.rows) return;
  const bool good = in_range(parameters_of(args, row));
  args.tokens[row] = good ? args.drawn[row] : -1;
  if (!good) reinterpret_cast<uint32_t*>(args.logprobs)[row] = kNotANumber;
}

}  // namespace

void op_sample(const OpSampleArgs& args, const Lane& lane) {
  const Grid grid{(args.rows + kThreads - 1) / kThreads};
  launch("op_sample: gather", gather, grid, kThreads, 0, lane.stream, args);
  sample({args.logits, args.vocab, args.rows, args.vocab, args.parameters, args.drawn,
          args.logprobs, args.scratch, nullptr},
         lane);
  launch("op_sample: widen_tokens", widen_tokens, grid, kThreads, 0, lane.stream, args);
}

}  // namespace gpt2f::cuda

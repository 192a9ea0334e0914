// attention: chooses how a step's attention runs, and the same on dense tensors. Both ways give the
// same bits (attention.cuh), so the choice is one of speed: spreading a sequence's chunks over the
// device, at the price of a merge, pays where there are few rows.
#include "cuda/attention.cuh"
#include "cuda/kernels.h"

namespace gpt2f::cuda {

void attention(const AttentionArgs& args, const Lane& lane) {
  if (args.rows == 0) return;
  const bool few = args.rows <= kDecodeRows && args.longest <= kDecodeQueries &&
                   args.cache.heads * args.sequence_count <= kTickets;
  few ? attention_decode(args, lane) : attention_prefill(args, lane);
}

void dense_attention(const DenseAttentionArgs& args, const Lane& lane) {
  if (args.batch * args.heads * args.queries == 0) return;
  attention(append_kv(args, lane), lane);
}

}  // namespace gpt2f::cuda

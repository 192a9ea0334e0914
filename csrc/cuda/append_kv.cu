// append_kv: dense tensors into the pages and query rows that the stages of attention work on, for
// attention as a single operation.
//
// Shapes   query (B, H, T, D), key and value (B, H, S, D) as the caller has them; pages and rows as
//          in layout.h. One new token a sequence: B sequences of H heads. Several: B * H sequences
//          of one head, so that rows of queries and results keep the order of the dense tensors.
// Work     a block per page, then a block per 16 query rows; a thread per word, neighbours read and
//          write side by side. Page table and sequences are written by the blocks of head 0.
// Bytes    K and V read and written once, 8 S D per sequence and head. 124M at S = 1024: 6.3 MB,
//          1.9 us on an H100 (3.35 TB/s).
// Numerics copies. Positions from lengths[b] on are not read; zeros stand for them and behind D.
// Limits   a length outside T ... S counts as the nearer of the two: lengths are on the device, and
//          who calls could not check them without waiting.
// Source   pages as in Kwon et al. 2023, "PagedAttention", arXiv:2309.06180, sec. 4.
#include "cuda/attention.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

constexpr int kCopyThreads = 256;
constexpr int kCopyRows = 16;

// Scratch of the operation, in this order.
struct DensePlan {
  int64_t sequences, heads, pages;  // pages of one sequence and head
  int64_t padded;  // Dp
  uint32_t* page_words;  // (sequences, pages, heads, 16 Dp)
  uint32_t* query;  // (B, H, T, Dp / 2)
  uint32_t** table;  // (sequences, pages)
  Sequence* sequence;  // (sequences)
  int64_t words;
};

DensePlan plan_of(const DenseAttentionArgs& args) {
  DensePlan plan;
  plan.heads = args.queries == 1 ? args.heads : 1;
  plan.sequences = args.batch * args.heads / plan.heads;
  plan.pages = (args.keys + kPagePositions - 1) / kPagePositions;
  plan.padded = round_up(args.head_size, kHeadUnit);
  int64_t used = 0;
  const auto take = [&](int64_t words) {
    uint32_t* const at = args.pages == nullptr ? nullptr : args.pages + used;
    used += round_up(words, 4);
    return at;
  };
  plan.page_words = take(plan.sequences * plan.pages * plan.heads * 16 * plan.padded);
  plan.query = take(args.batch * args.heads * args.queries * plan.padded / 2);
  plan.table = reinterpret_cast<uint32_t**>(take(plan.sequences * plan.pages * 2));
  plan.sequence = reinterpret_cast<Sequence*>(
      take(plan.sequences * static_cast<int64_t>(sizeof(Sequence) / 4)));
  plan.words = used;
  return plan;
}

struct CopyTask {
  const uint16_t* query;
  const uint16_t* key;
  const uint16_t* value;
  const int32_t* lengths;
  DensePlan plan;
  int* tickets;  // of attention_decode: zero before its first launch
  int32_t dense_heads;  // H
  int32_t queries;  // T
  int32_t keys;  // S
  int32_t head_size;  // D
  int64_t query_rows;  // B H T
};

// Two neighbours of a row as one word.
DEVICE uint32_t pair_of(const uint16_t* row, int d, int head_size) {
  const uint32_t low = d < head_size ? row[d] : 0u;
  return low | (d + 1 < head_size ? static_cast<uint32_t>(row[d + 1]) << 16 : 0u);
}

DEVICE int length_of(const CopyTask& task, int64_t sequence) {
  const int length = task.lengths == nullptr
                         ? task.keys
                         : task.lengths[sequence * task.plan.heads / task.dense_heads];
  return length < task.queries ? task.queries : length > task.keys ? task.keys : length;
}

DEVICE void copy_page(const CopyTask& task, int64_t index) {
  const DensePlan& plan = task.plan;
  const int64_t head = index % plan.heads, page = index / plan.heads % plan.pages;
  const int64_t sequence = index / plan.heads / plan.pages;
  const int width = static_cast<int>(plan.padded), size = task.head_size;
  const int first = static_cast<int>(page) * kPagePositions, length = length_of(task, sequence);
  const int64_t start = ((sequence * plan.heads + head) * task.keys + first) * size;
  uint32_t* const to = plan.page_words + index * 16 * width;
  for (int i = static_cast<int>(threadIdx.x); i < 8 * width; i += kCopyThreads) {
    const int row = i / (width / 2), d = i % (width / 2) * 2;
    to[i] = first + row < length ? pair_of(task.key + start + row * size, d, size) : 0u;
    const int pair = i / width, column = i % width;
    const uint16_t* const value = task.value + start + 2 * pair * size + column;
    const int seen = column < size ? length - first - 2 * pair : 0;
    to[8 * width + i] =
        (seen > 0 ? value[0] : 0u) | (seen > 1 ? static_cast<uint32_t>(value[size]) << 16 : 0u);
  }
  if (threadIdx.x != 0) return;
  const int64_t ticket = sequence * plan.heads + head;
  if (page == 0 && ticket < kTickets) task.tickets[ticket] = 0;
  if (head != 0) return;
  plan.table[sequence * plan.pages + page] = to;
  if (page != 0) return;
  plan.sequence[sequence] = {static_cast<int32_t>(sequence) * task.queries, task.queries,
                             length - task.queries, plan.table + sequence * plan.pages};
}

KERNEL LAUNCH_BOUNDS(kCopyThreads, 4) append_kv_kernel(CopyTask task, int64_t pages) {
  wait_for_previous();
  allow_next();
  const int64_t block = static_cast<int64_t>(blockIdx.x);
  if (block < pages) return copy_page(task, block);
  const int half = static_cast<int>(task.plan.padded) / 2;
  const int64_t first = (block - pages) * kCopyRows;
  for (int i = static_cast<int>(threadIdx.x); i < kCopyRows * half; i += kCopyThreads) {
    const int64_t row = first + i / half;
    if (row >= task.query_rows) break;
    task.plan.query[row * half + i % half] =
        pair_of(task.query + row * task.head_size, i % half * 2, task.head_size);
  }
}

}  // namespace

int64_t dense_attention_words(const DenseAttentionArgs& args) {
  DenseAttentionArgs sizes = args;
  sizes.pages = nullptr;
  return plan_of(sizes).words;
}

AttentionArgs append_kv(const DenseAttentionArgs& args, const Lane& lane) {
  const DensePlan plan = plan_of(args);
  const int64_t rows = plan.sequences * args.queries;
  CopyTask task;
  task.query = static_cast<const uint16_t*>(args.query);
  task.key = static_cast<const uint16_t*>(args.key);
  task.value = static_cast<const uint16_t*>(args.value);
  task.lengths = args.lengths;
  task.plan = plan;
  task.tickets = reinterpret_cast<int*>(args.scratch);
  task.dense_heads = static_cast<int32_t>(args.heads);
  task.queries = static_cast<int32_t>(args.queries);
  task.keys = static_cast<int32_t>(args.keys);
  task.head_size = static_cast<int32_t>(args.head_size);
  task.query_rows = rows * plan.heads;
  const int64_t pages = plan.sequences * plan.pages * plan.heads;
  launch("append_kv", append_kv_kernel, Grid{pages + (task.query_rows + kCopyRows - 1) / kCopyRows},
         kCopyThreads, 0, lane.stream, task, pages);

  const Precision precision = args.type == DType::kBF16 ? Precision::kBf16 : Precision::kFp16;
  return {precision,
          plan.query,
          args.out,
          plan.heads * args.head_size,
          plan.sequence,
          plan.sequences,
          CacheLayout(precision, plan.heads, args.head_size, kHeadUnit, kHeadUnit),
          0,
          args.scale,
          args.scratch,
          args.keys,
          rows,
          args.queries};
}

}  // namespace gpt2f::cuda

// attention_decode: attention of a few new tokens per sequence, the chunks of 64 keys spread over
// the device.
//
// Maths    attention.cuh.
// Shapes   query words (R, H, Dp / 2), R <= kDecodeRows, at most 16 rows a sequence; out
//          (R, stride).
// Work     a warp per (sequence, head, chunk), a block per 4 chunks. The grid is made for n_ctx and
//          blocks behind a sequence's end leave at once, so one recording serves all positions. A
//          warp asks for its whole chunk, K and V, before it computes (D <= 64).
// Merge    with 4 chunks or fewer the block merges in shared memory. With more, each warp leaves
//          (max, sum, output) of its rows in scratch, and the last block of a (sequence, head) to
//          arrive, by a ticket, merges all chunks in order. The scratch begins with the tickets,
//          zero at rest; then outputs [row][head][chunk][Dp], then [row][head][chunk][max, sum].
// Bytes    K and V once: 4 S Dp a head. 124M at S = 1024: 3.1 MB a layer, 0.94 us on an H100
//          (3.35 TB/s); partial results, 12 * 16 * 66 floats, 50 KB, stay in L2. Short contexts are
//          bound by latency: four dependent loads (sequence, page table, keys, merge).
// Numerics attention.cuh: one order of sums, whoever merges.
// Limits   heads * sequences <= kTickets.
// Source   Dao et al. 2023, "Flash-Decoding for long-context inference" (split K, merge).
#include "cuda/attention.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

// Partial results of the chunks of one sequence and head, in shared memory or in scratch.
struct Slots {
  float* outputs;  // [row_slots per row][Dp]
  float* sums;  // [row_slots per row][max, sum]
  int64_t row_slots;
};

// The pages of a chunk, null behind the sequence's end.
struct ChunkPages {
  const uint32_t* page[kChunkPages];
};

DEVICE ChunkPages pages_of(const Sequence& sequence, int chunk, int64_t offset) {
  const int length = sequence.start + sequence.rows;
  ChunkPages pages;
#pragma unroll
  for (int i = 0; i < kChunkPages; ++i) {
    const int page = chunk * kChunkPages + i;
    const bool exists = page * kPagePositions < length;
    pages.page[i] = exists ? sequence.blocks[page] + offset : nullptr;
  }
  return pages;
}

// 16 bytes of a page, or zeros behind the sequence's end.
DEVICE uint4 load_page(const uint32_t* page, int word, bool exists) {
  return exists ? load_global16(page + word) : uint4{0, 0, 0, 0};
}

// s = q . k of the chunk's `keys` keys; as many as fit are asked for at once.
template <typename T, int Dp>
DEVICE void score_chunk(const ChunkPages& pages, int keys, const uint32_t (&q)[Dp / 32][8],
                        float (&s)[kKeyTiles][4]) {
  constexpr int kAhead = Dp <= 64 ? kKeyTiles : kKeyTiles / 2;
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int first = 0; first < kKeyTiles; first += kAhead) {
    uint4 k[kAhead][Dp / 32];
#pragma unroll
    for (int n = 0; n < kAhead; ++n) {
      const int tile = first + n;
#pragma unroll
      for (int i = 0; i < Dp / 32; ++i) {
        k[n][i] = load_page(pages.page[tile / 2], (tile % 2 * 8 + g) * (Dp / 2) + 16 * i + 4 * t,
                            tile * 8 + g < keys);
      }
    }
#pragma unroll
    for (int i = 0; i < Dp / 32; ++i) {
#pragma unroll
      for (int n = 0; n < kAhead; ++n) add_scores<T>(s[first + n], q[i], k[n][i]);
    }
  }
}

// Values of the chunk's `keys` keys; a word has those of two.
template <int Dp>
DEVICE void load_values(const ChunkPages& pages, int keys, uint4 (&v)[Dp / 32][kChunkPages][2]) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < Dp / 32; ++i) {
#pragma unroll
    for (int half = 0; half < 2 * kChunkPages; ++half) {
      v[i][half / 2][half % 2] =
          load_page(pages.page[half / 2], 8 * Dp + (t + half % 2 * 4) * Dp + 32 * i + 4 * g,
                    half * 8 + 2 * t < keys);
    }
  }
}

DEVICE void store_floats(float* to, const float (&from)[8]) {
  uint4 bits[2];
  __builtin_memcpy(bits, from, sizeof bits);
  store16(to, bits[0]);
  store16(to + 4, bits[1]);
}

// One chunk by one warp, left in slot `chunk` of every row.
template <typename T, int Dp>
DEVICE void attend_chunk(const AttentionTask& task, const Sequence& sequence, int head, int chunk,
                         const Slots& slots) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  const ChunkPages pages = pages_of(sequence, chunk, task.layer + int64_t{head} * (16 * Dp));
  const int keys = sequence.start + sequence.rows - chunk * kChunkKeys;
  const int64_t row_words = int64_t{task.heads} * (Dp / 2);
  uint32_t q[Dp / 32][8];
  load_queries<Dp>(task.query + sequence.row * row_words + head * (Dp / 2), row_words,
                   sequence.rows, q);
  uint4 v[Dp / 32][kChunkPages][2];
  if constexpr (Dp <= 64) load_values<Dp>(pages, keys, v);
  float s[kKeyTiles][4] = {};
  score_chunk<T, Dp>(pages, keys, q, s);
  if constexpr (Dp > 64) load_values<Dp>(pages, keys, v);

  const Seen seen = seen_in(sequence.start + 1, sequence.rows, chunk);
  uint32_t p[kChunkPages][4];
  float top[2], sum[2];
  weigh<T>(s, task.factor, seen, p, top);
  sum_weights<T>(p, sum);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (t == 0 && g + 8 * r < sequence.rows) {
      float* const to = slots.sums + ((g + 8 * r) * slots.row_slots + chunk) * 2;
      to[0] = top[r];
      to[1] = sum[r];
    }
  }
#pragma unroll
  for (int i = 0; i < Dp / 32; ++i) {
    float c[4][4];
    weigh_values<T>(c, p, seen, [&](int page, int half) { return v[i][page][half]; });
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (g + 8 * r >= sequence.rows) continue;
      float* const to = slots.outputs + ((g + 8 * r) * slots.row_slots + chunk) * Dp;
      store_floats(to + 32 * i + 8 * t,
                   {c[0][2 * r], c[1][2 * r], c[2][2 * r], c[3][2 * r], c[0][2 * r + 1],
                    c[1][2 * r + 1], c[2][2 * r + 1], c[3][2 * r + 1]});
    }
  }
}

// All chunks of a sequence and head, merged by one block: four results of a row a thread.
template <typename T, int Dp>
DEVICE void merge_chunks(const AttentionTask& task, const Sequence& sequence, int head,
                         const Slots& slots) {
  for (int i = static_cast<int>(threadIdx.x); i < sequence.rows * (Dp / 4); i += kThreads) {
    const int row = i / (Dp / 4), d = i % (Dp / 4) * 4;
    const float* const outputs = slots.outputs + row * slots.row_slots * Dp + d;
    const float* const sums = slots.sums + row * slots.row_slots * 2;
    float top = -__builtin_inff(), sum = 0.0f, out[4] = {};
    const int seen = (sequence.start + row) / kChunkKeys + 1;
#pragma unroll 4
    for (int chunk = 0; chunk < seen; ++chunk) {
      const Shares shares = join_sums(top, sum, sums[2 * chunk], sums[2 * chunk + 1]);
      const uint4 bits = load16(outputs + int64_t{chunk} * Dp);
      float fresh[4];
      __builtin_memcpy(fresh, &bits, sizeof fresh);
#pragma unroll
      for (int j = 0; j < 4; ++j) out[j] = join(out[j], fresh[j], shares);
    }
    uint16_t* const to =
        task.out + (sequence.row + row) * task.stride + int64_t{head} * task.head_size + d;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (d + j < task.head_size) to[j] = from_float<T>(finish(out[j], 1.0f / sum));
    }
  }
}

// Whether this block is the last of `blocks` to have left its partial results.
DEVICE bool arrives_last(int* ticket, int blocks) {
  SHARED(int, last, [1]);
  fence_device();
  sync_block();
  if (threadIdx.x == 0) last[0] = atomic_add(ticket, 1) == blocks - 1;
  sync_block();
  if (last[0] == 0) return false;
  fence_device();
  if (threadIdx.x == 0) *ticket = 0;  // for the next launch
  return true;
}

template <typename T, int Dp>
KERNEL LAUNCH_BOUNDS(kThreads, 2)
    attention_decode_kernel(AttentionTask task, int* tickets, float* outputs, float* sums) {
  SHARED(float, near_outputs, [kTileQueries * kTileWarps * Dp]);
  SHARED(float, near_sums, [kTileQueries * kTileWarps * 2]);
  wait_for_previous();
  allow_next();
  const int head = static_cast<int>(blockIdx.y), which = static_cast<int>(blockIdx.z);
  const Sequence sequence = task.sequences[which];
  const int count = static_cast<int>(chunks(sequence.start + sequence.rows));
  const int blocks = (count + kTileWarps - 1) / kTileWarps;
  if (static_cast<int>(blockIdx.x) >= blocks) return;

  Slots slots{near_outputs, near_sums, kTileWarps};
  if (blocks > 1) {
    const int64_t row_slots = chunks(task.context);
    const int64_t first = (int64_t{sequence.row} * task.heads + head) * row_slots;
    slots = {outputs + first * Dp, sums + first * 2, task.heads * row_slots};
  }
  const int chunk = static_cast<int>(blockIdx.x) * kTileWarps + warp_id();
  if (chunk < count) attend_chunk<T, Dp>(task, sequence, head, chunk, slots);
  if (blocks == 1) {
    sync_block();
  } else if (!arrives_last(tickets + which * task.heads + head, blocks)) {
    return;
  }
  merge_chunks<T, Dp>(task, sequence, head, slots);
}

}  // namespace

void attention_decode(const AttentionArgs& args, const Lane& lane) {
  const AttentionTask task = task_of(args);
  const int64_t slots = kDecodeRows * args.cache.heads * chunks(args.context);
  int* const tickets = reinterpret_cast<int*>(args.scratch);
  float* const outputs = args.scratch + kTickets;
  float* const sums = outputs + slots * args.cache.value_width;
  const Grid grid{(chunks(args.context) + kTileWarps - 1) / kTileWarps, args.cache.heads,
                  args.sequence_count};
  with_instance(args, [&](auto type, auto padded) {
    launch("attention_decode", attention_decode_kernel<decltype(type), decltype(padded)::value>,
           grid, kThreads, 0, lane.stream, task, tickets, outputs, sums);
  });
}

}  // namespace gpt2f::cuda

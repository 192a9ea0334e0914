// attention_prefill: attention of many new tokens, a block per 64 queries of one sequence and head.
//
// Maths    attention.cuh.
// Shapes   query words (R, H, Dp / 2), out (R, stride), R rows of any number of ragged sequences.
// Work     a warp per 16 queries; the block's four walk the chunks of 64 keys together. Each chunk
//          is copied to shared memory once (cp.async) while the one before is computed with: one
//          barrier a chunk. Chunks behind the block's last query are not copied, those behind a
//          warp's last not computed. Tiles with the most keys come first, short ones fill the tail.
// Grid     heads * an upper bound of the tiles of all sequences, from host values alone; a block
//          finds its tile by counting those of the sequences, 32 at a time. Where all sequences
//          have equally many rows it is a division.
// Shared   two chunks of K and V: 512 Dp bytes (32 KB at D = 64). So that the eight lanes of one
//          phase of a load touch all 32 banks once, 16-byte units are swapped: in K, unit ^ 4 in
//          odd rows (Dp 64 and 128; rows of 32 and 96 fall on different banks by themselves); in V,
//          unit ^ 2 (pair % 4).
// Bytes    Q, K, V and out once: 124M at T = S = 1024, 6.3 MB a layer, 1.9 us on an H100
//          (3.35 TB/s). K and V again per 64 queries, from L2. Arithmetic takes as long: 1.6 GFLOP,
//          1.6 us at 990 TFLOP/s, and 6.3 million exponentials, 1.8 us at 16 a clock and processor.
// Limits   attention.cuh; 64 KB of shared memory at Dp = 128, all that sm_75 has.
// Source   Dao 2023, "FlashAttention-2", arXiv:2307.08691.
#include "cuda/attention.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace gpt2f::cuda {
namespace {

// Rows [row, row + 64) of one of the sequences, -1 for none.
struct Place {
  int sequence;
  int row;
};

DEVICE int tiles_of(int rows) { return (rows + kBlockQueries - 1) / kBlockQueries; }

// Tile `slot` of all sequences, in their order; the same for all lanes of a warp.
DEVICE Place find_tile(const AttentionTask& task, int slot) {
  const int lane = lane_id();
  for (int first = 0; first < task.sequence_count; first += 32) {
    const int i = first + lane;
    const int own = i < task.sequence_count ? tiles_of(task.sequences[i].rows) : 0;
    int end = own;  // tiles of sequences first ... i
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = shuffle(end, (lane - step) & 31);
      if (lane >= step) end += before;
    }
    const int tile = slot - (end - own);
    const bool mine = tile >= 0 && tile < own;
    if (ballot(mine) != 0) {
      const int holder = static_cast<int>(warp_max(mine ? static_cast<float>(lane) : -1.0f));
      return {first + holder, shuffle(tile, holder) * kBlockQueries};
    }
    slot -= shuffle(end, 31);
  }
  return {-1, 0};
}

// Where unit `unit` of a page lies in shared memory (16 bytes; K [16][Dp / 8], V [8][Dp / 4]).
template <int Dp>
DEVICE int shared_key(int row, int unit) {
  return row * (Dp / 8) + (Dp % 64 == 0 ? unit ^ (row & 1) << 2 : unit);
}
template <int Dp>
DEVICE int shared_value(int pair, int unit) {
  return pair * (Dp / 4) + (unit ^ (pair & 3) << 1);
}

template <int Dp>
struct Tile {
  static constexpr int kPageUnits = 2 * Dp;  // of K, and of V, of one page
  static constexpr int kValues = kChunkPages * kPageUnits;  // V begins here
  static constexpr int kUnits = 2 * kValues;  // of one chunk
  static constexpr int64_t kBytes = 2 * kUnits * int64_t{16};  // of two
};

// The block's threads ask for chunk `chunk`; nothing behind `pages` pages is touched.
template <int Dp>
DEVICE void copy_chunk(uint4* shared, uint32_t* const* blocks, int64_t offset, int chunk,
                       int pages) {
  using Tile = Tile<Dp>;
  const int thread = static_cast<int>(threadIdx.x), first = chunk * kChunkPages;
  const uint32_t* from[kChunkPages];
#pragma unroll
  for (int i = 0; i < kChunkPages; ++i) {
    from[i] = blocks[first + i < pages ? first + i : 0] + (offset + 4 * thread);
  }
#pragma unroll
  for (int j = 0; j < 2 * Tile::kPageUnits / kThreads; ++j) {
    const int unit = thread + j * kThreads, value = unit - Tile::kPageUnits;
    const bool of_key = Tile::kPageUnits % kThreads == 0 ? j * kThreads < Tile::kPageUnits
                                                         : unit < Tile::kPageUnits;
    const int to = of_key ? shared_key<Dp>(unit / (Dp / 8), unit % (Dp / 8))
                          : Tile::kValues + shared_value<Dp>(value / (Dp / 4), value % (Dp / 4));
#pragma unroll
    for (int i = 0; i < kChunkPages; ++i) {
      cp_async16(shared + i * Tile::kPageUnits + to, from[i] + 4 * j * kThreads, first + i < pages);
    }
  }
  cp_async_commit();
}

// A warp's queries and the results so far of the lane's rows g and g + 8.
template <int Dp>
struct Queries {
  uint32_t q[Dp / 32][8];
  float top[2];
  float sum[2];
  float out[Dp / 32][4][4];
};

template <typename T, int Dp>
DEVICE void attend_chunk(const uint4* shared, float factor, const Seen& seen, Queries<Dp>& w) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  float s[kKeyTiles][4] = {};
#pragma unroll
  for (int i = 0; i < Dp / 32; ++i) {
#pragma unroll
    for (int n = 0; n < kKeyTiles; ++n) {
      add_scores<T>(s[n], w.q[i], shared[8 * n * (Dp / 8) + shared_key<Dp>(g, 4 * i + t)]);
    }
  }
  uint32_t p[kChunkPages][4];
  float top[2], sum[2];
  weigh<T>(s, factor, seen, p, top);
  sum_weights<T>(p, sum);
  const Shares shares[2] = {join_sums(w.top[0], w.sum[0], top[0], sum[0]),
                            join_sums(w.top[1], w.sum[1], top[1], sum[1])};
#pragma unroll
  for (int i = 0; i < Dp / 32; ++i) {
    float c[4][4];
    weigh_values<T>(c, p, seen, [&](int page, int half) {
      return shared[Tile<Dp>::kValues + (8 * page + 4 * half) * (Dp / 4) +
                    shared_value<Dp>(t, 8 * i + g)];
    });
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      float& out = w.out[i][j / 4][j % 4];
      out = join(out, c[j / 4][j % 4], shares[j % 4 / 2]);
    }
  }
}

template <typename T, int Dp>
DEVICE void store_tile(const AttentionTask& task, int64_t row, int rows, int head,
                       const Queries<Dp>& w) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (g + 8 * r >= rows) continue;
    uint16_t* const to =
        task.out + (row + g + 8 * r) * task.stride + int64_t{head} * task.head_size;
    const float inverse = 1.0f / w.sum[r];
#pragma unroll
    for (int i = 0; i < Dp / 32; ++i) {
      float value[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) value[j] = finish(w.out[i][j % 4][2 * r + j / 4], inverse);
      store_results<T>(to, 32 * i + 8 * t, task, value);
    }
  }
}

// `tiles` is how many every sequence has, 0 where they differ.
template <typename T, int Dp>
KERNEL LAUNCH_BOUNDS(kThreads, Dp <= 64 ? 3 : 2)
    attention_prefill_kernel(AttentionTask task, int slots, int tiles) {
  DYNAMIC_SHARED(uint4, shared);
  wait_for_previous();
  allow_next();
  const int head = static_cast<int>(blockIdx.x) % task.heads;
  const int slot = slots - 1 - static_cast<int>(blockIdx.x) / task.heads;
  const Place place =
      tiles == 0 ? find_tile(task, slot)
                 : Place{slot % task.sequence_count, slot / task.sequence_count * kBlockQueries};
  if (place.sequence < 0) return;
  const Sequence sequence = task.sequences[place.sequence];
  const int64_t offset = task.layer + int64_t{head} * (16 * Dp);
  const int length = sequence.start + sequence.rows;
  const int pages = (length + kPagePositions - 1) / kPagePositions;
  const int block_rows =
      sequence.rows - place.row < kBlockQueries ? sequence.rows - place.row : kBlockQueries;
  const int count = (sequence.start + place.row + block_rows - 1) / kChunkKeys + 1;
  copy_chunk<Dp>(shared, sequence.blocks, offset, 0, pages);

  const int row = warp_id() * kTileQueries;
  const int rows = block_rows - row < kTileQueries ? block_rows - row : kTileQueries;
  const int keys = sequence.start + place.row + row + 1;  // that the tile's row 0 sees
  const int64_t first = sequence.row + place.row + row;
  const int64_t row_words = int64_t{task.heads} * (Dp / 2);
  Queries<Dp> w = {};
  load_queries<Dp>(task.query + first * row_words + head * (Dp / 2), row_words, rows, w.q);
  w.top[0] = w.top[1] = -__builtin_inff();
  for (int chunk = 0; chunk < count; ++chunk) {
    cp_async_wait<0>();
    sync_block();  // the chunk is there, and nobody reads the one before any more
    if (chunk + 1 < count) {
      copy_chunk<Dp>(shared + (chunk + 1) % 2 * Tile<Dp>::kUnits, sequence.blocks, offset,
                     chunk + 1, pages);
    }
    if (rows > 0 && chunk * kChunkKeys < keys + rows - 1) {
      attend_chunk<T, Dp>(shared + chunk % 2 * Tile<Dp>::kUnits, task.factor,
                          seen_in(keys, rows, chunk), w);
    }
  }
  store_tile<T, Dp>(task, first, rows, head, w);
}

}  // namespace

void attention_prefill(const AttentionArgs& args, const Lane& lane) {
  const AttentionTask task = task_of(args);
  const int64_t n = args.sequence_count;
  const bool even = args.rows == n * args.longest;
  const int64_t tiles = even ? (args.longest + kBlockQueries - 1) / kBlockQueries : 0;
  const int64_t slots = even ? tiles * n : (args.rows + (kBlockQueries - 1) * n) / kBlockQueries;
  with_instance(args, [&](auto type, auto padded) {
    constexpr int kDp = decltype(padded)::value;
    launch("attention_prefill", attention_prefill_kernel<decltype(type), kDp>,
           Grid{slots * args.cache.heads}, kThreads, Tile<kDp>::kBytes, lane.stream, task,
           static_cast<int>(slots), static_cast<int>(tiles));
  });
}

}  // namespace gpt2f::cuda

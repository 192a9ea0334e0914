// attention: the one arithmetic that decode and prefill share, so that a row has the same bits
// whichever of them computes it, alone or among others.
//
// Tile      up to 16 queries of one sequence and head (rows of the instruction) against a chunk of
//           64 keys, 4 pages. Every chunk starts from fresh accumulators:
//             u = (q . k) * scale * log2 e    instructions in order of d; -inf behind the query
//             m_c = max u    p = 2^(u - m_c), rounded to T
//             l_c = sum p    O_c = sum p v    instructions in order of the keys, 16 at a time
//           l_c is a product with a column of ones: the weights are summed as rounded, in the order
//           in which they weigh the values.
// Merge     chunks in order, beginning with m = -inf, l = 0, O = 0: m' = max(m, m_c),
//           l' = l 2^(m - m') + l_c 2^(m_c - m'), O' likewise. A chunk of which a row sees nothing
//           has m_c = -inf and leaves the row as it is, but for the sign of a zero, which the last
//           step sets.
// Layout    C fragments of u become A fragments of p without a move (Dao 2023, arXiv:2307.08691).
//           Lane 4 g + t loads 16 bytes of key g, d = 8 t ... 8 t + 7 of a block of 32, for two
//           instructions (layout.h); and 16 bytes of V words, [pair t or t + 4][32 q + 4 g], which
//           feed column g of four tiles, so that it ends up with O[g][32 q + 8 t ... 32 q + 8 t +
//           7].
// Numerics  products and sums of the tensor core in fp32; 2^x to 2 ulp. What lies in a page behind
//           the sequence's end is masked by hand: 0 times a NaN is a NaN. Values that are not
//           finite behind a row, but not behind the last row of its tile, are noticed by what comes
//           out, and cost a pass per row.
// Limits    D up to 128, padded to 32, 64, 96 or 128.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/error.h"
#include "core/kernels.h"
#include "cuda/device.cuh"
#include "cuda/layout.h"

namespace gpt2f::cuda {

// The two ways to run a stage; attention() chooses.
void attention_decode(const AttentionArgs& args, const Lane& lane);
void attention_prefill(const AttentionArgs& args, const Lane& lane);
// Copies dense tensors into pages and gives the arguments of the stage that attends to them.
AttentionArgs append_kv(const DenseAttentionArgs& args, const Lane& lane);

constexpr int kTileQueries = 16;
constexpr int kChunkPages = kChunkKeys / kPagePositions;
constexpr int kTileWarps = 4;  // of a block: chunks in decode, tiles in prefill
constexpr int kThreads = 32 * kTileWarps;
constexpr int kBlockQueries = kTileWarps * kTileQueries;

// What a kernel needs of AttentionArgs.
struct AttentionTask {
  const uint32_t* query;  // words (R, H, Dp / 2)
  uint16_t* out;  // (R, stride)
  int64_t stride;
  const Sequence* sequences;
  int32_t sequence_count;
  int32_t heads;
  int32_t head_size;
  int32_t context;
  int64_t layer;  // words before the first head's page in a block
  float factor;  // scale * log2 e
  bool aligned;  // eight results from a multiple of eight on can be stored at once
};

inline AttentionTask task_of(const AttentionArgs& args) {
  AttentionTask task;
  task.query = args.query;
  task.out = static_cast<uint16_t*>(args.out);
  task.stride = args.stride;
  task.sequences = args.sequences;
  task.sequence_count = static_cast<int32_t>(args.sequence_count);
  task.heads = static_cast<int32_t>(args.cache.heads);
  task.head_size = static_cast<int32_t>(args.cache.head_size);
  task.context = static_cast<int32_t>(args.context);
  task.layer = args.cache.page_offset(args.layer, 0);
  task.factor = args.scale * 1.44269504088896341f;
  task.aligned = task.head_size % 8 == 0 && reinterpret_cast<uintptr_t>(args.out) % 16 == 0;
  return task;
}

// Calls run(element type, padded head size), both as types.
template <typename Run>
void with_instance(const AttentionArgs& args, const Run& run) {
  const auto sized = [&](auto type) {
    switch (args.cache.value_width) {
      case 32:
        return run(type, std::integral_constant<int, 32>());
      case 64:
        return run(type, std::integral_constant<int, 64>());
      case 96:
        return run(type, std::integral_constant<int, 96>());
      case 128:
        return run(type, std::integral_constant<int, 128>());
    }
    check(false, ErrorKind::kParameter, "attention: head size must be at most ", kMaxHeadSize,
          " on CUDA, got ", args.cache.head_size);
  };
  args.precision == Precision::kBf16 ? sized(Bf16()) : sized(Fp16());
}

constexpr int kKeyTiles = kChunkKeys / 8;

// A warp's place in its sequence, as counts of keys of the chunk at hand.
struct Seen {
  int own[2];  // what this lane's rows g and g + 8 see
  int first;  // what row 0 of the tile sees
  int last;  // what its last row sees; nothing behind may be touched
};

// `keys` positions are seen by row 0 of a tile of `rows`.
DEVICE Seen seen_in(int keys, int rows, int chunk) {
  const int g = lane_id() >> 2, before = chunk * kChunkKeys;
  Seen seen;
  seen.first = keys - before;
  seen.last = keys - before + rows - 1;
  seen.own[0] = keys - before + (g < rows ? g : rows - 1);
  seen.own[1] = keys - before + (g + 8 < rows ? g + 8 : rows - 1);
  return seen;
}

// Two A fragments for every 32 of D; rows of the tile that do not exist are zero.
template <int Dp>
DEVICE void load_queries(const uint32_t* query, int64_t row_words, int rows,
                         uint32_t (&q)[Dp / 32][8]) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < Dp / 32; ++i) {
    const uint32_t* const from = query + 16 * i + 4 * t;
    const uint4 low = g < rows ? load16(from + g * row_words) : uint4{0, 0, 0, 0};
    const uint4 high = g + 8 < rows ? load16(from + (g + 8) * row_words) : uint4{0, 0, 0, 0};
    q[i][0] = low.x, q[i][1] = high.x, q[i][2] = low.y, q[i][3] = high.y;
    q[i][4] = low.z, q[i][5] = high.z, q[i][6] = low.w, q[i][7] = high.w;
  }
}

// s += q . k for eight keys and 32 of D.
template <typename T>
DEVICE void add_scores(float (&s)[4], const uint32_t (&q)[8], const uint4& k) {
  const uint32_t low[4] = {q[0], q[1], q[2], q[3]};
  const uint32_t high[4] = {q[4], q[5], q[6], q[7]};
  mma<T>(s, low, k.x, k.y);
  mma<T>(s, high, k.z, k.w);
}

// The chunk's weights p as A fragments of 16 keys, and the largest u of both rows.
template <typename T>
DEVICE void weigh(float (&s)[kKeyTiles][4], float factor, const Seen& seen,
                  uint32_t (&p)[kChunkPages][4], float (&top)[2]) {
  const int t = lane_id() & 3;
  const bool masked = seen.first < kChunkKeys;
  const int own[2] = {seen.own[0] - 2 * t, seen.own[1] - 2 * t};
  top[0] = top[1] = -__builtin_inff();
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float u = s[n][i] * factor;
      const bool hidden = masked && own[i / 2] <= 8 * n + i % 2;
      s[n][i] = hidden ? -__builtin_inff() : u;
      top[i / 2] = fmaxf(top[i / 2], s[n][i]);
    }
  }
  float base[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = fmaxf(top[r], shuffle_xor(top[r], 1));
    top[r] = fmaxf(top[r], shuffle_xor(top[r], 2));
    base[r] = top[r] == -__builtin_inff() ? 0.0f : top[r];
  }
#pragma unroll
  for (int n = 0; n < kKeyTiles; ++n) {
    p[n / 2][n % 2 * 2] = pack2<T>(exp2_fast(s[n][0] - base[0]), exp2_fast(s[n][1] - base[0]));
    p[n / 2][n % 2 * 2 + 1] = pack2<T>(exp2_fast(s[n][2] - base[1]), exp2_fast(s[n][3] - base[1]));
  }
}

// Sums of the weights of both rows.
template <typename T>
DEVICE void sum_weights(const uint32_t (&p)[kChunkPages][4], float (&sum)[2]) {
  const uint32_t ones = pack2<T>(1.0f, 1.0f);
  float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int page = 0; page < kChunkPages; ++page) mma<T>(c, p[page], ones, ones);
  sum[0] = c[0];
  sum[1] = c[2];
}

// Zeros for positions from `limit` on in words whose even position is `position`.
DEVICE uint4 visible(const uint4& v, int position, int limit) {
  const uint32_t mask = limit > position + 1 ? 0xFFFFFFFFu : limit > position ? 0xFFFFu : 0u;
  return uint4{v.x & mask, v.y & mask, v.z & mask, v.w & mask};
}

// c += p v for 16 keys and 32 of D; v is what the lane loads of pairs t and t + 4.
template <typename T>
DEVICE void add_values(float (&c)[4][4], const uint32_t (&p)[4], const uint4& v, const uint4& w) {
  mma<T>(c[0], p, v.x, w.x);
  mma<T>(c[1], p, v.y, w.y);
  mma<T>(c[2], p, v.z, w.z);
  mma<T>(c[3], p, v.w, w.w);
}

DEVICE bool any_nan(const float (&c)[4][4]) {
  bool nan = false;
#pragma unroll
  for (int i = 0; i < 16; ++i) nan |= c[i / 4][i % 4] != c[i / 4][i % 4];
  return ballot(nan) != 0;
}

// c = p v for the chunk and 32 of D; load(page, half) gives the lane's 16 bytes of pair t + 4 half.
// Where the rows of a tile see different numbers of keys, 0 times an infinity or a NaN that a row
// does not see would spoil it; then each row gets a pass of its own, in which they are masked.
template <typename T, typename Load>
DEVICE void weigh_values(float (&c)[4][4], const uint32_t (&p)[kChunkPages][4], const Seen& seen,
                         const Load& load) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int i = 0; i < 16; ++i) c[i / 4][i % 4] = 0.0f;
  if (seen.first >= kChunkKeys) {
#pragma unroll
    for (int page = 0; page < kChunkPages; ++page) {
      add_values<T>(c, p[page], load(page, 0), load(page, 1));
    }
    return;
  }
#pragma unroll 1
  for (int row = -1; row < kTileQueries; ++row) {
    sync_warp();  // or the compiler loads all before the loop and runs out of registers
    const int limit = (row < 0 ? seen.last : seen.first + row) - 2 * t;
    float one[4][4] = {};
#pragma unroll
    for (int page = 0; page < kChunkPages; ++page) {
      const int position = page * kPagePositions;
      add_values<T>(one, p[page], visible(load(page, 0), position, limit),
                    visible(load(page, 1), position + 8, limit));
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (row < 0 || row == g + i % 4 / 2 * 8) c[i / 4][i % 4] = one[i / 4][i % 4];
    }
    if (row < 0 && (seen.first == seen.last || !any_nan(c))) return;
  }
}

// The merge: what the sums so far and the next chunk count for.
struct Shares {
  float old;
  float fresh;
};

DEVICE float join(float old, float fresh, const Shares& shares) {
  return fma(fresh, shares.fresh, old * shares.old);
}

DEVICE Shares join_sums(float& top, float& sum, float chunk_top, float chunk_sum) {
  const float next = fmaxf(top, chunk_top);
  const float base = next == -__builtin_inff() ? 0.0f : next;
  const Shares shares = {exp2_fast(top - base), exp2_fast(chunk_top - base)};
  sum = join(sum, chunk_sum, shares);
  top = next;
  return shares;
}

DEVICE float finish(float value, float inverse_sum) { return fma(value, inverse_sum, 0.0f); }

// Eight neighbouring results of one row, those behind the head size left out.
template <typename T>
DEVICE void store_results(uint16_t* row, int d, const AttentionTask& task,
                          const float (&value)[8]) {
  if (task.aligned) {
    if (d < task.head_size) {
      store16(row + d, uint4{pack2<T>(value[0], value[1]), pack2<T>(value[2], value[3]),
                             pack2<T>(value[4], value[5]), pack2<T>(value[6], value[7])});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (d + i < task.head_size) row[d + i] = from_float<T>(value[i]);
  }
}

}  // namespace gpt2f::cuda

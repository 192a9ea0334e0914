// quantized: int8 and int4 products. Rows of activations become groups of 8-bit integers with a
// scale each, as the weights are; a group's sum of products is an exact integer.
//
// Maths    y[n] = sum over groups g of s[g] t[n, g] (sum of q[k] p[n, k], k in g): s, q of the row,
//          t, p of the weights (engine/quantize.h). q = round(x / s), s = largest magnitude / 127.
// Layout   weights [group of panels][group along K][panel][bytes], then the scales of that step
//          [panel][16 outputs] in bfloat16, so that a lane reads one contiguous stream. int8: bytes
//          p + 128, [16][16 outputs][4 k]. int4: nibbles p + 8, [4][16 outputs][4 k], the low
//          halves k = 8 i ... 8 i + 3, the high ones the four behind them.
//          A row: for each group the integers, the scale, and -128 or -8 times their sum: what the
//          bytes are too large by.
// Work     that of product.inl.h.
// Traffic  8.25 or 4.5 bits a weight: 1056 or 576 bytes for 64 inputs of 16 outputs.
// Numerics integers have one sum whatever the order, so every instruction set takes its own way;
//          then one fused multiply-add a group, in order of K. Each of them: float(sum) (exact),
//          times s t, rounded once.
#pragma once

namespace {

constexpr Precision kInt8 = Precision::kInt8;
constexpr Precision kInt4 = Precision::kInt4;

// The precision of what a stage of precision P keeps between products.
template <Precision P>
constexpr Precision kActivations = P == kFp32 ? kFp32 : kBf16;

// Steps along K of a packed matrix and of the rows that it is multiplied with.
template <Precision P>
struct Steps {
  static constexpr bool kQuantized = false;
  static constexpr int64_t kPanelWords = kLanes;  // of one panel
  static constexpr int64_t kOperandWords = 1;  // of one row
  static constexpr int64_t kBlock = gpt2f::kBlockElements / gpt2f::word_elements(P);
  static int64_t count(int64_t inputs) { return gpt2f::words(P, inputs); }
};

template <Precision P, int64_t kSize, int64_t kBytes, int64_t kIntegerWords>
struct QuantizedSteps {
  static constexpr bool kQuantized = true;
  static constexpr int64_t kGroup = kSize;
  static constexpr int64_t kPanelBytes = kBytes;  // scales apart
  static constexpr int64_t kIntegers = kIntegerWords;  // words of a row's integers
  static constexpr int64_t kPanelWords = kBytes / 4 + kLanes / 2;
  static constexpr int64_t kOperandWords = kIntegerWords + 2;
  static constexpr int64_t kBlock = 256 / kSize;
  static int64_t count(int64_t inputs) { return round_up(inputs, 64) / kSize; }
};
template <>
struct Steps<kInt8> : QuantizedSteps<kInt8, 64, 1024, kDot16 ? 32 : 16> {};
template <>
struct Steps<kInt4> : QuantizedSteps<kInt4, 32, 256, 8> {};

// What a group's scale is made from: the largest magnitude of its numbers, sixteen at a time.
struct Magnitude {
  F top = fset(0.0f);
  M sound = fge(fset(0.0f), fset(0.0f));

  void add(F x) {
    const F size = as_f(uand(as_u(x), uset(0x7FFFFFFFu)));
    sound = mand(sound, fge(fset(0x1.fffffep127f), size));
    top = fmax(size, top);
  }
  float most() const { return fmost(top); }
  bool finite() const { return bits(sound) == 0xFFFF; }
};

// One row on its way into groups, sixteen elements at a time. Several groups become integers side
// by side: each of them alone is a chain of waits.
template <Precision P>
class GroupWriter {
 public:
  explicit GroupWriter(uint32_t* row) : to_(row) {}

  void put(F values) {
    fstore(pending_ + filled_, values);
    filled_ += 16;
    if (filled_ == kAtOnce * S::kGroup) flush<kAtOnce>();
  }
  // Zeros up to the last group of a row of `inputs`.
  void finish(int64_t inputs) {
    const int64_t all = S::count(inputs) * S::kGroup;
    for (int64_t k = round_up(inputs, 16); k < all; k += 16) put(fset(0.0f));
    const int groups = filled_ / S::kGroup;
    for (int i = 0; i < groups; ++i) flush<1>(i);
  }

 private:
  using S = Steps<P>;
  static constexpr bool kWide = P == kInt8 && kDot16;
  static constexpr int kAtOnce = 4;

  // N groups from group `first` of those that wait. What is not finite makes its whole group, and
  // so the row's results, NaN.
  template <int N>
  [[gnu::noinline]] void flush(int first = 0) {
    filled_ = 0;
    const float* const from = pending_ + first * S::kGroup;
    Magnitude magnitude[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      for (int i = 0; i < S::kGroup; i += 16) magnitude[n].add(fload(from + n * S::kGroup + i));
    }
    float scale[N], inverse[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const float most = magnitude[n].most();
      const bool finite = magnitude[n].finite(), some = finite && most >= 0x1p-100f;
      scale[n] = finite ? (some ? most / 127.0f : 0.0f) : __builtin_nanf("");
      inverse[n] = some ? 127.0f / most : 0.0f;
    }
    F total[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      total[n] = fset(0.0f);
      uint32_t* const to = to_ + n * S::kOperandWords;
      const bool some = inverse[n] != 0.0f;
      for (int i = 0; i < S::kGroup; i += 16) {
        const F x = some ? fload(from + n * S::kGroup + i) : fset(0.0f);
        const F q = fround(fmul(x, fset(inverse[n])));
        total[n] = fadd(total[n], q);
        if constexpr (kWide) {
          bf16_store_words(reinterpret_cast<uint16_t*>(to) + i, ushl<16>(to_u(q)));
        } else {
          store_bytes(reinterpret_cast<uint8_t*>(to) + i, to_u(q));
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      uint32_t* const to = to_ + n * S::kOperandWords + S::kIntegers;
      const int32_t sum = static_cast<int32_t>(fsum(total[n]));  // exact
      __builtin_memcpy(to, &scale[n], sizeof scale[n]);
      to[1] = static_cast<uint32_t>((P == kInt8 ? -128 : -8) * sum);
    }
    to_ += N * S::kOperandWords;
  }

  uint32_t* to_;
  int filled_ = 0;
  alignas(64) float pending_[kAtOnce * S::kGroup];
};

// Words of one row of a product's operand; of the other precisions rows are what they are.
inline int64_t quantized_row_words(Precision p, int64_t inputs) {
  return p == kInt8   ? Steps<kInt8>::count(inputs) * Steps<kInt8>::kOperandWords
         : p == kInt4 ? Steps<kInt4>::count(inputs) * Steps<kInt4>::kOperandWords
                      : 0;
}

// The rows of a product, as words.
struct Operand {
  const uint32_t* words;
  int64_t row;  // words from one to the next
};

// Few rows are prepared by every lane for itself, which is quicker than waiting for each other: a
// buffer for kRowBlock rows holds these copies. Otherwise rows are split and the lanes meet.
struct Preparation {
  bool own;
  Range mine;
  int64_t first;  // row of the buffer where this lane's copy begins

  Preparation(int64_t rows, const Lane& lane)
      : own(rows <= 4 && rows * lane.size <= gpt2f::kRowBlock),
        mine(own ? Range{0, rows} : share(rows, 1, lane)),
        first(own ? lane.rank * rows : 0) {}
  void meet(const Lane& lane) const {
    if (!own) lane.sync();
  }
};

// Rows of activations as a product of precision P takes them; `buffer` is for kRowBlock of them.
template <Precision P>
Operand operand_of(const void* x, int64_t stride, int64_t rows, int64_t inputs, void* buffer,
                   const Lane& lane) {
  if constexpr (!Steps<P>::kQuantized) {
    return {static_cast<const uint32_t*>(x), stride / gpt2f::word_elements(P)};
  } else {
    const int64_t row = quantized_row_words(P, inputs);
    const Preparation todo(rows, lane);
    uint32_t* const to = static_cast<uint32_t*>(buffer) + todo.first * row;
    for (int64_t r = todo.mine.begin; r < todo.mine.end; ++r) {
      const uint16_t* const from = static_cast<const uint16_t*>(x) + r * stride;
      if (todo.own) ask_for(from, inputs / 2);  // half of it lies in caches of other lanes
      GroupWriter<P> writer(to + r * row);
      for (int64_t c = 0; c < inputs; c += 16) writer.put(load16(from + c, inputs - c));
      writer.finish(inputs);
    }
    todo.meet(lane);
    return {to, row};
  }
}

// Adds `steps` groups to the sums of R rows and N panels. `w` is the first panel's part of the
// first step, `panel` of the `panels` that lie side by side there. On the way, if kAsk, as much
// memory from `ahead` on is asked for as is read.
template <Precision P, int R, int N, bool kAsk = false>
[[gnu::always_inline]] inline void add_groups(const uint32_t* w, int64_t panel, int64_t panels,
                                              const uint32_t* x, int64_t x_row, int64_t steps,
                                              F (&acc)[R][N],
                                              [[maybe_unused]] const uint32_t* ahead = nullptr) {
  using S = Steps<P>;
  for (int64_t g = 0; g < steps; ++g) {
    U sums[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const U correction = uset(x[r * x_row + S::kIntegers + 1]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sums[r][n] = correction;
    }
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(w);
    if constexpr (kAsk && P == kInt8 && kDotAsks) {
      dot_bytes<R, N, S::kPanelWords * 4 * N>(bytes + panel * S::kPanelBytes, x, x_row, sums,
                                              ahead);
    } else {
      if constexpr (kAsk) ask_for(ahead, S::kPanelWords * N);
      if constexpr (P == kInt8) {
        dot_bytes<R, N>(bytes + panel * S::kPanelBytes, x, x_row, sums);
      } else {
        dot_nibbles<R, N>(bytes + panel * S::kPanelBytes, x, x_row, sums);
      }
    }
    if constexpr (kAsk) ahead += S::kPanelWords * N;
    const uint16_t* const scales =
        reinterpret_cast<const uint16_t*>(bytes + panels * S::kPanelBytes) + panel * kLanes;
    if constexpr (R == 1) ask_for(scales + kAheadOne / 2, N * kLanes / 2);
    F scale[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) scale[n] = bf16_load(scales + n * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const F s = as_f(uset(x[r * x_row + S::kIntegers]));
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        acc[r][n] = ffma(to_f(sums[r][n]), fmul(s, scale[n]), acc[r][n]);
      }
    }
    w += panels * S::kPanelWords;
    x += S::kOperandWords;
  }
}

// Sixteen weights of one output of a packed matrix, from k on in one group, for the embedding.
// `step` is the group's part of the panels that lie side by side there.
template <Precision P>
inline F packed_weights(const uint32_t* step, int64_t panels, int64_t panel, int64_t lane,
                        int64_t k) {
  using S = Steps<P>;
  constexpr uint32_t kTop = 0x80808080u;
  const uint32_t* const from = step + panel * (S::kPanelBytes / 4) + lane;
  alignas(16) uint32_t four[4];  // bytes of four weights each
  if constexpr (P == kInt8) {
    for (int64_t i = 0; i < 4; ++i) four[i] = from[(k / 4 + i) * kLanes] ^ kTop;
  } else {
    for (int64_t i = 0; i < 2; ++i) {
      const uint32_t eight = from[(k / 8 + i) * kLanes];
      for (int64_t half = 0; half < 2; ++half) {
        four[2 * i + half] = (((eight >> 4 * half & 0x0F0F0F0Fu) | kTop) - 0x08080808u) ^ kTop;
      }
    }
  }
  const uint16_t* const scales =
      reinterpret_cast<const uint16_t*>(step + panels * S::kPanelBytes / 4);
  const uint32_t scale = scales[panel * kLanes + lane];
  return fmul(load_bytes(reinterpret_cast<const int8_t*>(four)),
              fset(gpt2f::from_bits(scale << 16)));
}

}  // namespace

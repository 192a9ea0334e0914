// Warp-wide operations: all 32 lanes meet, the last one to come does the work, all go on.
#include <bit>
#include <cmath>
#include <cstring>

#include "simt/half.h"
#include "simt/runtime.h"

namespace gpt2f::simt {
namespace {

constexpr uint32_t kAll = 0xFFFFFFFFu;

const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::kSyncWarp:
      return "sync_warp";
    case Collective::kShuffle:
      return "shuffle";
    case Collective::kBallot:
      return "ballot";
    case Collective::kSum:
      return "warp_sum";
    case Collective::kMax:
      return "warp_max";
    case Collective::kMmaBf16:
    case Collective::kMmaFp16:
      return "mma";
    case Collective::kLdmatrix:
      return "ldmatrix_x4";
    case Collective::kLdmatrixTransposed:
      return "ldmatrix_x4_trans";
  }
  return "";
}

std::string call_at(Collective kind, const Where& where) {
  return cat(name_of(kind), " at ", describe(where));
}

float as_float(uint64_t word) { return std::bit_cast<float>(static_cast<uint32_t>(word)); }

// The butterfly of warp_sum: all lanes end with the same bits, since a + b is b + a.
template <typename Add>
uint32_t butterfly(const uint64_t* lane, Add add) {
  float part[32];
  for (int i = 0; i < 32; ++i) part[i] = as_float(lane[i]);
  for (int distance = 16; distance > 0; distance /= 2) {
    for (int i = 0; i < distance; ++i) part[i] = add(part[i], part[i + distance]);
  }
  return std::bit_cast<uint32_t>(part[0]);
}

// Eight floats; the compiler splits them where the machine's vectors are shorter.
using Eight = float __attribute__((vector_size(32)));

// Tensor cores add the products of one instruction in an order that is not documented; here they
// are added in order of k, then to c. The pairs of a register are neighbours along k.
template <float (*to_float)(uint16_t)>
void multiply(const uint64_t* lane) {
  uint32_t a_pairs[16][8], b_pairs[8][8];  // b by columns
  for (int l = 0; l < 32; ++l) {
    const auto& mine = *reinterpret_cast<const MmaOperands*>(lane[l]);
    const int g = l / 4, t = l % 4;
    a_pairs[g][t] = mine.a[0];
    a_pairs[g + 8][t] = mine.a[1];
    a_pairs[g][t + 4] = mine.a[2];
    a_pairs[g + 8][t + 4] = mine.a[3];
    b_pairs[g][t] = mine.b0;
    b_pairs[g][t + 4] = mine.b1;
  }
  uint16_t halves[24 * 16];
  std::memcpy(halves, a_pairs, sizeof(a_pairs));
  std::memcpy(halves + 256, b_pairs, sizeof(b_pairs));
  float floats[24 * 16];
  for (int i = 0; i < 24 * 16; ++i) floats[i] = to_float(halves[i]);
  Eight b[16], sum[16];
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < 8; ++n) b[k][n] = floats[256 + 16 * n + k];
  }
  for (int m = 0; m < 16; ++m) {
    Eight row{};
    for (int k = 0; k < 16; ++k) row += floats[16 * m + k] * b[k];
    sum[m] = row;
  }
  for (int l = 0; l < 32; ++l) {
    float* c = reinterpret_cast<const MmaOperands*>(lane[l])->c;
    const int g = l / 4, t = l % 4;
    for (int h = 0; h < 2; ++h) {
      c[h] += sum[g][2 * t + h];
      c[2 + h] += sum[g + 8][2 * t + h];
    }
  }
}

void load_matrices(const uint64_t* lane, bool transposed) {
  for (int l = 0; l < 32; ++l) {
    uint32_t* r = reinterpret_cast<const LdmatrixOperands*>(lane[l])->r;
    for (int i = 0; i < 4; ++i) {
      uint16_t pair[2];
      for (int h = 0; h < 2; ++h) {
        const int row = transposed ? 2 * (l % 4) + h : l / 4;
        const int column = transposed ? l / 4 : 2 * (l % 4) + h;
        const void* from = reinterpret_cast<const LdmatrixOperands*>(lane[8 * i + row])->row;
        pair[h] = static_cast<const uint16_t*>(from)[column];
      }
      r[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

}  // namespace

void complete(Exchange& exchange, Collective kind) {
  switch (kind) {
    case Collective::kSyncWarp:
    case Collective::kShuffle:
      return;
    case Collective::kBallot:
      exchange.result = 0;
      for (int i = 0; i < 32; ++i) exchange.result |= (exchange.lane[i] & 1) << i;
      return;
    case Collective::kSum:
      exchange.result = butterfly(exchange.lane, [](float x, float y) { return x + y; });
      return;
    case Collective::kMax:
      exchange.result = butterfly(exchange.lane, [](float x, float y) { return std::fmax(x, y); });
      return;
    case Collective::kMmaBf16:
      return multiply<bf16_to_float>(exchange.lane);
    case Collective::kMmaFp16:
      return multiply<fp16_to_float>(exchange.lane);
    case Collective::kLdmatrix:
      return load_matrices(exchange.lane, false);
    case Collective::kLdmatrixTransposed:
      return load_matrices(exchange.lane, true);
  }
}

const Exchange& meet(Collective kind, uint64_t word, const Where& where) {
  const InRuntime guard;
  Thread& me = running();
  Warp& warp = *me.warp;
  if (warp.left != 0) {
    fail(cat("calls ", call_at(kind, where), " after lanes of its warp have left the kernel"));
  }
  if (warp.arrived == 0) {
    warp.kind = kind;
    warp.where = where;
  } else if (warp.kind != kind || !same_place(warp.where, where)) {
    fail(cat("calls ", call_at(kind, where), " while its warp waits in ",
             call_at(warp.kind, warp.where), ": warp divergence"));
  }
  Exchange& exchange = warp.exchange[warp.turn % 2];
  exchange.lane[me.lane] = word;
  warp.arrived |= 1u << me.lane;
  if (warp.arrived != kAll) {
    yield(State::kWarp, where);
    return exchange;
  }
  complete(exchange, kind);
  ++stats().collectives;
  warp.arrived = 0;
  ++warp.turn;
  if (kind == Collective::kSyncWarp) ++warp.interval;
  Thread* others[31];
  size_t count = 0;
  Thread* first = &me - me.lane;
  for (uint32_t i = 0; i < 32; ++i) {
    if (i != me.lane) others[count++] = first + i;
  }
  release(others, count);
  me.where = where;
  return exchange;
}

void leave_warp(Thread& thread) {
  Warp& warp = *thread.warp;
  if (warp.arrived != 0) {
    fail("leaves the kernel while its warp waits in " + call_at(warp.kind, warp.where));
  }
  warp.left |= 1u << thread.lane;
}

}  // namespace gpt2f::simt

// Lanes of a pool meet again and again, and take each other's pieces; more of them than processors,
// so that they sleep too. Prints nothing and ends with 0 when everyone saw what it should.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "core/thread_pool.h"

namespace {

using gpt2f::Lane;

void require(bool good, const char* what, int threads) {
  if (good) return;
  std::fprintf(stderr, "%d threads: %s\n", threads, what);
  std::_Exit(1);
}

void meet(gpt2f::ThreadPool& pool, int meetings) {
  const int size = pool.size();
  std::vector<int> seen(static_cast<size_t>(size), 0);  // plain: only the barrier orders it
  pool.run([&](const Lane& lane) {
    for (int i = 1; i <= meetings; ++i) {
      if (i % 97 == lane.rank) std::this_thread::sleep_for(std::chrono::milliseconds(3));
      seen[static_cast<size_t>(lane.rank)] = i;
      lane.sync();
      for (const int other : seen) require(other == i, "one was left behind", size);
      lane.sync();
    }
  });
  for (const int last : seen) require(last == meetings, "run() came back early", size);
}

void share_pieces(gpt2f::ThreadPool& pool, int64_t count, int64_t unit) {
  std::vector<int> times(static_cast<size_t>(count), 0);
  const auto take = [&](int64_t begin, int64_t end) {
    require(end - begin <= unit || pool.size() == 1, "a piece is too large", pool.size());
    for (int64_t i = begin; i < end; ++i) ++times[static_cast<size_t>(i)];
  };
  pool.run([&](const Lane& lane) {
    for (int job = 0; job < 50; ++job) {
      gpt2f::take_shares(count, unit, lane, take);
      lane.sync();
      gpt2f::take_pieces(count, lane, [&](int64_t piece) { take(piece, piece + 1); });
      lane.sync();
    }
  });
  for (const int each : times) require(each == 100, "a piece was lost or taken twice", pool.size());
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 4, 5, 8, 13}) {
    gpt2f::ThreadPool pool(threads);
    for (int i = 0; i < 3; ++i) {
      meet(pool, 400);
      for (const int64_t count : {0, 1, 7, 64, 1000}) {
        for (const int64_t unit : {1, 3, 16}) share_pieces(pool, count, unit);
      }
    }
  }
}

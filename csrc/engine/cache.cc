#include "engine/cache.h"

#include <algorithm>

#include "core/error.h"

namespace gpt2f {

Cache::Cache(Place& place, int64_t blocks, int64_t block_words)
    : place_(place),
      block_words_(block_words),
      memory_(place, Region::Kind::kPlace, blocks * block_words * 4, "KV cache"),
      users_(static_cast<size_t>(blocks), 0) {
  free_.reserve(static_cast<size_t>(blocks));
  for (int64_t i = blocks; i-- > 0;) free_.push_back(memory_.as<uint32_t>() + i * block_words);
}

int32_t& Cache::users(const uint32_t* block) {
  return users_[static_cast<size_t>((block - memory_.as<uint32_t>()) / block_words_)];
}

uint32_t* Cache::take() {
  uint32_t* const block = free_.back();
  free_.pop_back();
  users(block) = 1;
  return block;
}

void Cache::reserve(CachedSequence& sequence, int64_t length) {
  const int64_t have = static_cast<int64_t>(sequence.blocks.size());
  const int64_t need = (length + kPagePositions - 1) / kPagePositions;
  const bool partial = sequence.length % kPagePositions != 0;
  const bool copy = length > sequence.length && partial && users(sequence.blocks.back()) > 1;
  const int64_t wanted = std::max<int64_t>(0, need - have) + (copy ? 1 : 0);
  check(wanted <= free_blocks(), ErrorKind::kCapacity, "KV cache: ", wanted,
        " more blocks of 16 positions wanted, ", free_blocks(), " of ", blocks(), " are free");
  if (copy) {
    uint32_t* const own = take();
    place_.copy(own, sequence.blocks.back(), block_words_ * 4);
    --users(sequence.blocks.back());
    sequence.blocks.back() = own;
  }
  for (int64_t i = have; i < need; ++i) sequence.blocks.push_back(take());
}

CachedSequence Cache::fork(const CachedSequence& from) {
  for (const uint32_t* block : from.blocks) ++users(block);
  return from;
}

void Cache::release(CachedSequence& sequence) {
  for (auto block = sequence.blocks.rbegin(); block != sequence.blocks.rend(); ++block) {
    if (--users(*block) == 0) free_.push_back(*block);
  }
  sequence.blocks.clear();
  sequence.length = 0;
}

}  // namespace gpt2f

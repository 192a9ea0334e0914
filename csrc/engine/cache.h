// The paged KV cache: blocks of 16 positions, shared between sequences until one of them writes.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/place.h"

namespace gpt2f {

struct CachedSequence {
  std::vector<uint32_t*> blocks;
  int64_t length = 0;  // positions held
};

class Cache {
 public:
  Cache(Place& place, int64_t blocks, int64_t block_words);

  // Makes room for positions up to `length`; a shared last block is copied before it is written.
  // Throws Error (kCapacity) and changes nothing when the blocks do not suffice.
  void reserve(CachedSequence& sequence, int64_t length);
  CachedSequence fork(const CachedSequence& from);
  void release(CachedSequence& sequence);

  int64_t free_blocks() const { return static_cast<int64_t>(free_.size()); }
  int64_t blocks() const { return static_cast<int64_t>(users_.size()); }

 private:
  uint32_t* take();
  int32_t& users(const uint32_t* block);

  Place& place_;
  int64_t block_words_;
  Region memory_;
  std::vector<int32_t> users_;    // sequences that hold a block
  std::vector<uint32_t*> free_;   // lowest address last, so that memory stays compact
};

}  // namespace gpt2f

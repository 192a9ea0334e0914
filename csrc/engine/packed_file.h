// Bytes that were packed before, read from a file into memory that kernels use.
//
// Read, not mapped. What is read lies on huge pages (core/buffer.cc), which decoding needs to reach
// the bandwidth of memory; a mapping has pages of 4 KB, and a file that somebody else cuts off
// while it is mapped kills the process. Every lane reads stretches of its own and checks each piece
// while it is in its cache, so a checksum costs no second pass over memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/thread_pool.h"

namespace gpt2f {

struct PackedFile {
  int descriptor;
  int64_t offset;  // of the first byte in the file
  int64_t bytes;
  int64_t piece;  // bytes that one checksum covers; the last piece may be shorter
  std::vector<uint32_t> checksums;  // CRC-32C of each piece
};

// Reads file.bytes bytes to `to`. Throws Error: kParameter for a piece below 1 byte, kCheckpoint
// when the number of checksums is not that of the pieces, for an error of the system, for a file
// that ends too early, and for a piece whose checksum differs; of several the one that lies first.
void read_packed(ThreadPool& pool, const PackedFile& file, std::byte* to);

}  // namespace gpt2f

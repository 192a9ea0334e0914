// Bytes that were packed before, brought from a file into memory that kernels use.
//
// A large file is mapped first: pages that the system holds already are there at once, while
// memory that is new costs several times its reading. Every lane has stretches of its own mapped
// and checks each piece. A second later a thread of low priority reads stretch after stretch once
// more, onto huge pages (core/buffer.h), which decoding needs to reach the bandwidth of memory, and
// puts each in the place of its mapping, at the same addresses, while kernels use
// them. A file that somebody else cuts off while it is mapped kills the process; so it stays mapped
// for no longer than that takes, and what changed since the first look is an error.
//
// A small file, and one that cannot be mapped, is read: huge pages at once, and no thread.
#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#include "core/thread_pool.h"

namespace gpt2f {

struct PackedFile {
  int descriptor;
  int64_t offset;  // of the first byte in the file; mapped where it is a multiple of a page
  int64_t bytes;
  int64_t piece;  // bytes that one checksum covers; the last piece may be shorter
  std::vector<uint32_t> checksums;  // CRC-32C of each piece
};

// A file's bytes in memory of somebody else, who keeps that for longer.
class LoadedFile {
 public:
  // Brings file.bytes bytes to `to`, memory of a Buffer. The descriptor is not used afterwards.
  // Throws Error: kParameter for a piece below 1 byte, kCheckpoint when the number of checksums is
  // not that of the pieces, for an error of the system, for a file that ends too early, and for a
  // piece whose checksum differs; of several the one that lies first.
  LoadedFile(ThreadPool& pool, PackedFile file, std::byte* to);
  // Leaves zeros where the file was still mapped.
  ~LoadedFile();
  LoadedFile(const LoadedFile&) = delete;
  LoadedFile& operator=(const LoadedFile&) = delete;

  // Throws Error (kCheckpoint) if the file turned out to have changed while it was mapped.
  void check() const;
  // Returns when nothing is mapped any more. Throws as check().
  void finish();

 private:
  void map();
  void unmap();
  void load(ThreadPool& pool);
  void start();
  void stop();
  void settle();
  bool settle_next();

  PackedFile file_;  // with a descriptor of its own while something is mapped
  std::byte* const to_;
  int64_t mapped_ = 0;  // bytes that were mapped at first
  int64_t settled_ = 0;  // of those, bytes that no longer are
  pid_t owner_ = 0;  // the process that has the thread
  std::unique_ptr<std::thread> thread_;  // whose the following are while it runs, and settled_
  std::binary_semaphore leave_{0};  // before it begins
  std::atomic<bool> stop_{false};
  std::atomic<bool> changed_{false};
  std::string reason_;  // written before changed_
};

}  // namespace gpt2f

#include "core/buffer.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/dtype.h"
#include "core/error.h"

namespace gpt2f {

Buffer::Buffer(size_t bytes, const char* purpose) : bytes_(bytes) {
  constexpr size_t kHugePage = size_t{2} << 20;
  if (bytes == 0) return;
  const size_t alignment = bytes >= kHugePage ? kHugePage : 4096;
  check(bytes < (size_t{1} << 46), ErrorKind::kCapacity, purpose, ": ", bytes,
        " bytes are more than any machine has");
  mapped_ = static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 4096)) + alignment;
  map_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
              -1, 0);
  if (map_ == MAP_FAILED) {
    map_ = nullptr;
    throw Error(ErrorKind::kCapacity,
                cat(purpose, ": ", bytes, " bytes could not be had (", std::strerror(errno), ")"));
  }
  const uintptr_t base = reinterpret_cast<uintptr_t>(map_);
  data_ = reinterpret_cast<void*>((base + alignment - 1) / alignment * alignment);
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(data_, bytes, MADV_HUGEPAGE);  // advice only: refusal is no error
#endif
}

Buffer::~Buffer() {
  if (map_ != nullptr) munmap(map_, mapped_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      map_(std::exchange(other.map_, nullptr)),
      mapped_(std::exchange(other.mapped_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(map_, other.map_);
  std::swap(mapped_, other.mapped_);
  return *this;
}

}  // namespace gpt2f

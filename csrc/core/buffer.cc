#include "core/buffer.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/dtype.h"
#include "core/error.h"

namespace gpt2f {

void advise_huge(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

std::byte* map_pages(int64_t bytes) {
  const int64_t whole = round_up(bytes, sysconf(_SC_PAGESIZE));
  const int64_t spare = bytes >= kHugePage ? kHugePage : 0;
  void* const map = mmap(nullptr, static_cast<size_t>(whole + spare), PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) return nullptr;
  auto* const from = static_cast<std::byte*>(map);
  if (spare == 0) return from;
  const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map));
  const int64_t before = round_up(address, kHugePage) - address, behind = spare - before;
  if (before > 0) munmap(from, static_cast<size_t>(before));
  if (behind > 0) munmap(from + before + whole, static_cast<size_t>(behind));
  advise_huge(from + before, bytes);
  return from + before;
}

Buffer::Buffer(size_t bytes, const char* purpose) : bytes_(bytes) {
  if (bytes == 0) return;
  check(bytes < (size_t{1} << 46), ErrorKind::kCapacity, purpose, ": ", bytes,
        " bytes are more than any machine has");
  data_ = map_pages(static_cast<int64_t>(bytes));
  if (data_ == nullptr) {
    throw Error(ErrorKind::kCapacity,
                cat(purpose, ": ", bytes, " bytes could not be had (", std::strerror(errno), ")"));
  }
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

}  // namespace gpt2f

// A block of zeroed memory on huge pages where the system gives them. Pages are committed when they
// are first written, so a large reservation that is not used costs nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpt2f {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Asks for huge pages where whole ones fit; a refusal is no error.
void advise_huge(void* data, int64_t bytes);

// Such a block, from a huge page on if it is as long as one; null, with the reason in errno, when
// there is none. munmap() takes it, in parts too.
std::byte* map_pages(int64_t bytes);

class Buffer {
 public:
  Buffer() = default;
  Buffer(size_t bytes, const char* purpose);  // throws Error (kCapacity)
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  template <typename T>
  T* as(size_t offset_bytes = 0) const {
    return reinterpret_cast<T*>(data_ + offset_bytes);
  }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace gpt2f

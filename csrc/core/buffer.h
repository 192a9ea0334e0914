// A block of zeroed memory on huge pages where the system gives them. Pages are committed when they
// are first written, so a large reservation that is not used costs nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gpt2f {

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
    return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset_bytes);
  }
  size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;  // asked for
  void* map_ = nullptr;
  size_t mapped_ = 0;  // with room to align to a huge page
};

}  // namespace gpt2f

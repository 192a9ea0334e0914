// Where a model lives: a backend's table with the threads or the device that run it, and memory
// there.
#pragma once

#include <cstddef>
#include <utility>

#include "core/buffer.h"
#include "core/kernels.h"
#include "core/thread_pool.h"

namespace gpt2f {

class Place {
 public:
  // Device `index` of the backend; on the CPU there is one. `threads` also prepare weights.
  Place(const KernelTable& table, int index, Precision precision, int threads);
  ~Place();
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;

  const KernelTable& table() const { return table_; }
  bool remote() const { return device_ != nullptr; }  // its memory is not the host's
  ThreadPool& pool() { return pool_; }

  // Runs function(lane) on all threads, or enqueues what it launches on the device.
  template <typename Function>
  void run(const Function& function) {
    if (!remote()) {
      pool_.run(function);
      return;
    }
    Lane lane;
    lane.stream = table_.device->stream(device_);
    function(lane);
  }

  // In order with what run() enqueues. Host memory must stay as it is until finish().
  void upload(void* to, const void* from, int64_t bytes);
  void download(void* to, const void* from, int64_t bytes);
  void copy(void* to, const void* from, int64_t bytes);
  void finish();
  void drain() noexcept;  // finish(), whatever went wrong

  // Records what function() enqueues instead of running it.
  template <typename Function>
  Recording* record(const Function& function) {
    const DeviceTable& device = *table_.device;
    device.begin(device_);
    try {
      function();
    } catch (...) {
      device.abandon(device_);
      throw;
    }
    return device.end(device_);
  }
  void replay(Recording* recording) { table_.device->replay(device_, recording); }
  void discard(Recording* recording) { table_.device->discard(device_, recording); }
  int64_t free_memory();

 private:
  friend class Region;
  friend class PlaceGuard;
  const KernelTable& table_;
  ThreadPool pool_;
  Device* device_ = nullptr;
};

// While it lives the calling thread works on the place's device; then on the one before.
class PlaceGuard {
 public:
  explicit PlaceGuard(const Place& place);
  ~PlaceGuard();
  PlaceGuard(const PlaceGuard&) = delete;
  PlaceGuard& operator=(const PlaceGuard&) = delete;

 private:
  const DeviceTable* const table_;
  int before_ = 0;
};

// Zeroed memory of a place, or page-locked memory of the host next to it.
class Region {
 public:
  enum class Kind { kPlace, kHost };
  Region(Place& place, Kind kind, int64_t bytes, const char* purpose);
  ~Region();
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  Place& place_;
  const Kind kind_;
  Buffer buffer_;
  void* data_ = nullptr;
};

}  // namespace gpt2f

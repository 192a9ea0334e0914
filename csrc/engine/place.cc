#include "engine/place.h"

#include <cstring>

#include "core/error.h"

namespace gpt2f {

Place::Place(const KernelTable& table, int index, Precision precision, int threads)
    : table_(table), pool_(threads) {
  if (table.device != nullptr) device_ = table.device->open(index, precision);
}

Place::~Place() {
  if (remote()) table_.device->close(device_);
}

void Place::upload(void* to, const void* from, int64_t bytes) {
  if (remote()) {
    table_.device->upload(device_, to, from, bytes);
  } else if (to != from) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

void Place::download(void* to, const void* from, int64_t bytes) {
  if (remote()) {
    table_.device->download(device_, to, from, bytes);
  } else if (to != from) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

void Place::copy(void* to, const void* from, int64_t bytes) {
  if (remote()) {
    table_.device->copy(device_, to, from, bytes);
  } else {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

void Place::finish() {
  if (remote()) table_.device->finish(device_);
}

void Place::drain() noexcept {
  try {
    finish();
  } catch (const Error&) {
    // The error that led here is on its way.
  }
}

int64_t Place::free_memory() {
  const PlaceGuard guard(*this);
  return table_.device->free_memory(device_);
}

PlaceGuard::PlaceGuard(const Place& place)
    : table_(place.remote() ? place.table_.device : nullptr) {
  if (table_ != nullptr) before_ = table_->enter(table_->index(place.device_));
}

PlaceGuard::~PlaceGuard() {
  if (table_ != nullptr) table_->leave(before_);
}

Region::Region(Place& place, Kind kind, int64_t bytes, const char* purpose)
    : place_(place), kind_(kind) {
  if (!place.remote()) {
    buffer_ = Buffer(static_cast<size_t>(bytes), purpose);
    data_ = buffer_.as<void>();
    return;
  }
  const PlaceGuard guard(place);
  const DeviceTable& device = *place.table_.device;
  data_ = kind == Kind::kPlace ? device.allocate(place.device_, bytes, purpose)
                               : device.allocate_host(place.device_, bytes);
}

Region::~Region() {
  if (!place_.remote()) return;
  const DeviceTable& device = *place_.table_.device;
  kind_ == Kind::kPlace ? device.release(place_.device_, data_)
                        : device.release_host(place_.device_, data_);
}

}  // namespace gpt2f

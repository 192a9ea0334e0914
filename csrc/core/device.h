// What the engine asks of a backend whose memory is not the host's: one table of plain functions.
// Every function throws Error (kDevice) that names the call that failed, and kCapacity where memory
// ran out, unless it says otherwise.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace gpt2f {

struct Device;  // one processor of the backend with a stream of its own
struct Recording;  // kernels and copies recorded once, replayed with one call

struct DeviceFacts {
  char name[256];
  int capability;  // 10 major + minor
  int multiprocessors;
  int64_t memory;  // bytes in all
};

struct DeviceTable {
  int (*count)();  // devices that can be used; throws with the reason when the system has none
  DeviceFacts (*facts)(int index);
  int (*capability)(int index);  // as in the facts, but quick
  Device* (*open)(int index, Precision);  // also refuses what the device cannot compute
  void (*close)(Device*);  // never throws
  void* (*stream)(Device*);
  int (*index)(Device*);
  int (*enter)(int index);  // makes it the calling thread's device and returns the one before,
  void (*leave)(int);  // which this restores; never throws

  void* (*allocate)(Device*, int64_t bytes, const char* purpose);  // zeroed
  void (*release)(Device*, void*);  // never throws
  void* (*allocate_host)(Device*, int64_t bytes);  // page-locked, zeroed
  void (*release_host)(Device*, void*);  // never throws

  // In order on the device's stream. Host memory must stay as it is until finish().
  void (*upload)(Device*, void* to, const void* from, int64_t bytes);
  void (*download)(Device*, void* to, const void* from, int64_t bytes);
  void (*copy)(Device*, void* to, const void* from, int64_t bytes);
  void (*finish)(Device*);  // waits for the stream

  // Everything enqueued between begin and end is recorded and not run. abandon() leaves a recording
  // that failed half way; it never throws.
  void (*begin)(Device*);
  Recording* (*end)(Device*);
  void (*abandon)(Device*);
  void (*replay)(Device*, Recording*);
  void (*discard)(Device*, Recording*);  // never throws

  int64_t (*free_memory)(Device*);  // bytes
};

}  // namespace gpt2f

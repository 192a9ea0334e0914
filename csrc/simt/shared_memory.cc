// Shared memory of a block: every byte starts as 0xFF (NaN, -1), arrays have gaps around them that
// are checked when the block ends, and under AddressSanitizer whenever they are touched.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace gpt2f::simt {
namespace {

constexpr size_t kArena = 512 * 1024;
constexpr size_t kGap = 128;
constexpr int kGapByte = 0xA5;
constexpr size_t kMostStatic = 48 * 1024;

// Hands out `bytes` behind what is in use, and a gap behind them.
char* take(Block& block, const void* key, const char* name, size_t bytes) {
  const size_t offset = block.used;
  const size_t end = (offset + bytes + 127) / 128 * 128 + kGap;
  if (end > kArena) fail_launch("too much shared memory");
  char* array = block.arena + offset;
  ASAN_UNPOISON_MEMORY_REGION(array, end - offset);
  std::memset(array, 0xFF, bytes);
  std::memset(array + bytes, kGapByte, end - offset - bytes);
  ASAN_POISON_MEMORY_REGION(array + bytes, end - offset - bytes);
  block.used = end;
  block.shared += bytes;
  block.arrays.push_back({key, name, offset, bytes});
  return array;
}

}  // namespace

void prepare_shared(Block& block, size_t dynamic_bytes) {
  if (block.arena == nullptr) {
    block.memory.reset(static_cast<char*>(std::aligned_alloc(1024, kArena)));
    block.arena = block.memory.get();
    if (block.arena == nullptr) throw std::bad_alloc();
  }
  ASAN_UNPOISON_MEMORY_REGION(block.arena, kArena);
  std::memset(block.arena, kGapByte, kGap);
  ASAN_POISON_MEMORY_REGION(block.arena, kArena);
  block.used = kGap;
  block.shared = 0;
  block.arrays.clear();
  take(block, nullptr, "dynamic shared memory", dynamic_bytes);
}

void* dynamic_shared() { return running().home->arena + kGap; }

void* shared_array(const void* key, const char* name, size_t bytes) {
  const InRuntime guard;
  Block& block = *running().home;
  for (const SharedArray& array : block.arrays) {
    if (array.key == key) return block.arena + array.offset;
  }
  size_t fixed = bytes - block.arrays.front().bytes;
  for (const SharedArray& array : block.arrays) fixed += array.bytes;
  if (fixed > kMostStatic) fail(cat("static shared memory beyond 48 KB with array ", name));
  return take(block, key, name, bytes);
}

void check_shared(const Block& block) {
  ASAN_UNPOISON_MEMORY_REGION(block.arena, block.used);
  size_t begin = 0;
  const char* before = "shared memory";
  for (size_t i = 0; i <= block.arrays.size(); ++i) {
    const size_t end = i < block.arrays.size() ? block.arrays[i].offset : block.used;
    for (size_t at = begin; at < end; ++at) {
      if (static_cast<unsigned char>(block.arena[at]) == kGapByte) continue;
      const bool behind = i > 0;
      fail_launch(cat("block ", block.number, " writes shared memory ",
                      behind ? at - begin : end - at,
                      behind ? " bytes past the end of " : " bytes before the begin of ", before));
    }
    if (i == block.arrays.size()) break;
    begin = end + block.arrays[i].bytes;
    before = block.arrays[i].name;
  }
}

std::string shared_place(const Block& block, const void* address) {
  const auto* at = static_cast<const char*>(address);
  if (at < block.arena || at >= block.arena + block.used) return "";
  for (const SharedArray& array : block.arrays) {
    const char* begin = block.arena + array.offset;
    if (at >= begin && at < begin + array.bytes) return cat(array.name, " byte ", at - begin);
  }
  return "a gap between shared arrays";
}

// ---- Asynchronous copies -----------------------------------------------------------------------

namespace {

void land(const AsyncCopy& copy) {
  note_access(copy.to, 16, true, copy.where);
  if (copy.valid) {
    std::memcpy(copy.to, copy.from, 16);
  } else {
    std::memset(copy.to, 0, 16);
  }
}

}  // namespace

void copy_async(void* to, const void* from, bool valid, const Where& where) {
  const InRuntime guard;
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0) misaligned("cp_async16 to", to, where);
  if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    misaligned("cp_async16 from", from, where);
  }
  Thread& me = running();
  const char* arena = me.home->arena;
  if (to < arena || to >= arena + kArena) {
    fail(cat("cp_async16 at ", describe(where), ": the target is not in shared memory"));
  }
  ++stats().async_copies;
  if (valid) note_access(from, 16, false, where);
  const AsyncCopy copy{to, from, valid, me.groups, where};
  if (!schedule().late_copies) return land(copy);
  note_access(to, 16, true, where);
  std::memset(to, 0xFF, 16);
  me.copies.push_back(copy);
}

void commit_copies() { ++running().groups; }

// Lands the copies of the groups before `groups`.
void land_copies(Thread& thread, uint32_t groups) {
  size_t landed = 0;
  while (landed < thread.copies.size() && thread.copies[landed].group < groups) {
    land(thread.copies[landed++]);
  }
  thread.copies.erase(thread.copies.begin(),
                      thread.copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

void wait_copies(uint32_t keep) {
  const InRuntime guard;
  Thread& me = running();
  if (me.groups > keep) land_copies(me, me.groups - keep);
}

void misaligned(const char* what, const void* address, const Where& where) {
  const InRuntime guard;
  fail(cat(what, " ", address, " at ", describe(where), ": the address is not a multiple of 16"));
}

}  // namespace gpt2f::simt

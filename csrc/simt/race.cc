#include "simt/race.h"

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "simt/host.h"

namespace gpt2f::simt {

bool instrumented = false;

namespace {

// What a block has made known to whoever counts on the same counter: its stores of earlier
// intervals, and those of the counting thread.
struct Published {
  uint32_t interval;
  uint32_t thread;
};
using View = std::unordered_map<uint32_t, Published>;  // by block

struct BlockState {
  View seen;                                          // what all its threads may rely on
  std::vector<std::pair<uint32_t, View>> seen_by;     // by one thread, until the next barrier
  std::set<uint32_t> unfenced;                        // threads that stored and did not fence
  std::unordered_map<uint32_t, uint32_t> fenced;      // thread -> interval of its last fence
};

struct Epoch {
  uint32_t block, interval;
};

struct Checker {
  uint32_t launch = 0;
  bool overlaps = false;
  uint32_t next_epoch = 1;
  uint32_t first_epoch = 1;    // of this launch
  uint32_t overlap_epoch = 1;  // first of the launches that this one may overlap
  std::vector<Epoch> epochs;   // of this launch
  std::unordered_map<uint32_t, BlockState> blocks;
  std::unordered_map<const int*, View> counters;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::array<std::pair<uintptr_t, Page*>, 4096> recent{};
  std::vector<std::pair<const char*, size_t>> tracked;
  std::vector<std::string> races;
  std::set<std::tuple<const void*, uint32_t, std::string>> reported;
  std::vector<Traffic> traffic;
  uint32_t until_switch = 0;
};
Checker checker;

// Where an access stands in the source, or else in the program.
struct Origin {
  const void* code;
  Where where;
};

constexpr size_t kMostRaces = 20;
constexpr size_t kMostTraffic = 4096;
constexpr size_t kMostPages = 65536;

void merge(View& into, const View& from) {
  for (const auto& [block, published] : from) {
    const auto [entry, fresh] = into.try_emplace(block, published);
    if (!fresh && entry->second.interval < published.interval) entry->second = published;
  }
}

bool covers(const View& view, const Epoch& epoch, uint32_t thread) {
  const auto found = view.find(epoch.block);
  if (found == view.end()) return false;
  return epoch.interval < found->second.interval ||
         (epoch.interval == found->second.interval && thread == found->second.thread);
}

// Whether another block's access is known to come before what the running thread does now.
bool seen(const Epoch& epoch, uint32_t by) {
  const auto state = checker.blocks.find(running().home->number);
  if (state == checker.blocks.end()) return false;
  if (covers(state->second.seen, epoch, by)) return true;
  return std::any_of(state->second.seen_by.begin(), state->second.seen_by.end(),
                     [&](const auto& entry) {
                       return entry.first == running().number && covers(entry.second, epoch, by);
                     });
}

bool seen_nothing() {
  const auto state = checker.blocks.find(running().home->number);
  return state == checker.blocks.end() ||
         (state->second.seen.empty() && state->second.seen_by.empty());
}

// Whether the access comes before what the running thread does now.
bool ordered(const Mark& mark, bool shared) {
  if (mark.epoch < checker.first_epoch) return true;
  const Thread& me = running();
  if (mark.epoch == me.home->epoch) {
    return mark.thread == me.number ||
           (mark.thread / 32 == me.number / 32 &&
            mark.warp_interval != static_cast<uint16_t>(me.warp->interval));
  }
  if (shared) return true;
  const Epoch& epoch = checker.epochs[mark.epoch - checker.first_epoch];
  return epoch.block == me.home->number || seen(epoch, mark.thread);
}

bool loads_ordered(const Mark& mark, bool shared) {
  if (mark.epoch < checker.first_epoch) return true;
  const Thread& me = running();
  if (!shared && mark.several_blocks && seen_nothing()) return false;
  if (mark.epoch == me.home->epoch) {
    if (mark.several_warps) return false;
    if (mark.several_lanes && mark.thread / 32 == me.number / 32) {
      return mark.warp_interval != static_cast<uint16_t>(me.warp->interval);
    }
  }
  return ordered(mark, shared);
}

Mark mark_now(unsigned bytes) {
  const Thread& me = running();
  Mark mark;
  mark.epoch = me.home->epoch;
  mark.warp_interval = static_cast<uint16_t>(me.warp->interval);
  mark.thread = static_cast<uint16_t>(me.number) & 1023;
  mark.bytes = bytes & 3;
  return mark;
}

void remember_load(Mark& mark, unsigned bytes, bool shared) {
  const Mark old = mark;
  mark = mark_now(bytes);
  if (old.epoch < checker.first_epoch) return;
  const bool same_block =
      shared || old.epoch == mark.epoch ||
      checker.epochs[old.epoch - checker.first_epoch].block == running().home->number;
  mark.several_blocks = old.several_blocks || !same_block;
  if (old.epoch != mark.epoch || old.bytes != mark.bytes) return;
  mark.several_warps = old.several_warps || old.thread / 32 != mark.thread / 32;
  mark.several_lanes =
      old.warp_interval == mark.warp_interval && (old.several_lanes || old.thread != mark.thread);
}

void remember_store(Mark& mark, unsigned bytes) {
  const bool mine = mark.epoch == running().home->epoch && mark.thread == running().number;
  mark = mark_now(mine ? bytes | mark.bytes : bytes);
}

std::string code_place(const Origin& origin) {
  Dl_info info{};
  if (origin.code == nullptr) return describe(origin.where);
  if (dladdr(origin.code, &info) == 0) return cat(origin.code);
  return cat(info.dli_fname, "+0x", std::hex,
             static_cast<const char*>(origin.code) - static_cast<const char*>(info.dli_fbase));
}

// Whether to report this: each place once for each kind, and not too many.
bool is_new(const Origin& origin, const char* kind) {
  if (checker.races.size() >= kMostRaces) return false;
  const void* code = origin.code != nullptr ? origin.code : origin.where.file_name();
  return checker.reported.emplace(code, origin.where.line(), kind).second;
}

std::string place_of(const void* address) {
  std::string shared = shared_place(*running().home, address);
  if (!shared.empty()) return shared;
  for (const auto& [begin, bytes] : checker.tracked) {
    const auto* at = static_cast<const char*>(address);
    if (at >= begin && at < begin + bytes) return cat("tracked array byte ", at - begin);
  }
  return device_place(address);
}

void report_race(const char* kind, const void* address, const Origin& origin, const Mark& other,
                 bool shared) {
  if (!is_new(origin, kind)) return;
  std::string who = cat("thread ", other.thread);
  if (!shared && other.epoch >= checker.first_epoch) {
    who = cat("block ", checker.epochs[other.epoch - checker.first_epoch].block, " ", who);
  }
  checker.races.push_back(cat("kernel ", kernel_name(), ": ", kind, " race on ", place_of(address),
                              ": ", describe(running()), ", last synchronised at ",
                              describe(running().where), ", and ", who, "; ", code_place(origin)));
}

void report_early(const char* what, const void* address, const Origin& origin) {
  if (!is_new(origin, what)) return;
  checker.races.push_back(cat("kernel ", kernel_name(), ": ", what,
                              " before wait_for_previous: ", place_of(address), ": ",
                              describe(running()), "; ", code_place(origin)));
}

void check_cell(Cell& cell, unsigned bytes, const char* address, bool store, bool shared,
                const Origin& origin) {
  if ((cell.store.bytes & bytes) != 0 && !ordered(cell.store, shared)) {
    report_race(store ? "write-write" : "read-after-write", address, origin, cell.store, shared);
  }
  if (!store) return remember_load(cell.load, bytes, shared);
  if ((cell.load.bytes & bytes) != 0 && !loads_ordered(cell.load, shared)) {
    report_race("write-after-read", address, origin, cell.load, shared);
  }
  remember_store(cell.store, bytes);
}

// Calls check_cell for the bytes of a run of cells that begins at `base`.
void check_cells(Cell* cells, const char* base, size_t begin, size_t end, bool store, bool shared,
                 const Origin& origin) {
  for (size_t at = begin; at < end; at = at / 2 * 2 + 2) {
    const bool low = at % 2 == 0, high = at / 2 * 2 + 1 < end;
    check_cell(cells[at / 2], (low ? 1u : 0u) | (high ? 2u : 0u), base + at, store, shared, origin);
  }
}

// ---- Global memory -----------------------------------------------------------------------------

bool counted(const char* begin, size_t bytes) {
  if (checker.tracked.empty()) return in_device_memory(begin, bytes);
  return std::any_of(checker.tracked.begin(), checker.tracked.end(), [&](const auto& range) {
    return begin >= range.first && begin + bytes <= range.first + range.second;
  });
}

bool touched(const char* begin, size_t bytes) {
  if (checker.tracked.empty()) return touches_device_memory(begin, bytes);
  return std::any_of(checker.tracked.begin(), checker.tracked.end(), [&](const auto& range) {
    return begin < range.first + range.second && begin + bytes > range.first;
  });
}

Page& page_at(uintptr_t number) {
  auto& recent = checker.recent[number % checker.recent.size()];
  if (recent.first != number || recent.second == nullptr) {
    auto& page = checker.pages[number];
    if (page == nullptr) page = std::make_unique<Page>();
    recent = {number, page.get()};
  }
  Page& page = *recent.second;
  if (page.launch != checker.launch) {
    const auto* begin = reinterpret_cast<const char*>(number * Page::kBytes);
    page.launch = checker.launch;
    page.loaded.fill(0);
    page.stored.fill(0);
    page.counted = counted(begin, Page::kBytes)   ? Page::Counted::kAll
                   : touched(begin, Page::kBytes) ? Page::Counted::kSome
                                                  : Page::Counted::kNone;
  }
  return page;
}

void count(Page& page, size_t begin, size_t end, bool store) {
  Traffic& traffic = checker.traffic.back();
  auto& bits = store ? page.stored : page.loaded;
  int64_t once = 0;
  for (size_t at = begin; at < end;) {
    const size_t stop = std::min(end, at / 64 * 64 + 64);
    const uint64_t wanted = (stop - at == 64 ? ~uint64_t{0} : (uint64_t{1} << (stop - at)) - 1)
                            << at % 64;
    once += std::popcount(wanted & ~bits[at / 64]);
    bits[at / 64] |= wanted;
    at = stop;
  }
  (store ? traffic.stored : traffic.loaded) += static_cast<int64_t>(end - begin);
  (store ? traffic.stored_once : traffic.loaded_once) += once;
}

// Before wait_for_previous the kernels before this one may still run.
void check_early(const Page& page, size_t begin, size_t end, const char* base, bool store,
                 const Origin& origin) {
  if (store) return report_early("stores", base + begin, origin);
  for (size_t at = begin; at < end; at += 2) {
    const uint32_t epoch = page.cells[at / 2].store.epoch;
    if (epoch >= checker.overlap_epoch && epoch < checker.first_epoch) {
      return report_early("loads what an earlier kernel wrote", base + at, origin);
    }
  }
}

void check_global(uintptr_t address, size_t bytes, bool store, const Origin& origin) {
  while (bytes > 0) {
    const size_t begin = address % Page::kBytes;
    const size_t end = std::min<size_t>(Page::kBytes, begin + bytes);
    Page& page = page_at(address / Page::kBytes);
    const auto* base = reinterpret_cast<const char*>(address - begin);
    if (checker.overlaps && !running().waited_for_previous) {
      check_early(page, begin, end, base, store, origin);
    }
    check_cells(page.cells.data(), base, begin, end, store, false, origin);
    if (page.counted == Page::Counted::kAll ||
        (page.counted == Page::Counted::kSome && counted(base + begin, end - begin))) {
      count(page, begin, end, store);
    }
    address += end - begin;
    bytes -= end - begin;
  }
  if (store) checker.blocks[running().home->number].unfenced.insert(running().number);
}

// Under a random schedule another thread may go on at any access.
void maybe_switch() {
  if (schedule().order != Schedule::Order::kRandom || checker.until_switch-- > 0) return;
  checker.until_switch = static_cast<uint32_t>(random_number() % 64);
  step_aside();
}

void check_any(const void* address, size_t bytes, bool store, const Origin& origin) {
  Thread& me = running();
  const auto* at = static_cast<const char*>(address);
  if (at >= me.fiber.stack && at < me.fiber.stack + me.fiber.stack_bytes) return;
  Block& block = *me.home;
  if (at >= block.arena && at < block.arena + block.used) {
    const auto begin = static_cast<size_t>(at - block.arena);
    if (block.cells.size() < block.used / 2) block.cells.resize(block.used / 2);
    check_cells(block.cells.data(), block.arena, begin, std::min(begin + bytes, block.used), store,
                true, origin);
  } else {
    check_global(reinterpret_cast<uintptr_t>(address), bytes, store, origin);
  }
}

}  // namespace

void check_access(const void* address, size_t bytes, bool store, const void* code) {
  const InRuntime guard;
  check_any(address, bytes, store, {code, Where()});
  maybe_switch();
}

void note_access(const void* address, size_t bytes, bool store, const Where& where) {
  const InRuntime guard;
  if (instrumented) check_any(address, bytes, store, {nullptr, where});
}

void begin_launch(bool overlaps) {
  if (!instrumented) return;
  ++checker.launch;
  checker.overlaps = overlaps;
  checker.first_epoch = checker.next_epoch;
  checker.epochs.clear();
  checker.blocks.clear();
  checker.counters.clear();
  if (checker.pages.size() > kMostPages) {
    checker.pages.clear();
    checker.recent.fill({});
  }
  if (checker.traffic.size() >= kMostTraffic) checker.traffic.clear();
  checker.traffic.push_back({kernel_name()});
}

// Empty in code for devices before 9.0.
void wait_for_previous() {
  const Device& own = device();
  if (own.compiled_for == 0 || own.compiled_for >= 90) running().waited_for_previous = true;
}

void end_overlap() { checker.overlap_epoch = checker.next_epoch; }

void begin_interval(Block& block) {
  ++block.interval;
  if (!instrumented) return;
  block.epoch = checker.next_epoch++;
  checker.epochs.push_back({block.number, block.interval});
  const auto state = checker.blocks.find(block.number);
  if (state == checker.blocks.end()) return;
  for (const auto& [thread, view] : std::exchange(state->second.seen_by, {})) {
    merge(state->second.seen, view);
  }
}

void fence() {
  const InRuntime guard;
  if (!instrumented) return;
  const Thread& me = running();
  BlockState& state = checker.blocks[me.home->number];
  state.unfenced.erase(me.number);
  state.fenced[me.number] = me.home->interval;
}

int atomic_add(int* address, int value) {
  const InRuntime guard;
  const int old = *address;
  *address = old + value;
  if (!instrumented) return old;
  const Thread& me = running();
  BlockState& state = checker.blocks[me.home->number];
  View& counter = checker.counters[address];
  const View before = counter;
  const auto fenced = state.fenced.find(me.number);
  if (state.unfenced.empty() ||
      (fenced != state.fenced.end() && fenced->second == me.home->interval)) {
    merge(counter, state.seen);
    merge(counter, {{me.home->number, {me.home->interval, me.number}}});
  }
  state.seen_by.emplace_back(me.number, before);
  return old;
}

std::vector<std::string> take_races() {
  checker.reported.clear();
  return std::exchange(checker.races, {});
}
std::vector<Traffic> take_traffic() { return std::exchange(checker.traffic, {}); }
void track(const void* begin, size_t bytes) {
  checker.tracked.emplace_back(static_cast<const char*>(begin), bytes);
}
void track_nothing() { checker.tracked.clear(); }

}  // namespace gpt2f::simt

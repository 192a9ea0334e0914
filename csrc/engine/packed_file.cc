#include "engine/packed_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <mutex>
#include <sstream>
#include <system_error>
#include <utility>

#include "core/buffer.h"
#include "core/crc32c.h"
#include "core/dtype.h"
#include "core/error.h"

namespace gpt2f {
namespace {

// What one lane takes at a time: two huge pages, so that no two lanes touch one for the first time
// together, which would clear it twice.
constexpr int64_t kStretch = 2 * kHugePage;

// Smaller files take a few milliseconds to read.
constexpr int64_t kLeastMapped = int64_t{32} << 20;

// How long a mapping is left alone: the copy takes time from the first results, and a process that
// has but one text to write may be over by then.
constexpr auto kPatience = std::chrono::seconds(1);

std::string hexadecimal(uint32_t value) {
  std::ostringstream text;
  text << std::hex;
  text.width(8);
  text.fill('0');
  text << value;
  return text.str();
}

int64_t page_bytes() { return sysconf(_SC_PAGESIZE); }

int64_t count_pieces(const PackedFile& file) {
  return file.bytes / file.piece + (file.bytes % file.piece != 0);
}

int64_t pieces_together(const PackedFile& file) {
  return std::max<int64_t>(1, kStretch / file.piece);
}

struct Piece {
  int64_t index, begin, end;
};

Piece piece_at(const PackedFile& file, int64_t index) {
  const int64_t begin = index * file.piece;
  return {index, begin, begin + std::min(file.piece, file.bytes - begin)};
}

// Why the piece at `data` is not the right one; nothing when it is.
std::string check_piece(const PackedFile& file, const Piece& piece, const std::byte* data) {
  const uint32_t wanted = file.checksums[static_cast<size_t>(piece.index)];
  const uint32_t found = crc32c(data, static_cast<size_t>(piece.end - piece.begin));
  if (found == wanted) return {};
  return cat("damaged: piece ", piece.index, ", bytes ", file.offset + piece.begin, "..",
             file.offset + piece.end - 1, ", should have checksum ", hexadecimal(wanted), ", has ",
             hexadecimal(found));
}

// Why the piece cannot be had; nothing when it is at `to` now.
std::string read_piece(const PackedFile& file, const Piece& piece, std::byte* to) {
  for (int64_t at = piece.begin; at < piece.end;) {
    const ssize_t got =
        pread(file.descriptor, to + (at - piece.begin), static_cast<size_t>(piece.end - at),
              static_cast<off_t>(file.offset + at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return cat("cannot be read at byte ", file.offset + at, ": ", strerror(errno));
    if (got == 0) {
      return cat("wanted ", file.bytes, " bytes from byte ", file.offset,
                 ", the file ends at byte ", file.offset + at);
    }
    at += got;
  }
  return check_piece(file, piece, to);
}

// Makes the pages of a mapping present. False when some cannot be had, and touching them would kill
// the process. Linux before 5.14 does not know the request; there they come when they are touched.
bool populate(std::byte* data, int64_t bytes) {
#if defined(MADV_POPULATE_READ)
  return madvise(data, static_cast<size_t>(bytes), MADV_POPULATE_READ) == 0 || errno == EINVAL;
#else
  (void)data, (void)bytes;
  return true;
#endif
}

}  // namespace

LoadedFile::LoadedFile(ThreadPool& pool, PackedFile file, std::byte* to)
    : file_(std::move(file)), to_(to) {
  gpt2f::check(file_.piece >= 1, ErrorKind::kParameter, "piece must be at least 1, got ",
               file_.piece);
  gpt2f::check(static_cast<int64_t>(file_.checksums.size()) == count_pieces(file_),
               ErrorKind::kCheckpoint, "wanted ", count_pieces(file_), " checksums, one for each ",
               file_.piece, " of ", file_.bytes, " bytes, got ", file_.checksums.size());
  map();
  try {
    load(pool);
    start();
  } catch (...) {
    unmap();
    throw;
  }
}

LoadedFile::~LoadedFile() {
  stop();
  unmap();
}

void LoadedFile::check() const {
  gpt2f::check(!changed_.load(std::memory_order_acquire), ErrorKind::kCheckpoint,
               "weights: the prepared file changed while it was being loaded: ", reason_);
}

void LoadedFile::finish() {
  stop();
  settle();
  check();
  gpt2f::check(settled_ == mapped_, ErrorKind::kCapacity, "weights: no memory for ",
               mapped_ - settled_, " of ", mapped_, " bytes");
}

// Puts a mapping of the file where the bytes are wanted, if it is worth it and can be done.
void LoadedFile::map() {
  const int64_t page = page_bytes();
  struct stat state;
  if (file_.bytes < kLeastMapped || kStretch % file_.piece != 0 || file_.piece % page != 0 ||
      file_.offset < 0 || file_.offset % page != 0 || fstat(file_.descriptor, &state) != 0 ||
      !S_ISREG(state.st_mode) || state.st_size - file_.offset < file_.bytes) {
    return;
  }
  const int descriptor = fcntl(file_.descriptor, F_DUPFD_CLOEXEC, 0);
  if (descriptor < 0) return;
  const auto bytes = static_cast<size_t>(round_up(file_.bytes, page));
  // Elsewhere first: a mapping that fails may leave a hole in its place.
  void* const mapping = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE,
                             descriptor, static_cast<off_t>(file_.offset));
  if (mapping != MAP_FAILED &&
      mremap(mapping, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to_) != MAP_FAILED) {
    file_.descriptor = descriptor;
    mapped_ = static_cast<int64_t>(bytes);
    return;
  }
  if (mapping != MAP_FAILED) munmap(mapping, bytes);
  close(descriptor);
}

void LoadedFile::unmap() {
  if (settled_ == mapped_) return;
  mmap(to_ + settled_, static_cast<size_t>(mapped_ - settled_), PROT_READ | PROT_WRITE,
       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  advise_huge(to_ + settled_, mapped_ - settled_);
  settled_ = mapped_;
  close(file_.descriptor);
}

void LoadedFile::load(ThreadPool& pool) {
  const int64_t pieces = count_pieces(file_), together = pieces_together(file_);
  // Stretches are given out in order and a lane leaves out only what lies behind a fault that is
  // known, so the first fault of the file is always found, whatever the number of lanes.
  std::atomic<int64_t> faulty{INT64_MAX};
  std::mutex mutex;
  std::string reason;
  pool.run([&](const Lane& lane) {
    take_pieces((pieces + together - 1) / together, lane, [&](int64_t stretch) {
      const int64_t first = stretch * together, last = std::min(pieces, first + together);
      const int64_t begin = piece_at(file_, first).begin, end = piece_at(file_, last - 1).end;
      const bool there = mapped_ > 0 && populate(to_ + begin, end - begin);
      for (int64_t index = first; index < last && index < faulty.load(); ++index) {
        const Piece piece = piece_at(file_, index);
        std::string why = there ? check_piece(file_, piece, to_ + piece.begin)
                                : read_piece(file_, piece, to_ + piece.begin);
        if (why.empty()) continue;
        const std::lock_guard lock(mutex);
        if (index >= faulty.load()) return;
        faulty.store(index);
        reason = std::move(why);
      }
    });
  });
  gpt2f::check(faulty.load() == INT64_MAX, ErrorKind::kCheckpoint, reason);
}

void LoadedFile::start() {
  if (settled_ == mapped_) return;
  owner_ = getpid();
  try {
    thread_ = std::make_unique<std::thread>([this] {
      // On Linux of this thread alone; a refusal is no error. With the least priority the file
      // would stay mapped for minutes where every processor is taken.
      setpriority(PRIO_PROCESS, 0, 10);
      if (!leave_.try_acquire_for(kPatience)) settle();
    });
  } catch (const std::system_error&) {
    settle();  // no more threads: do it now
  }
}

void LoadedFile::stop() {
  if (thread_ == nullptr) return;
  if (owner_ != getpid()) {
    (void)thread_.release();  // a forked child has no such thread to join
    return;
  }
  stop_.store(true, std::memory_order_relaxed);
  leave_.release();
  thread_->join();
  thread_.reset();
  stop_.store(false, std::memory_order_relaxed);
}

void LoadedFile::settle() {
  while (settled_ < mapped_ && settle_next()) {
  }
}

// Puts the next stretch on pages of our own. False when there is no memory for it, when the file
// has changed, and when somebody waits for the thread, which may hardly get a processor: it looks
// whether to stop after each piece.
bool LoadedFile::settle_next() {
  const int64_t bytes = std::min(kStretch, mapped_ - settled_);
  std::byte* const pages = map_pages(bytes);
  if (pages == nullptr) return false;
  const int64_t first = settled_ / file_.piece;
  const int64_t last = std::min(count_pieces(file_), first + pieces_together(file_));
  std::string why;
  int64_t index = first;
  for (; index < last && why.empty() && !stop_.load(std::memory_order_relaxed); ++index) {
    const Piece piece = piece_at(file_, index);
    why = read_piece(file_, piece, pages + (piece.begin - settled_));
  }
  const bool whole = index == last && why.empty();
  // In one step for whoever uses the memory: a thread that meets the change waits for its end.
  if (!whole || mremap(pages, static_cast<size_t>(bytes), static_cast<size_t>(bytes),
                       MREMAP_MAYMOVE | MREMAP_FIXED, to_ + settled_) == MAP_FAILED) {
    munmap(pages, static_cast<size_t>(bytes));
    if (why.empty()) return false;
    reason_ = std::move(why);
    changed_.store(true, std::memory_order_release);
    return false;
  }
  settled_ += bytes;
  if (settled_ == mapped_) close(file_.descriptor);
  return true;
}

}  // namespace gpt2f

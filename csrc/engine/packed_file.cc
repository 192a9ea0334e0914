#include "engine/packed_file.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <sstream>
#include <string>
#include <utility>

#include "core/crc32c.h"
#include "core/error.h"

namespace gpt2f {
namespace {

// What one lane takes at a time: two huge pages, so that no two lanes touch one for the first time
// together, which would clear it twice.
constexpr int64_t kStretch = int64_t{4} << 20;

std::string hexadecimal(uint32_t value) {
  std::ostringstream text;
  text << std::hex;
  text.width(8);
  text.fill('0');
  text << value;
  return text.str();
}

// Why the piece at begin ... end - 1 cannot be had; nothing when it is there and right.
std::string read_piece(const PackedFile& file, int64_t index, int64_t begin, int64_t end,
                       std::byte* to) {
  for (int64_t at = begin; at < end;) {
    const ssize_t got = pread(file.descriptor, to + at, static_cast<size_t>(end - at),
                              static_cast<off_t>(file.offset + at));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return cat("cannot be read at byte ", file.offset + at, ": ", strerror(errno));
    if (got == 0) {
      return cat("wanted ", file.bytes, " bytes from byte ", file.offset,
                 ", the file ends at byte ", file.offset + at);
    }
    at += got;
  }
  const uint32_t wanted = file.checksums[static_cast<size_t>(index)];
  const uint32_t found = crc32c(to + begin, static_cast<size_t>(end - begin));
  if (found == wanted) return {};
  return cat("damaged: piece ", index, ", bytes ", file.offset + begin, "..", file.offset + end - 1,
             ", should have checksum ", hexadecimal(wanted), ", has ", hexadecimal(found));
}

}  // namespace

void read_packed(ThreadPool& pool, const PackedFile& file, std::byte* to) {
  check(file.piece >= 1, ErrorKind::kParameter, "piece must be at least 1, got ", file.piece);
  const int64_t pieces = file.bytes / file.piece + (file.bytes % file.piece != 0);
  check(static_cast<int64_t>(file.checksums.size()) == pieces, ErrorKind::kCheckpoint, "wanted ",
        pieces, " checksums, one for each ", file.piece, " of ", file.bytes, " bytes, got ",
        file.checksums.size());
  const int64_t together = std::max<int64_t>(1, kStretch / file.piece);
  // Stretches are given out in order and a lane leaves out only what lies behind a fault that is
  // known, so the first fault of the file is always found, whatever the number of lanes.
  std::atomic<int64_t> faulty{INT64_MAX};
  std::mutex mutex;
  std::string reason;
  pool.run([&](const Lane& lane) {
    take_pieces((pieces + together - 1) / together, lane, [&](int64_t stretch) {
      const int64_t last = std::min(pieces, (stretch + 1) * together);
      for (int64_t index = stretch * together; index < last && index < faulty.load(); ++index) {
        const int64_t begin = index * file.piece;
        const int64_t end = begin + std::min(file.piece, file.bytes - begin);
        std::string why = read_piece(file, index, begin, end, to);
        if (why.empty()) continue;
        const std::lock_guard lock(mutex);
        if (index >= faulty.load()) return;
        faulty.store(index);
        reason = std::move(why);
      }
    });
  });
  check(faulty.load() == INT64_MAX, ErrorKind::kCheckpoint, reason);
}

}  // namespace gpt2f

// Shadow of a block's shared memory: for each byte who wrote it last, who has read it since, and
// whether an asynchronous operation has it in flight.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "emulator/clocks.h"
#include "emulator/emulator.h"

namespace warpformer::emulator {

/// A source line in 32 bits.
class Site {
 public:
  Site() = default;
  explicit Site(Where where) {
    if (where.file != last_file_) find(where.file);
    bits_ = last_bits_ | static_cast<uint32_t>(where.line);
  }
  Where where() const;
  bool operator==(const Site&) const = default;

 private:
  static void find(const char* file);
  static inline const char* last_file_ = nullptr;
  static inline uint32_t last_bits_ = 0;
  uint32_t bits_ = 0;
};

/// Who accesses, and what it knows.
struct Accessor {
  Stamp stamp;
  const Clock& known;
  const Clock* fenced;  // generic writes that the async proxy may see; null in the generic proxy
  int threads;          // agents below this number are threads
};

/// Names the other party of a conflict.
struct Conflict {
  enum class Kind { none, uninitialised, write, read, not_fenced } kind = Kind::none;
  Stamp stamp;
  Where where{};
  uint32_t address = 0;
};

inline bool ordered(Stamp stamp, const Accessor& by) {
  return stamp.agent() == by.stamp.agent() || by.known.knows(stamp);
}

constexpr Stamp kMany{~0u};  // in place of one reader

class Shadow {
 public:
  /// Forgets everything: `bytes` of memory that nobody has written, at addresses from 0.
  void reset(uint32_t bytes);
  /// The first conflict of the access with those before it; if there is none, it is recorded.
  /// Atomic accesses do not conflict with each other.
  Conflict access(Access access, uint32_t address, uint32_t bytes, const Accessor& by, Site site);
  /// The same for the common case, of exactly one cell and without conflict; false where it is not.
  bool access_cell(Access access, uint32_t address, uint32_t bytes, const Accessor& by,
                   Where where);
  /// The same without recording.
  Conflict check(Access access, uint32_t address, uint32_t bytes, const Accessor& by);
  /// Records a write without checking it: an asynchronous copy landed.
  void written(uint32_t address, uint32_t bytes, Stamp stamp, Site site);
  /// Records a read without checking it.
  void read(uint32_t address, uint32_t bytes, const Accessor& by, Site site);

  void add_in_flight(uint32_t address, uint32_t bytes, int change);
  /// Whether the 16-byte lines of the range hold bytes in flight, perhaps others.
  bool may_be_in_flight(uint32_t address, uint32_t bytes) const;

 private:
  struct Reader {
    Stamp stamp;
    Site site;
    bool atomic;
  };
  struct Readers {
    std::vector<Reader> list;
    size_t prune_at = 8;
    bool atomic = false;  // one of them at least
  };
  struct Cell {
    Stamp writer;
    Site writer_site;
    Stamp reader;  // since the write: none, the one there is, or kMany
    Site reader_site;
    bool reader_atomic = false;
    uint32_t many = 0;  // its list in readers_, once there were many
  };
  struct Line {
    uint8_t size = 16;  // bytes of a cell: the smallest access so far
    uint16_t in_flight = 0;
  };

  template <class F>
  void for_cells(uint32_t address, uint32_t bytes, F f);
  void split(uint32_t line, uint8_t size);
  Conflict conflict(const Cell& cell, Access access, const Accessor& by, uint32_t address) const;
  void record(Cell& cell, Access access, const Accessor& by, Site site);
  void add_reader(Cell& cell, const Accessor& by, Site site, bool atomic);
  uint32_t new_readers(const Readers& value);

  std::vector<Line> lines_;
  std::vector<Cell> cells_;  // of the byte where each begins; those between are unused
  std::vector<Readers> readers_;
  uint32_t readers_used_ = 0;
};

inline bool Shadow::access_cell(Access access, uint32_t address, uint32_t bytes, const Accessor& by,
                                Where where) {
  const Line line = lines_[address / 16];
  Cell& cell = cells_[address];
  if (line.size != bytes || address % bytes || line.in_flight) return false;
  if (access == Access::atomic || cell.reader_atomic || cell.reader.bits == kMany.bits)
    return false;
  if (cell.reader && !ordered(cell.reader, by)) return false;
  if (access == Access::read) {
    if (!cell.writer || !ordered(cell.writer, by)) return false;
    cell.reader = by.stamp;
    cell.reader_site = Site(where);
  } else {
    if (cell.writer && !ordered(cell.writer, by)) return false;
    cell.writer = by.stamp;
    cell.writer_site = Site(where);
    cell.reader = {};
  }
  return true;
}

}  // namespace warpformer::emulator

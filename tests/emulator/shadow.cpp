#include "emulator/shadow.h"

#include <bit>
#include <cstdlib>

namespace warpformer::emulator {
namespace {

constexpr uint32_t kLine = 16;

// The few files that hold kernels and primitives, by the address of their name.
std::vector<const char*> files;

}  // namespace

void Site::find(const char* file) {
  uint32_t number = 0;
  while (number < files.size() && files[number] != file) ++number;
  if (number == files.size()) files.push_back(file);
  last_file_ = file;
  last_bits_ = number << 20;
}

Where Site::where() const { return {files[bits_ >> 20], static_cast<int>(bits_ & 0xfffff)}; }

void Shadow::reset(uint32_t bytes) {
  lines_.assign((bytes + kLine - 1) / kLine, Line{});
  if (cells_.size() < lines_.size() * kLine) cells_.resize(lines_.size() * kLine);
  for (size_t i = 0; i < lines_.size(); ++i) cells_[i * kLine] = Cell{};
  readers_used_ = 1;  // 0 is none
  if (readers_.empty()) readers_.emplace_back();
}

template <class F>
void Shadow::for_cells(uint32_t address, uint32_t bytes, F f) {
  const uint32_t end = address + bytes;
  while (address < end) {
    const uint32_t line = address / kLine;
    const uint32_t stop = std::min(end, (line + 1) * kLine);
    // The largest cell that neither the beginning nor the end of the access cuts.
    const uint32_t size = std::min(kLine, 1u << std::countr_zero((address | stop) | kLine));
    if (size < lines_[line].size) split(line, static_cast<uint8_t>(size));
    for (; address < stop; address += lines_[line].size) f(cells_[address], address);
  }
}

void Shadow::split(uint32_t line, uint8_t size) {
  const uint8_t old = lines_[line].size;
  for (uint32_t begin = line * kLine; begin < (line + 1) * kLine; begin += old) {
    const Cell whole = cells_[begin];
    for (uint32_t at = begin + size; at < begin + old; at += size) {
      cells_[at] = whole;
      cells_[at].many = 0;
      if (whole.reader.bits == kMany.bits) cells_[at].many = new_readers(readers_[whole.many]);
    }
  }
  lines_[line].size = size;
}

uint32_t Shadow::new_readers(const Readers& value) {
  const Readers copy = value;  // it may lie in the vector that grows
  if (readers_used_ == readers_.size()) readers_.emplace_back();
  readers_[readers_used_] = copy;
  return readers_used_++;
}

Conflict Shadow::conflict(const Cell& cell, Access access, const Accessor& by,
                          uint32_t address) const {
  using Kind = Conflict::Kind;
  if (!cell.writer) {
    if (access != Access::write) return {Kind::uninitialised, {}, {}, address};
  } else if (!ordered(cell.writer, by)) {
    return {Kind::write, cell.writer, cell.writer_site.where(), address};
  } else if (by.fenced && cell.writer.agent() < by.threads && !by.fenced->knows(cell.writer)) {
    return {Kind::not_fenced, cell.writer, cell.writer_site.where(), address};
  }
  // A read conflicts with atomics, an atomic with reads, a write with both.
  auto conflicts = [&](Stamp stamp, bool atomic) {
    if (access == Access::read && !atomic) return false;
    if (access == Access::atomic && atomic) return false;
    return !ordered(stamp, by);
  };
  if (!cell.reader) return {};
  if (cell.reader.bits != kMany.bits) {
    if (!conflicts(cell.reader, cell.reader_atomic)) return {};
    return {cell.reader_atomic ? Kind::write : Kind::read, cell.reader, cell.reader_site.where(),
            address};
  }
  const Readers& readers = readers_[cell.many];
  if (access == Access::read && !readers.atomic) return {};
  for (const Reader& r : readers.list)
    if (conflicts(r.stamp, r.atomic))
      return {r.atomic ? Kind::write : Kind::read, r.stamp, r.site.where(), address};
  return {};
}

void Shadow::add_reader(Cell& cell, const Accessor& by, Site site, bool atomic) {
  // A reader that is ordered before this one needs no entry of its own: who comes after this one
  // comes after it. An atomic access keeps its entry: it conflicts with reads, too.
  auto superseded = [&](Stamp stamp, bool was_atomic) {
    return ordered(stamp, by) && (atomic || !was_atomic);
  };
  if (!cell.reader ||
      (cell.reader.bits != kMany.bits && superseded(cell.reader, cell.reader_atomic))) {
    cell.reader = by.stamp;
    cell.reader_site = site;
    cell.reader_atomic = atomic;
    return;
  }
  if (cell.reader.bits != kMany.bits) {
    if (!cell.many) cell.many = new_readers({});
    Readers& empty = readers_[cell.many];
    empty.list.assign(1, {cell.reader, cell.reader_site, cell.reader_atomic});
    empty.prune_at = 8;
    empty.atomic = cell.reader_atomic;
    cell.reader = kMany;
  }
  Readers& readers = readers_[cell.many];
  if (readers.list.back().stamp.bits == by.stamp.bits && readers.list.back().atomic == atomic)
    return;
  if (readers.list.size() >= readers.prune_at) {
    std::erase_if(readers.list, [&](const Reader& r) { return superseded(r.stamp, r.atomic); });
    readers.prune_at = 2 * readers.list.size() + 8;
  }
  readers.list.push_back({by.stamp, site, atomic});
  readers.atomic |= atomic;
}

void Shadow::record(Cell& cell, Access access, const Accessor& by, Site site) {
  if (access == Access::write) {
    cell.writer = by.stamp;
    cell.writer_site = site;
    cell.reader = {};
    cell.reader_atomic = false;
  } else {
    add_reader(cell, by, site, access == Access::atomic);
  }
}

Conflict Shadow::access(Access access, uint32_t address, uint32_t bytes, const Accessor& by,
                        Site site) {
  Conflict found;
  for_cells(address, bytes, [&](Cell& cell, uint32_t at) {
    if (found.kind == Conflict::Kind::none) found = conflict(cell, access, by, at);
    if (found.kind == Conflict::Kind::none) record(cell, access, by, site);
  });
  return found;
}

Conflict Shadow::check(Access access, uint32_t address, uint32_t bytes, const Accessor& by) {
  Conflict found;
  for_cells(address, bytes, [&](Cell& cell, uint32_t at) {
    if (found.kind == Conflict::Kind::none) found = conflict(cell, access, by, at);
  });
  return found;
}

void Shadow::written(uint32_t address, uint32_t bytes, Stamp stamp, Site site) {
  for_cells(address, bytes, [&](Cell& cell, uint32_t) {
    cell.writer = stamp;
    cell.writer_site = site;
    cell.reader = {};
    cell.reader_atomic = false;
  });
}

void Shadow::read(uint32_t address, uint32_t bytes, const Accessor& by, Site site) {
  for_cells(address, bytes, [&](Cell& cell, uint32_t) { add_reader(cell, by, site, false); });
}

void Shadow::add_in_flight(uint32_t address, uint32_t bytes, int change) {
  for (uint32_t line = address / kLine; line * kLine < address + bytes; ++line)
    lines_[line].in_flight = static_cast<uint16_t>(lines_[line].in_flight + change);
}

bool Shadow::may_be_in_flight(uint32_t address, uint32_t bytes) const {
  for (uint32_t line = address / kLine; line * kLine < address + bytes; ++line)
    if (lines_[line].in_flight) return true;
  return false;
}

}  // namespace warpformer::emulator

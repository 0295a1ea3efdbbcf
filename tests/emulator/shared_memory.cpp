// Accesses to memory: bounds, alignment, initialisation, order.
#include <algorithm>
#include <cstring>

#include "emulator/runtime.h"

namespace warpformer::emulator {
namespace {

struct Buffer {
  uintptr_t begin, end;
};
thread_local std::vector<Buffer> registered;  // of the calls that this OS thread is in
std::vector<Buffer> buffers;                  // of the launch
Buffer last_buffer{0, 0};                     // that an access was in

const char* name(Access access) {
  return access == Access::read ? "reads" : access == Access::write ? "writes" : "updates";
}

std::string bytes_at(uint32_t bytes, uint32_t address) {
  return std::to_string(bytes) + " bytes of shared memory from byte " +
         std::to_string(static_cast<int64_t>(address) - shared_base()) + " on";
}

std::string agent(const Block& b, Stamp stamp) {
  const int threads = static_cast<int>(b.threads.size());
  if (stamp.agent() < threads) return describe(b.threads[static_cast<size_t>(stamp.agent())]);
  return stamp.agent() < threads + kMaxBarriers ? "an asynchronous copy" : "wgmma";
}

[[noreturn]] void report(const Conflict& c, Access access, uint32_t address, uint32_t bytes,
                         const char* op, Where where, int thread) {
  const Block& b = block();
  std::string what = std::string(name(access)) + " " + bytes_at(bytes, address) + ": ";
  const std::string byte = "byte " + std::to_string(c.address);
  switch (c.kind) {
    case Conflict::Kind::uninitialised:
      what += byte + " is uninitialised";
      break;
    case Conflict::Kind::not_fenced:
      what += byte + " was written by " + agent(b, c.stamp) + " at " + to_string(c.where) +
              ", and no fence_proxy_async lies between";
      break;
    default:
      what += std::string("race: ") + byte + " was " +
              (c.kind == Conflict::Kind::write ? "written" : "read") + " by " + agent(b, c.stamp) +
              " at " + to_string(c.where) + ", and no barrier lies between";
  }
  fail(op, where, what, thread);
}

/// The range may hold bytes that an operation reads or writes: which one?
void check_in_flight(Access access, uint32_t address, uint32_t bytes, const char* op, Where where,
                     int thread) {
  auto overlaps = [&](uint32_t begin, uint32_t count) {
    return begin < address + bytes && address < begin + count;
  };
  auto report = [&](const char* does, const char* by, Where at, const Thread& issuer) {
    fail(op, where,
         std::string(name(access)) + " " + bytes_at(bytes, address) + ", which " + by + " at " +
             to_string(at) + " of " + describe(issuer) + " " + does + ": it is still in flight",
         thread);
  };
  Block& b = block();
  for (const auto& operation : b.operations) {
    const Thread& issuer = b.threads[static_cast<size_t>(operation->thread)];
    for (const Range& r : operation->writes)
      if (overlaps(r.address, r.bytes)) report("writes", operation->op, operation->where, issuer);
    if (access == Access::read) continue;
    for (const Range& r : operation->reads)
      if (overlaps(r.address, r.bytes)) report("reads", operation->op, operation->where, issuer);
  }
  for (const Thread& issuer : b.threads)
    for (const Copy& copy : issuer.copies)
      if (overlaps(copy.to, copy.bytes)) report("writes", "copy_async", copy.where, issuer);
}

}  // namespace

uint32_t shared_base() {
  const Schedule& s = launched.schedule;
  return s.order == Order::lifo || (s.order == Order::random && s.seed % 2) ? 1040 : 1024;
}
uint32_t shared_size() { return static_cast<uint32_t>(launched.config.shared_bytes); }
std::byte* shared_at(uint32_t address) { return block().memory.data() + (address - shared_base()); }

void reset_memory(Block& b) {
  // NaN as bf16, f16 and f32; the shadow, not the value, tells what is uninitialised.
  b.memory.assign(launched.config.shared_bytes, std::byte{0xff});
  b.shadow.reset(shared_size());
}

Accessor accessor(Thread& t, Proxy proxy) {
  return {Stamp::of(t.position.thread, t.epoch), t.known,
          proxy == Proxy::async ? &t.fenced : nullptr, t.position.threads};
}

void check_range(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op, Where where,
                 int thread) {
  const uint32_t begin = shared_base();
  if (address < begin || uint64_t{address} + bytes > uint64_t{begin} + shared_size())
    fail(op, where,
         "out of bounds: " + bytes_at(bytes, address) + ", of which there are " +
             std::to_string(shared_size()) + " bytes",
         thread);
  if (address % alignment)
    fail(op, where,
         "misaligned: " + bytes_at(bytes, address) + ": address " + std::to_string(address) +
             " is no multiple of " + std::to_string(alignment),
         thread);
}

std::byte* shared_access(Access access, uint32_t address, uint32_t bytes, uint32_t alignment,
                         const char* op, Where where, int thread) {
  const uint32_t begin = shared_base();
  if (address < begin || uint64_t{address} + bytes > uint64_t{begin} + shared_size() ||
      address % alignment)
    check_range(address, bytes, alignment, op, where, thread);
  Thread& t = thread_at(thread);
  Shadow& shadow = t.block->shadow;
  const uint32_t offset = address - begin;
  const Accessor by = accessor(t, Proxy::generic);
  if (shadow.access_cell(access, offset, bytes, by, where)) return t.block->memory.data() + offset;
  if (shadow.may_be_in_flight(offset, bytes))
    check_in_flight(access, address, bytes, op, where, thread);
  const Conflict c = shadow.access(access, offset, bytes, by, Site(where));
  if (c.kind != Conflict::Kind::none) report(c, access, address, bytes, op, where, thread);
  return t.block->memory.data() + offset;
}

void check_async(Access access, uint32_t address, uint32_t bytes, Proxy proxy, const char* op,
                 Where where, int thread) {
  check_range(address, bytes, 1, op, where, thread);
  const uint32_t offset = address - shared_base();
  if (block().shadow.may_be_in_flight(offset, bytes))
    check_in_flight(access, address, bytes, op, where, thread);
  Thread& t = thread_at(thread);
  const Conflict c = block().shadow.check(access, offset, bytes, accessor(t, proxy));
  if (c.kind != Conflict::Kind::none) report(c, access, address, bytes, op, where, thread);
}

// ---- Global memory

void register_global(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  if (bytes) registered.push_back({address, address + bytes});
}

void forget_globals() { registered.clear(); }

void begin_global() {
  buffers = registered;
  last_buffer = {0, 0};
}

void global_access(Access access, const void* p, size_t bytes, size_t alignment, const char* op,
                   Where where, int thread) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address < last_buffer.begin || address + bytes > last_buffer.end) {
    const auto found = std::find_if(buffers.begin(), buffers.end(), [&](Buffer b) {
      return address >= b.begin && address + bytes <= b.end;
    });
    if (found == buffers.end()) {
      std::string what = std::string(name(access)) + " " + std::to_string(bytes) +
                         " bytes of global memory out of bounds of every tensor of the call";
      // The tensor that was probably meant: the nearest.
      uintptr_t nearest = ~uintptr_t{0};
      for (const Buffer& b : buffers) {
        const uintptr_t distance = address < b.begin ? b.begin - address : address - b.begin;
        if (distance >= nearest) continue;
        nearest = distance;
        what.resize(what.find(';') == std::string::npos ? what.size() : what.find(';'));
        what += "; byte " +
                std::to_string(static_cast<int64_t>(address) - static_cast<int64_t>(b.begin)) +
                " of the nearest one, which has " + std::to_string(b.end - b.begin);
      }
      fail(op, where, what, thread);
    }
    last_buffer = *found;
  }
  if (address % alignment)
    fail(op, where,
         "misaligned: " + std::string(name(access)) + " " + std::to_string(bytes) +
             " bytes of global memory at an address that is no multiple of " +
             std::to_string(alignment) + " (" + std::to_string(address % alignment) + " too far)",
         thread);
  if (access != Access::read) ++launched.global_writes;
}

}  // namespace warpformer::emulator

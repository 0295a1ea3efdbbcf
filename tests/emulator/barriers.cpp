// mbarriers: phases, arrivals, and bytes.
#include "emulator/runtime.h"

namespace warpformer::emulator {
namespace {

constexpr uint32_t kMaxCount = (1u << 20) - 1;

std::string name(const Barrier& b) {
  return "the barrier at shared byte " + std::to_string(b.address - shared_base());
}

Barrier* find(uint32_t address) {
  for (Barrier& b : block().barriers)
    if (b.address == address) return &b;
  return nullptr;
}

void complete_phase_if_done(Barrier& b) {
  if (b.pending || b.bytes) return;
  ++b.phase;
  b.pending = b.count;
  b.completed = std::move(b.arriving);
  b.arriving = {};
  launched.hand_overs = 0;
  for (Thread* t : b.waiters) wake(*t);
  b.waiters.clear();
}

/// Every use but init: the word is a barrier, and the thread knows so.
Barrier& use(uint32_t address, const char* op, Where where) {
  Barrier& b = barrier_at(address, op, where, kSelf);
  shared_access(Access::atomic, address, 8, 8, op, where);
  return b;
}

bool complete(const Barrier& b, uint32_t parity) { return b.phase % 2 != parity; }

}  // namespace

Barrier& barrier_at(uint32_t address, const char* op, Where where, int thread) {
  check_range(address, 8, 8, op, where, thread);
  Barrier* b = find(address);
  if (!b)
    fail(op, where,
         "no barrier at shared byte " + std::to_string(address - shared_base()) +
             " has been initialised",
         thread);
  return *b;
}

void check_barrier(uint32_t address, const char* op, Where where, int thread) {
  const Barrier& b = barrier_at(address, op, where, thread);
  Thread& t = thread_at(thread);
  shared_access(Access::atomic, address, 8, 8, op, where, thread);
  Accessor by = accessor(t, Proxy::async);
  const Conflict c = t.block->shadow.check(Access::atomic, address - shared_base(), 8, by);
  if (!b.fenced && c.kind == Conflict::Kind::not_fenced)
    fail(op, where,
         name(b) + " was initialised by " + describe(*b.initialised_by) +
             " without a fence_barrier_init",
         thread);
}

void barrier_init(uint32_t address, uint32_t count, Where where) {
  const char* op = "Barrier::init";
  shared_access(Access::write, address, 8, 8, op, where);
  if (count < 1 || count > kMaxCount) fail(op, where, "count " + std::to_string(count));
  Block& b = block();
  Barrier* old = find(address);
  if (old && (!old->waiters.empty() || old->bytes)) fail(op, where, name(*old) + " is in use");
  if (!old && b.barriers.size() == kMaxBarriers)
    fail(op, where, "more than 64 barriers in a block");
  if (!old) {
    const int agent = static_cast<int>(b.threads.size() + b.barriers.size());
    old = &b.barriers.emplace_back();
    old->address = address;
    old->agent = agent;
  }
  old->initialised_by = self;
  old->count = old->pending = count;
  old->phase = 0;
  old->fenced = false;
  old->arriving = old->completed = {};
}

void arrive_now(Barrier& b, int thread, const char* op, Where where) {
  if (b.pending == 0)
    fail(op, where,
         "more arrivals than the " + std::to_string(b.count) + " of " + name(b) + " in phase " +
             std::to_string(b.phase) + ", which waits for " + std::to_string(b.bytes) + " bytes",
         thread);
  --b.pending;
  complete_phase_if_done(b);
}

void barrier_arrive(uint32_t address, const char* op, Where where) {
  Barrier& b = use(address, op, where);
  b.arriving.add(*self);
  arrive_now(b, kSelf, op, where);
}

void barrier_expect(uint32_t address, uint32_t bytes, const char* op, Where where) {
  Barrier& b = use(address, op, where);
  b.bytes += bytes;
  if (b.bytes > kMaxCount) fail(op, where, name(b) + " expects more than 2^20-1 bytes");
}

void complete_bytes(Barrier& b, uint32_t bytes, const char* op, Where where, int thread) {
  b.bytes -= bytes;
  if (b.bytes < -static_cast<int64_t>(kMaxCount))
    fail(op, where, name(b) + " received 2^20 bytes that nobody expects", thread);
  complete_phase_if_done(b);
}

bool barrier_try_wait(uint32_t address, uint32_t parity, Where where) {
  const char* op = "Barrier::try_wait";
  // Hardware may give up at any time: half of the time, so do we, after letting others run.
  if (!complete(use(address, op, where), parity) && random_below(2)) {
    pause();
    if (!complete(use(address, op, where), parity)) return false;
  }
  barrier_wait(address, parity, where);
  return true;
}

void barrier_wait(uint32_t address, uint32_t parity, Where where) {
  const char* op = "Barrier::wait";
  if (parity > 1) fail(op, where, "a phase's parity is 0 or 1, not " + std::to_string(parity));
  Barrier& b = use(address, op, where);
  if (!complete(b, parity)) {
    const uint64_t phase = b.phase;
    b.waiters.push_back(self);
    sleep(op, where);
    if (b.phase != phase + 1)
      fail(op, where,
           name(b) + " has gone on to phase " + std::to_string(b.phase) +
               " before this thread saw phase " + std::to_string(phase) +
               " complete: on hardware it would now wait for ever");
  }
  b.completed.give(*self);
}

void fence_barrier_init(Where) {
  for (Barrier& b : block().barriers)
    if (b.initialised_by == self) b.fenced = true;
}

void fence_proxy_async(Where) {
  self->block->fences = true;
  self->fenced.join(self->known);
  self->fenced.raise(self->position.thread, self->epoch);
  next_epoch(*self);
}

void check_barriers_at_exit(Block& block) {
  for (const Barrier& b : block.barriers)
    if (b.bytes || b.pending != b.count)
      fail("exit", {"", 0},
           "the block ends while phase " + std::to_string(b.phase) + " of " + name(b) + " has " +
               std::to_string(b.count - b.pending) + " of " + std::to_string(b.count) +
               " arrivals and waits for " + std::to_string(b.bytes) + " bytes");
}

}  // namespace warpformer::emulator

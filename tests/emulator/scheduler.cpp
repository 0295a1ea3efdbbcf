// Who runs when: fibers of the resident blocks, in FIFO, LIFO or seeded random order, one at a
// time.
#include <bit>
#include <cstring>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulator/runtime.h"

namespace warpformer::emulator {

Launch& launched = *new Launch;  // never destroyed: its clocks outlive no pool
Thread* self = nullptr;
const Position* position = nullptr;

namespace {

// Atomics in a row without any thread getting further: a spin loop that is not spin_until.
constexpr uint64_t kPatience = 1 << 22;

uint64_t next_random() {  // xorshift64*
  uint64_t& x = launched.random;
  x ^= x >> 12;
  x ^= x << 25;
  x ^= x >> 27;
  return x * 0x2545f4914f6cdd1dull >> 32;
}

void push(Block& b, Thread& t) {
  b.ready[(b.ready_begin + b.ready_count++) & (b.ready.size() - 1)] = &t;
}

Thread& pop(Block& b) {
  const uint32_t mask = static_cast<uint32_t>(b.ready.size()) - 1;
  if (launched.schedule.order == Order::lifo)
    return *b.ready[(b.ready_begin + --b.ready_count) & mask];
  if (launched.schedule.order == Order::random)
    std::swap(b.ready[b.ready_begin & mask],
              b.ready[(b.ready_begin + (next_random() * b.ready_count >> 32)) & mask]);
  --b.ready_count;
  return *b.ready[b.ready_begin++ & mask];
}

void become(Thread& t) {
  self = &t;
  position = &t.position;
}

void deliver(Block& b, size_t which) {
  const Deferred next = std::move(b.deferred[which]);
  b.deferred.erase(b.deferred.begin() + static_cast<std::ptrdiff_t>(which));
  become(b.threads[static_cast<size_t>(next.thread)]);
  next.deliver();
}

void check_at_exit(Block& b) {
  check_operations_at_exit(b);
  check_barriers_at_exit(b);
  for (int id = 0; id < kNamedBarriers; ++id)
    if (const NamedBarrier& barrier = b.named[id]; !barrier.arrived.empty())
      fail("exit", {"", 0},
           "the block ends while barrier " + std::to_string(id) + " has " +
               std::to_string(barrier.arrived.size()) + " of " + std::to_string(barrier.expected) +
               " arrivals, the first by " + describe(*barrier.arrived[0]));
}

void thread_main();

void begin(Block& b) {
  const LaunchConfig& config = launched.config;
  const int64_t total = config.grid.x * config.grid.y;
  b.index = {launched.next_block % config.grid.x, launched.next_block / config.grid.x};
  launched.next_block = (launched.next_block + launched.block_step) % total;
  ++launched.begun_blocks;
  b.active = true;
  b.live = config.threads;
  b.ready_begin = b.ready_count = 0;
  for (Rendezvous& r : b.warps) r.count = 0;
  for (Rendezvous& r : b.warpgroups) r.count = 0;
  b.all.count = 0;
  for (NamedBarrier& n : b.named) n = {};
  b.barriers.clear();
  b.operations.clear();
  b.deferred.clear();
  std::fill(b.warpgroup_epochs.begin(), b.warpgroup_epochs.end(), 0);
  b.fences = false;
  reset_memory(b);
  for (int i = 0; i < config.threads; ++i) {
    Thread& t = b.threads[static_cast<size_t>(i)];
    t.position = {i, i / 32, i % 32, config.threads, b.index, config.grid};
    t.block = &b;
    t.waits_in = nullptr;
    t.exited = t.spins = false;
    t.epoch = 1;
    t.known = t.fenced = {};
    t.copies.clear();
    t.copy_groups = 0;
    t.copies_landed = 0;
    t.arrivals.clear();
    t.copied = {};
    for (auto& state : t.states) state.reset();
    t.fiber.start(b.stacks.end(i), thread_main);
    push(b, t);
  }
}

bool blocks_remain() {
  return launched.begun_blocks < launched.config.grid.x * launched.config.grid.y;
}

/// Makes the threads in spin_until look again that have not seen the last write.
void wake_spinning(Block& b) {
  for (Thread& t : b.threads)
    if (t.spins && t.seen_writes != launched.global_writes) wake(t);
}

/// Whether something in this resident block, or block to be, can run; begins the latter.
bool can_run(Block& b) {
  if (!b.active) {
    if (!blocks_remain()) return false;
    begin(b);
  }
  if (!b.ready_count) wake_spinning(b);
  return b.ready_count || !b.deferred.empty();
}

Block* another_block(const Block& than) {
  const int n = launched.resident;
  const int first = launched.schedule.order == Order::random
                        ? static_cast<int>(next_random() % static_cast<uint64_t>(n))
                        : than.slot + 1;
  for (int i = 0; i < n; ++i) {
    Block& b = launched.blocks[static_cast<size_t>((first + i) % n)];
    if (&b != &than && can_run(b)) return &b;
  }
  return nullptr;
}

/// The thread to run next, in block `b` if possible; null where `b` has ended.
Thread* next_thread(Block* b) {
  for (;;) {
    if (b->live == 0) return nullptr;
    if (!b->deferred.empty()) {
      if (launched.schedule.order == Order::lifo) deliver(*b, b->deferred.size() - 1);
      if (launched.schedule.order == Order::random && next_random() % 8 == 0)
        deliver(*b, next_random() % b->deferred.size());
    }
    if (b->ready_count) return &pop(*b);
    if (!b->deferred.empty()) {  // FIFO: as late as possible
      deliver(*b, 0);
      continue;
    }
    wake_spinning(*b);
    if (b->ready_count) continue;
    bool spins = false;
    for (const Thread& t : b->threads) spins |= t.spins;
    if (!spins) report_deadlock(*b);
    b = another_block(*b);
    if (!b) report_no_progress();
  }
}

/// Leaves the running thread, which has been put where it will be found again, for the next one.
void resume(Block& b) {
  Thread* from = self;
  Thread* next = next_thread(&b);
  if (!next) {
    from->fiber.switch_to(launched.main);
    return;
  }
  become(*next);
  if (next != from) from->fiber.switch_to(next->fiber);
}

void thread_main() {
  try {
    launched.body(launched.parameters);
  } catch (const std::exception& error) {
    fail("kernel", {"", 0}, std::string("exception: ") + error.what());
  }
  check_copies_at_exit(*self);
  for (auto& state : self->states) {
    if (state) state->at_exit();
    state.reset();
  }
  self->exited = true;
  --self->block->live;
  launched.hand_overs = 0;
  resume(*self->block);
}

/// Warps, warp groups and the block: the last of `expected` threads runs `run`, then all go on.
template <class Run>
void rendezvous(Rendezvous& r, int begin, int expected, const char* op, Where where, Run run) {
  if (r.count == 0) {
    r.op = op;
    r.where = where;
    r.first = self;
  } else if (r.where.line != where.line || (r.op != op && std::strcmp(r.op, op) != 0) ||
             (r.where.file != where.file && std::strcmp(r.where.file, where.file) != 0)) {
    report_divergence(r, op, where);
  }
  if (++r.count < expected) {
    sleep(op, where);
    return;
  }
  r.count = 0;
  launched.hand_overs = 0;
  run();
  Thread* threads = &block().threads[static_cast<size_t>(begin)];
  for (int i = 0; i < expected; ++i)
    if (&threads[i] != self) wake(threads[i]);
}

void meet(int begin, int count) {
  Thread* threads = &block().threads[static_cast<size_t>(begin)];
  Gathering gathering;
  for (int i = 0; i < count; ++i) gathering.add(threads[i]);
  for (int i = 0; i < count; ++i) gathering.settle(threads[i]);
}

}  // namespace

// ---- Sleeping and waking

void sleep(const char* op, Where where) {
  self->waits_in = op;
  self->waits_at = where;
  resume(*self->block);
}

void wake(Thread& thread) {
  thread.waits_in = nullptr;
  thread.spins = false;
  push(*thread.block, thread);
}

void hand_over(const char* op, Where where) {
  if (++launched.hand_overs > kPatience)
    fail(op, where, "no progress: millions of atomics in a row; wait with spin_until");
  if (launched.resident < 2 || launched.schedule.order == Order::fifo) return;
  Block* other = another_block(block());
  if (!other) return;
  push(block(), *self);
  resume(*other);
}

void wait_for_write(const char* op, Where where) {
  self->spins = true;
  self->seen_writes = launched.global_writes;
  sleep(op, where);
}

void pause() {
  push(block(), *self);
  resume(block());
}

uint32_t random_below(uint32_t n) {
  return launched.schedule.order == Order::random ? static_cast<uint32_t>(next_random() % n) : 0;
}

int elected_lane() {
  if (launched.schedule.order == Order::random)
    return static_cast<int>(launched.schedule.seed % 32);
  return launched.schedule.order == Order::fifo ? 0 : 31;
}

std::unique_ptr<ThreadState>& thread_state(Family family, int thread) {
  return thread_at(thread).states[static_cast<int>(family)];
}

// ---- Collectives

void warp_collective(const char* op, Where where, void* argument,
                     void (*run)(void* const* arguments)) {
  Rendezvous& r = block().warps[static_cast<size_t>(self->position.warp)];
  r.arguments[static_cast<size_t>(self->position.lane)] = argument;
  rendezvous(r, self->position.warp * 32, 32, op, where, [&] { run(r.arguments.data()); });
}

void warpgroup_collective(const char* op, Where where, void* argument,
                          void (*run)(void* const* arguments)) {
  const int group = self->position.thread / 128;
  if ((group + 1) * 128 > self->position.threads)
    fail(op, where, "needs four whole warps, and the block ends before");
  Rendezvous& r = block().warpgroups[static_cast<size_t>(group)];
  r.arguments[static_cast<size_t>(self->position.thread % 128)] = argument;
  rendezvous(r, group * 128, 128, op, where, [&] { run(r.arguments.data()); });
}

void sync_warp(Where where) {
  const int begin = self->position.warp * 32;
  rendezvous(block().warps[static_cast<size_t>(self->position.warp)], begin, 32, "sync_warp", where,
             [=] { meet(begin, 32); });
}

int sync_block(const char* op, Where where, bool predicate, Vote vote) {
  Block& b = block();
  const int threads = self->position.threads;
  b.votes += predicate;
  rendezvous(b.all, 0, threads, op, where, [&] {
    meet(0, threads);
    b.vote_result = vote == Vote::any   ? b.votes > 0
                    : vote == Vote::all ? b.votes == threads
                                        : b.votes;
    b.votes = 0;
  });
  return b.vote_result;  // the next result needs this thread
}

void named_barrier(const char* op, Where where, int id, int threads, bool waits) {
  const std::string name = "barrier " + std::to_string(id);
  if (id < 1 || id >= kNamedBarriers) fail(op, where, name + " is none of 1..15");
  if (threads < 32 || threads % 32 || threads > self->position.threads)
    fail(op, where, std::to_string(threads) + " threads are not whole warps of this block");
  NamedBarrier& b = block().named[id];
  if (b.arrived.empty()) b.expected = threads;
  if (b.expected != threads)
    fail(op, where,
         name + " is given " + std::to_string(threads) + " threads here and " +
             std::to_string(b.expected) + " by " + describe(*b.arrived[0]));
  if (std::find(b.arrived.begin(), b.arrived.end(), self) != b.arrived.end())
    fail(op, where, "arrives at " + name + " twice in one phase");
  b.arrived.push_back(self);
  b.gathering.add(*self);
  if (waits) b.waiting.push_back(self);
  if (static_cast<int>(b.arrived.size()) < threads) {
    if (waits) sleep(op, where);
    return;
  }
  int of_warp[kMaxThreads / 32] = {};
  for (const Thread* t : b.arrived) ++of_warp[t->position.warp];
  for (const Thread* t : b.arrived)
    if (of_warp[t->position.warp] != 32)
      fail(op, where, "only a part of the warp of " + describe(*t) + " came to " + name);
  launched.hand_overs = 0;
  for (Thread* t : b.waiting) b.gathering.give(*t);
  for (Thread* t : b.waiting)
    if (t != self) wake(*t);
  b = {};
}

// ---- Clocks

void next_epoch(Thread& thread) {
  if (++thread.epoch >= Stamp::kLastEpoch)
    fail("barrier", {"", 0}, "too many barriers in one block for the race detector");
}

void Gathering::add(Thread& t) {
  if (!t.known.shares(last_added_)) {
    known_.join(t.known);
    last_added_ = t.known;
  }
  known_.raise(t.position.thread, t.epoch);
  if (t.block->fences) fenced_.join(t.fenced);
  next_epoch(t);
}

void Gathering::give(Thread& t) {
  if (gave_ && t.known.shares(last_before_)) {
    t.known = last_after_;
  } else {
    last_before_ = t.known;
    t.known.join(known_);
    last_after_ = t.known;
    gave_ = true;
  }
  if (t.block->fences) t.fenced.join(fenced_);
}

void Gathering::settle(Thread& t) {
  t.known = known_;
  if (t.block->fences) t.fenced = fenced_;
}

// ---- Launches

void end_launch(std::string failure) {
  if (launched.on_main) throw std::runtime_error(failure);
  launched.failure = std::move(failure);
  self->fiber.switch_to(launched.main);
  __builtin_unreachable();  // nobody resumes the thread
}

namespace {

void check_config(const LaunchConfig& c) {
  const char* wrong = nullptr;
  if (c.threads < 32 || c.threads > kMaxThreads || c.threads % 32)
    wrong = "threads are a multiple of 32, at most 1024";
  if (c.shared_bytes > kMaxSharedBytes) wrong = "at most 227 KB of shared memory";
  if (c.grid.x < 1 || c.grid.x > 0x7fffffff || c.grid.y < 1 || c.grid.y > 65535)
    wrong = "a grid is 1..2^31-1 by 1..65535 blocks";
  if (wrong)
    throw std::runtime_error(std::string("launch of ") + c.kernel + ", grid " +
                             std::to_string(c.grid.x) + " x " + std::to_string(c.grid.y) + ", " +
                             std::to_string(c.threads) + " threads, " +
                             std::to_string(c.shared_bytes) + " bytes of shared memory: " + wrong);
}

void make_blocks(const LaunchConfig& config) {
  const size_t threads = static_cast<size_t>(config.threads);
  const size_t groups = (threads + 127) / 128;
  const int agents = config.threads + kMaxBarriers + static_cast<int>(groups);
  static int last_agents = 0;
  if (agents != last_agents) {
    for (Block& b : launched.blocks) {  // every clock dies here
      b.threads.clear();
      b.barriers.clear();
      for (NamedBarrier& n : b.named) n = {};
    }
    Clock::set_agents(agents);
    last_agents = agents;
  }
  while (launched.blocks.size() < static_cast<size_t>(launched.resident))
    launched.blocks.emplace_back();
  for (Block& b : launched.blocks) {  // a launch that failed left its own
    b.active = false;
    b.live = 0;
  }
  for (int i = 0; i < launched.resident; ++i) {
    Block& b = launched.blocks[static_cast<size_t>(i)];
    b.slot = i;
    if (b.threads.size() == threads) continue;
    b.threads = std::vector<Thread>(threads);
    b.stacks.reserve(config.threads);
    b.ready.resize(std::bit_ceil(threads));
    b.warps.resize(threads / 32);
    for (Rendezvous& r : b.warps) r.arguments.resize(32);
    b.warpgroups.resize(groups);
    for (Rendezvous& r : b.warpgroups) r.arguments.resize(128);
    b.warpgroup_epochs.resize(groups);
  }
}

/// Blocks begin in order, in reverse, or in strides from anywhere: no order is promised.
void choose_block_order(int64_t total) {
  launched.begun_blocks = launched.next_block = 0;
  launched.block_step = 1;
  if (launched.schedule.order == Order::lifo) {
    launched.next_block = launched.block_step = total - 1;
  } else if (launched.schedule.order == Order::random) {
    launched.next_block = static_cast<int64_t>(next_random() % static_cast<uint64_t>(total));
    do {
      launched.block_step = 1 + static_cast<int64_t>(next_random() % static_cast<uint64_t>(total));
    } while (std::gcd(launched.block_step, total) != 1);
  }
}

}  // namespace

/// Where the launch goes on when `ended` has; null at its end.
static Block* after(Block& ended) {
  if (blocks_remain()) {
    begin(ended);
    return &ended;
  }
  if (Block* other = another_block(ended)) return other;
  for (const Block& left : launched.blocks)
    if (left.active) report_no_progress();
  return nullptr;
}

void launch(const LaunchConfig& config, void (*body)(const void*), const void* parameters) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  check_config(config);
  const int64_t total = config.grid.x * config.grid.y;
  launched.config = config;
  launched.body = body;
  launched.parameters = parameters;
  launched.schedule = current_schedule();
  launched.random = (launched.schedule.seed + 1) * 0x9e3779b97f4a7c15ull;
  launched.resident = static_cast<int>(std::min<int64_t>(resident_blocks(), total));
  launched.global_writes = launched.hand_overs = 0;
  launched.failure.clear();
  choose_block_order(total);
  make_blocks(config);
  begin_global();

  begin(launched.blocks[0]);
  launched.on_main = true;
  for (Block* b = &launched.blocks[0]; b; b = after(*b)) {
    become(*next_thread(b));
    launched.on_main = false;
    launched.main.switch_to(self->fiber);  // until a block has ended, or the launch has failed
    launched.on_main = true;
    b = self->block;
    if (!launched.failure.empty()) throw std::runtime_error(launched.failure);
    check_at_exit(*b);
    b->active = false;
  }
  self = nullptr;
}

}  // namespace warpformer::emulator

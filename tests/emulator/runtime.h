// What the files of the emulator share: a launch, its resident blocks and their threads.
#pragma once

#include <bitset>
#include <deque>

#include "emulator/clocks.h"
#include "emulator/emulator.h"
#include "emulator/fiber.h"
#include "emulator/shadow.h"

namespace warpformer::emulator {

constexpr int kMaxThreads = 1024;
constexpr int kMaxBarriers = 64;
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kNamedBarriers = 16;

struct Block;

/// A cp.async that has not landed.
struct Copy {
  uint32_t to;
  const void* from;
  uint32_t bytes;
  bool valid;
  int group;
  Where where;
  bool handed_over;  // to an mbarrier: it lands without this thread's wait
};

/// An arrive_after_copies that has not come.
struct CopyArrival {
  uint32_t barrier;
  uint64_t copies;  // of the thread, since the kernel began
  Where where;
};

struct Thread {
  Thread() = default;
  Thread(const Thread&) = delete;

  Position position;
  Fiber fiber;
  Block* block;

  // What it waits for: null while it can run.
  const char* waits_in;
  Where waits_at;
  bool exited;
  bool spins;            // in spin_until: until somebody writes to global memory
  uint64_t seen_writes;  // how often that had happened when it last looked

  uint32_t epoch;  // of this thread's next accesses
  Clock known;     // what is ordered before them
  Clock fenced;    // of that, what the async proxy may see

  std::vector<Copy> copies;
  int copy_groups;         // committed
  uint64_t copies_landed;  // of all this thread has issued
  std::deque<CopyArrival> arrivals;
  Clock copied;  // knows the copies that landed for them
  std::unique_ptr<ThreadState> states[static_cast<int>(Family::count)];
};

/// What those who arrive at a barrier know, for those who wait there.
class Gathering {
 public:
  /// Arrival: the thread's accesses so far are ordered before those of whoever waits.
  void add(Thread& thread);
  /// Wait: the thread now also knows what was gathered.
  void give(Thread& thread);
  /// The same for one that was itself added.
  void settle(Thread& thread);
  /// The arrival of agents that are no threads.
  void join(const Clock& clock) {
    known_.join(clock);
    gave_ = false;
  }
  void raise(int agent, uint32_t epoch) {
    known_.raise(agent, epoch);
    gave_ = false;
  }

 private:
  Clock known_, fenced_;
  // Threads that know the same before know the same afterwards.
  Clock last_added_, last_before_, last_after_;
  bool gave_ = false;
};

/// Threads that wait for each other at one line.
struct Rendezvous {
  const char* op = nullptr;
  Where where{};
  int count = 0;
  Thread* first = nullptr;
  std::vector<void*> arguments;
};

struct NamedBarrier {
  int expected = 0;
  std::vector<Thread*> arrived, waiting;
  Gathering gathering;
};

/// An mbarrier.
struct Barrier {
  uint32_t address;
  uint32_t count;
  Thread* initialised_by;
  int agent;  // stands for the copies that complete on it
  uint32_t agent_epoch = 0;
  uint32_t pending;   // arrivals that the current phase waits for
  int64_t bytes = 0;  // that it waits for
  uint64_t phase = 0;
  bool fenced = false;            // by fence_barrier_init
  Gathering arriving, completed;  // of the current phase, of the last one
  std::vector<Thread*> waiters;   // for the current phase
};

struct Deferred {
  AsyncOperation* operation;  // null for arrive_after_copies
  int thread;                 // that issued it
  std::function<void()> deliver;
};

/// A resident block.
struct Block {
  int slot = 0;
  bool active = false;
  Grid index;
  std::vector<Thread> threads;
  Stacks stacks;
  int live = 0;
  std::vector<Thread*> ready;  // a ring
  uint32_t ready_begin = 0, ready_count = 0;

  std::vector<std::byte> memory;
  Shadow shadow;
  std::vector<Rendezvous> warps, warpgroups;
  Rendezvous all;
  int votes = 0, vote_result = 0;  // of sync_block_or, _and, _count
  NamedBarrier named[kNamedBarriers];
  std::deque<Barrier> barriers;
  std::vector<std::unique_ptr<AsyncOperation>> operations;
  std::vector<Deferred> deferred;
  std::vector<uint32_t> warpgroup_epochs;  // of the agents that stand for their wgmma
  bool fences = false;                     // somebody has used fence_proxy_async
};

enum class Order { fifo, lifo, random };
struct Schedule {
  Order order = Order::fifo;
  uint64_t seed = 0;
  std::string name() const;
};

struct Launch {
  LaunchConfig config;
  void (*body)(const void*);
  const void* parameters;
  Schedule schedule;
  uint64_t random;
  std::deque<Block> blocks;  // as many as can be resident
  int resident = 0;
  int64_t next_block = 0, block_step = 1, begun_blocks = 0;
  uint64_t global_writes = 0;
  uint64_t hand_overs = 0;  // since a thread last got anywhere
  Fiber main;
  bool on_main = true;  // rather than in a thread
  std::string failure;
};

extern Launch& launched;  // the one launch there is
extern Thread* self;      // the running thread

inline Block& block() { return *self->block; }
inline Thread& thread_at(int thread) {
  return thread == kSelf ? *self : block().threads[static_cast<size_t>(thread)];
}

// ---- report.cpp
/// `thread 37 (warp 1, lane 5)`
std::string describe(const Thread& thread);
[[noreturn]] void report_divergence(const Rendezvous& met, const char* op, Where where);
[[noreturn]] void report_deadlock(const Block& block);
[[noreturn]] void report_no_progress();
Schedule current_schedule();

// ---- scheduler.cpp
/// Sleeps, in `op`, until somebody calls wake().
void sleep(const char* op, Where where);
void wake(Thread& thread);
/// Accesses made after this are later than what others have learnt of the thread.
void next_epoch(Thread& thread);
/// Ends the launch, from whatever runs.
[[noreturn]] void end_launch(std::string failure);

/// Lets the other threads of the block run first.
void pause();

// ---- shared_memory.cpp
void reset_memory(Block& block);
Accessor accessor(Thread& thread, Proxy proxy);
void check_range(uint32_t address, uint32_t bytes, uint32_t alignment, const char* op, Where where,
                 int thread);
/// shared_access for an operation that is issued now and happens later: nothing is recorded yet.
void check_async(Access access, uint32_t address, uint32_t bytes, Proxy proxy, const char* op,
                 Where where, int thread);

/// From here on, the launch may touch what is registered now.
void begin_global();

// ---- copies.cpp
void check_copies_at_exit(Thread& thread);
void check_operations_at_exit(Block& block);

// ---- barriers.cpp
Barrier& barrier_at(uint32_t address, const char* op, Where where, int thread);
void arrive_now(Barrier& barrier, int thread, const char* op, Where where);
void complete_bytes(Barrier& barrier, uint32_t bytes, const char* op, Where where, int thread);
void check_barriers_at_exit(Block& block);

}  // namespace warpformer::emulator

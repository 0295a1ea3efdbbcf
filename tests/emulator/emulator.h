// What the host bodies of core/cuda stand on: the runtime that executes a kernel on the CPU, thread
// by thread, and is strict where hardware is silent.
//
// Every thread of a block is a fiber; one fiber runs at a time, so nothing here needs a lock. A
// body acts for the thread that called it (kSelf) or, inside a collective, for the thread it names.
// fail() ends the launch: it never returns to the kernel, and the launch throws in the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace warpformer::emulator {

// ---- Source lines ------------------------------------------------------------------------------

/// Where in a kernel a primitive was called.
struct Where {
  const char* file;
  int line;
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};
/// The last parameter of every primitive.
#define WHERE ::warpformer::emulator::Where where = ::warpformer::emulator::Where::here()

constexpr int kSelf = -1;  // the calling thread

/// Ends the launch with a report that names kernel, block, `thread`, primitive, source line and
/// schedule.
[[noreturn]] void fail(const char* op, Where where, const std::string& what, int thread = kSelf);
/// `softmax/cuda.cu:41`
std::string to_string(Where where);

// ---- The calling thread ------------------------------------------------------------------------

struct Grid {
  int64_t x = 1, y = 1;
};
struct Position {
  int thread, warp, lane;  // thread = 32 warp + lane
  int threads;             // of the block
  Grid block, grid;
};
extern const Position* position;
inline const Position& here() { return *position; }

/// A number below `n`, from the schedule's seed: every choice that hardware leaves open. 0 in the
/// FIFO and LIFO schedules.
uint32_t random_below(uint32_t n);

/// State that a family of primitives keeps for a thread, from first use to the thread's exit.
struct ThreadState {
  virtual ~ThreadState() = default;
  /// Called when the thread returns from the kernel: fails where work is outstanding.
  virtual void at_exit() {}
};
enum class Family { bulk, wgmma, count };
std::unique_ptr<ThreadState>& thread_state(Family family, int thread = kSelf);

// ---- Collectives -------------------------------------------------------------------------------

/// All 32 lanes of a warp meet here, from the same op and line. The last to come calls
/// run(arguments), arguments[lane] being what each lane gave; then all go on. Orders no memory.
void warp_collective(const char* op, Where where, void* argument,
                     void (*run)(void* const* arguments));
/// The same for the 128 threads of an aligned group of four warps.
void warpgroup_collective(const char* op, Where where, void* argument,
                          void (*run)(void* const* arguments));

/// The same, typed: `run` is a lambda without captures that takes `Argument* const* lanes`.
template <class Argument, class Run>
void warp_collective(const char* op, Where where, Argument& argument, Run) {
  warp_collective(op, where, &argument,
                  [](void* const* all) { Run{}(reinterpret_cast<Argument* const*>(all)); });
}
template <class Argument, class Run>
void warpgroup_collective(const char* op, Where where, Argument& argument, Run) {
  warpgroup_collective(op, where, &argument,
                       [](void* const* all) { Run{}(reinterpret_cast<Argument* const*>(all)); });
}
/// Inside a warp collective: the thread that is `lane` of this warp. Inside one of a warp group:
/// the thread that is number `lane` of 128.
inline int thread_of_lane(int lane) { return here().thread - here().lane + lane; }
inline int thread_of_warpgroup(int lane) { return here().thread / 128 * 128 + lane; }

// ---- Memory ------------------------------------------------------------------------------------

enum class Access : uint8_t { read, write, atomic };

/// Checks an access by `thread` in the generic proxy (bounds, alignment, initialised, not in
/// flight, ordered after every conflicting access), records it, and returns where the bytes are.
std::byte* shared_access(Access access, uint32_t address, uint32_t bytes, uint32_t alignment,
                         const char* op, Where where, int thread = kSelf);
/// Where the bytes are, without a check: for what an AsyncOperation has already declared.
std::byte* shared_at(uint32_t address);
/// Addresses of shared memory run from shared_base() (1024 or 1040, by schedule: nothing may rely
/// on more than 16-byte alignment) to shared_base() + shared_size().
uint32_t shared_base();
uint32_t shared_size();

/// Checks bounds and alignment of an access to global memory. Writes wake threads in spin_until.
void global_access(Access access, const void* address, size_t bytes, size_t alignment,
                   const char* op, Where where, int thread = kSelf);
/// Kernels may touch only what is registered, from register_global to forget_globals.
void register_global(const void* begin, size_t bytes);
void forget_globals();
/// Lives in a call of the extension: forgets the registered tensors at its end.
struct Call {
  Call() = default;
  Call(const Call&) = delete;
  ~Call() { forget_globals(); }
};

// ---- Asynchronous operations -------------------------------------------------------------------

enum class Proxy : uint8_t { generic, async };
struct Range {
  uint32_t address, bytes;
};

/// An operation between its issue and the moment somebody may rely on it. Until it completes, a
/// write to what it reads and any access to what it writes is reported; what it writes is poisoned.
struct AsyncOperation {
  const char* op;
  Where where;
  int thread;                        // that issued it
  std::vector<Range> reads, writes;  // shared memory
};

/// Issues an operation for `thread`: checks bounds and order of its shared memory accesses (in the
/// async proxy, generic writes must also have been fenced). The pointer is good until completion.
/// A block that ends with an operation not completed fails.
AsyncOperation* async_issue(const char* op, Where where, Proxy proxy, std::vector<Range> reads,
                            std::vector<Range> writes, int thread = kSelf);
/// Has the scheduler call `deliver` once, at a time of its choice.
void async_defer(AsyncOperation* operation, std::function<void()> deliver);
/// Calls `deliver` now if the scheduler has not.
void async_deliver(AsyncOperation* operation);
/// Ends the operation: its accesses now count as made by `thread` at this point (a wait).
void async_complete(AsyncOperation* operation, int thread = kSelf);
/// The same for `count` threads at once: the accesses are ordered before whatever each of them does
/// next, but the threads learn nothing of each other.
void async_complete(AsyncOperation* operation, int first_thread, int count);
/// Ends the operation, usually in `deliver`: its writes are ordered before whoever sees the current
/// phase of the mbarrier at shared address `barrier` complete; `bytes` go off its transaction
/// count.
void async_complete_on(AsyncOperation* operation, uint32_t barrier, uint32_t bytes);

/// At issue of what will complete on it: the mbarrier at `barrier` is initialised, `thread` knows
/// so, and the initialisation is visible to the async proxy.
void check_barrier(uint32_t barrier, const char* op, Where where, int thread = kSelf);

// ---- Bodies of thread.cuh, atomic.cuh, memory.cuh and barrier.cuh -----------------------------

void sync_warp(Where where);
enum class Vote : uint8_t { none, any, all, count };
int sync_block(const char* op, Where where, bool predicate = true, Vote vote = Vote::none);
void named_barrier(const char* op, Where where, int id, int threads, bool waits);
int elected_lane();
/// Lets other threads and blocks run; called by every atomic on global memory.
void hand_over(const char* op, Where where);
/// Sleeps until a thread has written to global memory.
void wait_for_write(const char* op, Where where);

void copy_async(uint32_t to, const void* from, int bytes, bool valid, const char* op, Where where);
void copy_async_commit(Where where);
void copy_async_wait(int groups, Where where);

void barrier_init(uint32_t barrier, uint32_t count, Where where);
void barrier_arrive(uint32_t barrier, const char* op, Where where);
void barrier_expect(uint32_t barrier, uint32_t bytes, const char* op, Where where);
bool barrier_try_wait(uint32_t barrier, uint32_t phase, Where where);
void barrier_wait(uint32_t barrier, uint32_t phase, Where where);
void barrier_arrive_after_copies(uint32_t barrier, Where where);
void fence_barrier_init(Where where);
void fence_proxy_async(Where where);

// ---- Launches ----------------------------------------------------------------------------------

struct LaunchConfig {
  const char* kernel;
  Grid grid;
  int threads;
  size_t shared_bytes;
};
/// Runs body(parameters) for every thread of the grid; throws std::runtime_error with the report.
void launch(const LaunchConfig& config, void (*body)(const void* parameters),
            const void* parameters);

/// The order of threads, blocks and deliveries: "fifo", "lifo", or a seed as a decimal number.
/// Starts as WARPFORMER_EMULATOR_SEED, or fifo.
void set_schedule(const std::string& schedule);
/// How many blocks are resident at once (a GPU's multiprocessors, for persistent grids); 4 at
/// first.
void set_resident_blocks(int blocks);
int resident_blocks();
/// The GPU that kernels are chosen for: 80 at first, or 90.
void set_compute_capability(int capability);
int compute_capability();

}  // namespace warpformer::emulator

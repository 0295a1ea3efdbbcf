// What a failure says, and the schedule that finds it again.
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>

#include "emulator/runtime.h"

namespace warpformer::emulator {
namespace {

Schedule parse_schedule(const std::string& text) {
  if (text == "fifo") return {Order::fifo, 0};
  if (text == "lifo") return {Order::lifo, 0};
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos)
    throw std::invalid_argument("schedule \"" + text + "\" is neither fifo, lifo nor a seed");
  return {Order::random, std::stoull(text)};
}

Schedule& schedule() {
  static Schedule value = [] {
    const char* given = std::getenv("WARPFORMER_EMULATOR_SEED");
    return parse_schedule(given && *given ? given : "fifo");
  }();
  return value;
}

int resident = 4;
int capability = 80;

std::string show(Grid grid) {
  const std::string x = std::to_string(grid.x);
  return grid.y == 1 ? x : "(" + x + ", " + std::to_string(grid.y) + ")";
}

std::string show_block(const Block& b) {
  const Grid grid = launched.config.grid;
  const std::string x = std::to_string(b.index.x);
  const std::string index = grid.y == 1 ? x : "(" + x + ", " + std::to_string(b.index.y) + ")";
  return "block " + index + " of " + show(grid);
}

std::string kernel_name() {
  std::string name = launched.config.kernel;
  if (name.size() > 1 && name.front() == '(') name = name.substr(1, name.size() - 2);
  return name;
}

std::string ending() {
  return ", " + std::to_string(launched.config.threads) +
         " threads, WARPFORMER_EMULATOR_SEED=" + launched.schedule.name();
}

[[noreturn]] void fail_block(const Block& b, const std::string& what) {
  end_launch(kernel_name() + ": " + what + "\n  in " + show_block(b) + ending());
}

/// "; barrier 1032 lacks 1 arrival and 4096 bytes in phase 3"
std::string show_barriers(const Block& b, const Thread& waiting) {
  for (const Barrier& barrier : b.barriers)
    for (const Thread* t : barrier.waiters)
      if (t == &waiting)
        return ": phase " + std::to_string(barrier.phase) + " of the barrier at shared byte " +
               std::to_string(barrier.address - shared_base()) + " lacks " +
               std::to_string(barrier.pending) + " of " + std::to_string(barrier.count) +
               " arrivals and " + std::to_string(barrier.bytes) + " bytes";
  return "";
}

/// Every line at which threads of the block wait, and how many.
std::string show_waiting(const Block& b) {
  struct Group {
    int count = 0;
    const Thread* first = nullptr;
  };
  std::map<std::string, Group> groups;
  int exited = 0;
  for (const Thread& t : b.threads) {
    if (t.exited) {
      ++exited;
    } else {
      Group& g =
          groups[std::string(t.waits_in) + " at " + to_string(t.waits_at) + show_barriers(b, t)];
      if (g.count++ == 0) g.first = &t;
    }
  }
  std::string text;
  for (const auto& [line, group] : groups)
    text += "\n  " + std::to_string(group.count) + " of " + std::to_string(b.threads.size()) +
            " threads wait (the first is " + describe(*group.first) + ") in " + line;
  if (exited) text += "\n  " + std::to_string(exited) + " threads have returned from the kernel";
  return text;
}

}  // namespace

std::string Schedule::name() const {
  return order == Order::fifo ? "fifo" : order == Order::lifo ? "lifo" : std::to_string(seed);
}

Schedule current_schedule() { return schedule(); }
int resident_blocks() { return resident; }
void set_schedule(const std::string& text) { schedule() = parse_schedule(text); }
void set_resident_blocks(int blocks) {
  if (blocks < 1) throw std::invalid_argument("at least one block must be resident");
  resident = blocks;
}

int compute_capability() { return capability; }

void set_compute_capability(int value) { capability = value; }

std::string to_string(Where where) {
  const char* file = where.file;
  if (const char* csrc = std::strstr(file, "csrc/")) file = csrc + std::strlen("csrc/");
  if (const char* tests = std::strstr(file, "tests/")) file = tests;
  return std::string(file) + ":" + std::to_string(where.line);
}

std::string describe(const Thread& thread) {
  const Position& p = thread.position;
  return "thread " + std::to_string(p.thread) + " (warp " + std::to_string(p.warp) + ", lane " +
         std::to_string(p.lane) + ")";
}

void fail(const char* op, Where where, const std::string& what, int thread) {
  if (!self) throw std::logic_error(std::string(op) + " outside of a kernel: " + what);
  end_launch(kernel_name() + ": " + op + (where.line ? " at " + to_string(where) : "") + ": " +
             what + "\n  " + describe(thread_at(thread)) + " of " + show_block(block()) + ending());
}

void report_divergence(const Rendezvous& met, const char* op, Where where) {
  fail(
      op, where,
      "divergent: " + describe(*met.first) + " waits in " + met.op + " at " + to_string(met.where));
}

void report_deadlock(const Block& b) { fail_block(b, "deadlock" + show_waiting(b)); }

void report_no_progress() {
  std::string what = "no progress: every resident block waits for a write to global memory (" +
                     std::to_string(launched.resident) + " blocks are resident of " +
                     std::to_string(launched.config.grid.x * launched.config.grid.y) + ")";
  for (const Block& b : launched.blocks)
    if (b.active) what += "\n " + show_block(b) + ":" + show_waiting(b);
  for (const Block& b : launched.blocks)
    if (b.active) fail_block(b, what);
  fail_block(block(), what);
}

}  // namespace warpformer::emulator

// Copies that land later: cp.async at its wait, other asynchronous operations when the scheduler
// says.
#include <algorithm>
#include <cstring>

#include "emulator/runtime.h"

namespace warpformer::emulator {
namespace {

constexpr const char* kArriveAfterCopies = "Barrier::arrive_after_copies";

uint32_t offset(uint32_t address) { return address - shared_base(); }

void poison(uint32_t address, uint32_t bytes) { std::memset(shared_at(address), 0xff, bytes); }

void land(const Copy& copy, Stamp stamp) {
  if (copy.valid) {
    std::memcpy(shared_at(copy.to), copy.from, copy.bytes);
  } else {
    std::memset(shared_at(copy.to), 0, copy.bytes);
  }
  Shadow& shadow = block().shadow;
  shadow.add_in_flight(offset(copy.to), copy.bytes, -1);
  shadow.written(offset(copy.to), copy.bytes, stamp, Site(copy.where));
}

/// Takes the operation off its block's list.
std::unique_ptr<AsyncOperation> take(AsyncOperation* operation) {
  auto& all = block().operations;
  const auto at =
      std::find_if(all.begin(), all.end(), [&](const auto& o) { return o.get() == operation; });
  std::unique_ptr<AsyncOperation> taken = std::move(*at);
  all.erase(at);
  for (const auto* ranges : {&taken->reads, &taken->writes})
    for (const Range& r : *ranges) block().shadow.add_in_flight(offset(r.address), r.bytes, -1);
  return taken;
}

void record(const AsyncOperation& operation, const Accessor& by) {
  Shadow& shadow = block().shadow;
  const Site site(operation.where);
  for (const Range& r : operation.writes)
    shadow.written(offset(r.address), r.bytes, by.stamp, site);
  for (const Range& r : operation.reads) shadow.read(offset(r.address), r.bytes, by, site);
}

}  // namespace

// ---- cp.async

void copy_async(uint32_t to, const void* from, int bytes, bool valid, const char* op, Where where) {
  const auto count = static_cast<uint32_t>(bytes);
  if (valid) global_access(Access::read, from, count, count, op, where);
  shared_access(Access::write, to, count, count, op, where);
  poison(to, count);
  block().shadow.add_in_flight(offset(to), count, 1);
  self->copies.push_back({to, from, count, valid, self->copy_groups, where, false});
}

void copy_async_commit(Where) { ++self->copy_groups; }

void copy_async_wait(int groups, Where) {
  auto& copies = self->copies;
  const Stamp now = Stamp::of(self->position.thread, self->epoch);
  const auto later = std::find_if(copies.begin(), copies.end(), [&](const Copy& c) {
    return c.group >= self->copy_groups - groups;
  });
  for (auto copy = copies.begin(); copy != later; ++copy) land(*copy, now);
  self->copies_landed += static_cast<uint64_t>(later - copies.begin());
  copies.erase(copies.begin(), later);
}

namespace {

/// The oldest arrival that waits for copies of this thread: they land in order.
void deliver_arrival() {
  const CopyArrival next = self->arrivals.front();
  self->arrivals.pop_front();
  const int thread = self->position.thread;
  Barrier& barrier = barrier_at(next.barrier, kArriveAfterCopies, next.where, thread);
  const Stamp stamp = Stamp::of(barrier.agent, ++barrier.agent_epoch);
  auto& copies = self->copies;
  while (!copies.empty() && self->copies_landed < next.copies) {
    land(copies.front(), stamp);
    copies.erase(copies.begin());
    ++self->copies_landed;
  }
  self->copied.raise(barrier.agent, barrier.agent_epoch);
  barrier.arriving.join(self->copied);
  arrive_now(barrier, thread, kArriveAfterCopies, next.where);
}

}  // namespace

void barrier_arrive_after_copies(uint32_t address, Where where) {
  barrier_at(address, kArriveAfterCopies, where, kSelf);
  shared_access(Access::atomic, address, 8, 8, kArriveAfterCopies, where);
  for (Copy& copy : self->copies) copy.handed_over = true;
  self->arrivals.push_back({address, self->copies_landed + self->copies.size(), where});
  block().deferred.push_back({nullptr, self->position.thread, deliver_arrival});
}

void check_copies_at_exit(Thread& thread) {
  for (const Copy& copy : thread.copies)
    if (!copy.handed_over)
      fail("copy_async", copy.where, "is still in flight when the thread returns from the kernel");
}

// ---- Other operations

AsyncOperation* async_issue(const char* op, Where where, Proxy proxy, std::vector<Range> reads,
                            std::vector<Range> writes, int thread) {
  Block& b = block();
  for (const Range& r : reads)
    check_async(Access::read, r.address, r.bytes, proxy, op, where, thread);
  for (const Range& r : writes)
    check_async(Access::write, r.address, r.bytes, proxy, op, where, thread);
  for (const Range& r : writes) poison(r.address, r.bytes);
  for (const auto* ranges : {&reads, &writes})
    for (const Range& r : *ranges) b.shadow.add_in_flight(offset(r.address), r.bytes, 1);
  b.operations.push_back(std::make_unique<AsyncOperation>(AsyncOperation{
      op, where, thread_at(thread).position.thread, std::move(reads), std::move(writes)}));
  return b.operations.back().get();
}

void async_defer(AsyncOperation* operation, std::function<void()> deliver) {
  block().deferred.push_back({operation, operation->thread, std::move(deliver)});
}

void async_deliver(AsyncOperation* operation) {
  auto& deferred = block().deferred;
  const auto at = std::find_if(deferred.begin(), deferred.end(),
                               [&](const Deferred& d) { return d.operation == operation; });
  if (at == deferred.end()) return;
  const Deferred now = std::move(*at);
  deferred.erase(at);
  now.deliver();
}

void async_complete(AsyncOperation* operation, int thread) {
  record(*take(operation), accessor(thread_at(thread), Proxy::generic));
}

void async_complete(AsyncOperation* operation, int first_thread, int count) {
  Block& b = block();
  const int group = first_thread / 128;
  const int agent = static_cast<int>(b.threads.size()) + kMaxBarriers + group;
  const uint32_t epoch = ++b.warpgroup_epochs[static_cast<size_t>(group)];
  record(*take(operation), {Stamp::of(agent, epoch), Clock(), nullptr, agent});
  Gathering completion;
  completion.raise(agent, epoch);
  for (int i = 0; i < count; ++i) completion.give(b.threads[static_cast<size_t>(first_thread + i)]);
}

void async_complete_on(AsyncOperation* operation, uint32_t address, uint32_t bytes) {
  const std::unique_ptr<AsyncOperation> done = take(operation);
  Barrier& barrier = barrier_at(address, done->op, done->where, done->thread);
  const Stamp stamp = Stamp::of(barrier.agent, ++barrier.agent_epoch);
  record(*done, {stamp, Clock(), nullptr, barrier.agent});
  barrier.arriving.raise(barrier.agent, barrier.agent_epoch);
  complete_bytes(barrier, bytes, done->op, done->where, done->thread);
}

void check_operations_at_exit(Block& b) {
  for (const auto& operation : b.operations)
    fail(operation->op, operation->where, "is still in flight when the block ends",
         operation->thread);
  if (!b.deferred.empty())
    fail(kArriveAfterCopies, b.threads[static_cast<size_t>(b.deferred[0].thread)].arrivals[0].where,
         "nobody waited for it before the block ended", b.deferred[0].thread);
}

}  // namespace warpformer::emulator

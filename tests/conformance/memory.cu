// Loads and stores, asynchronous copies, mbarriers.
#include "conformance/case.h"

namespace warpformer::cuda {
namespace {

// Each 16 bytes go through one kind of load and store and, byte by byte reversed, shared memory.
KERNEL(64) vectors(const uint8_t* in, uint8_t* out) {
  const auto space = shared_memory<uint8_t>();
  const int i = 16 * thread_index();
  const int kind = thread_index() % 3;
  const Cache cache = kind == 0 ? Cache::normal : kind == 1 ? Cache::streaming : Cache::read_only;
  Vector<uint8_t> v = load16(in + i, cache);
  space.store16(i, v);
  sync_warp();
  const int other = 16 * (thread_index() ^ 1);
  v = space.load16(other);
  for (int j = 0; j < 8; ++j) {
    const uint8_t x = v[j];
    v[j] = v[15 - j];
    v[15 - j] = x;
  }
  v[3] = space.load(other + 5);
  store16(out + i, v, kind == 2 ? Cache::normal : cache);
}
CASE(vectors) {
  LAUNCH(vectors, 1, 64, 1024, call.stream, call.input<uint8_t>(0), call.output<uint8_t>());
}

// Elements of every size, through shared memory: [1-, 2-, 4-, 8-byte parts]
template <class T>
DEVICE void reverse(const uint8_t* in, uint8_t* out, int part) {
  const auto space = shared_memory<uint64_t>().as<T>();
  const int offset = part * 8 * block_threads();
  space.store(thread_index(), load(reinterpret_cast<const T*>(in + offset) + thread_index()));
  sync_block();
  store(reinterpret_cast<T*>(out + offset) + thread_index(),
        space.load(block_threads() - 1 - thread_index()));
  sync_block();
}
KERNEL(32) scalars(const uint8_t* in, uint8_t* out) {
  reverse<uint8_t>(in, out, 0);
  reverse<uint16_t>(in, out, 1);
  reverse<uint32_t>(in, out, 2);
  reverse<uint64_t>(in, out, 3);
}
CASE(scalars) {
  LAUNCH(scalars, 1, 32, 256, call.stream, call.input<uint8_t>(0), call.output<uint8_t>());
}

// Three groups in flight, each thread's 16 bytes and 4 bytes of them; a third is zero-filled. Waits
// for the groups one by one and writes what has landed.
KERNEL(64) async_copies(const uint8_t* in, uint8_t* out) {
  constexpr int stage = 64 * 20;
  const auto space = shared_memory<uint8_t>();
  const int i = thread_index();
  for (int s = 0; s < 3; ++s) {
    const bool valid = (i + s) % 3 != 0;
    copy_async16(space + (s * stage + 16 * i), in + s * stage + 16 * i, valid);
    copy_async4(space + (s * stage + 1024 + 4 * i), in + s * stage + 1024 + 4 * i, valid);
    copy_async_commit();
  }
  auto write = [&](int s) {
    sync_block();
    for (int j = i; j < stage; j += 64)
      store(out + s * stage + j, space.load(s * stage + (j < 1024 ? j ^ 16 : j)));
  };
  copy_async_wait<2>();
  write(0);
  copy_async_wait<1>();
  write(1);
  copy_async_wait<0>();
  write(2);
}
CASE(async_copies) {
  LAUNCH(async_copies, 1, 64, 3 * 64 * 20, call.stream, call.input<uint8_t>(0),
         call.output<uint8_t>());
}

// Two phases of a barrier of 64, as every thread sees them: [event][thread]. The first event comes
// before anybody arrives, which a sync_block makes sure of.
KERNEL(64) barrier_phases(int32_t* out) {
  const Barrier barrier(shared_memory<uint64_t>());
  if (thread_index() == 0) {
    barrier.init(64);
    fence_barrier_init();
  }
  sync_block();
  auto trace = [&](int event, int32_t value) { store(out + event * 64 + thread_index(), value); };
  trace(0, barrier.try_wait(1));  // the phase before the first counts as complete
  sync_block();
  if (thread_index() < 32) barrier.arrive();
  sync_block();
  trace(1, barrier.try_wait(1));
  sync_block();
  if (thread_index() >= 32) barrier.arrive();
  barrier.wait(0);
  trace(2, barrier.try_wait(0));
  sync_block();
  barrier.arrive();
  barrier.wait(1);
  trace(3, barrier.try_wait(1));
}
CASE(barrier_phases) { LAUNCH(barrier_phases, 1, 64, 8, call.stream, call.output<int32_t>()); }

// cp.async that arrives on a barrier by itself.
KERNEL(64) barrier_after_copies(const uint32_t* in, uint32_t* out) {
  const Barrier barrier(shared_memory<uint64_t>());
  const auto space = shared_memory<uint32_t>(16);
  if (thread_index() == 0) {
    barrier.init(64);
    fence_barrier_init();
  }
  sync_block();
  for (int round = 0; round < 2; ++round) {
    copy_async4(space + thread_index(), in + 64 * round + thread_index());
    barrier.arrive_after_copies();
    barrier.wait(round);
    store(out + 64 * round + thread_index(), space.load(63 - thread_index()));
    sync_block();
  }
}
CASE(barrier_after_copies) {
  LAUNCH(barrier_after_copies, 1, 64, 16 + 256, call.stream, call.input<uint32_t>(0),
         call.output<uint32_t>());
}

}  // namespace
}  // namespace warpformer::cuda

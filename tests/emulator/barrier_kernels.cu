// Kernels that prove barrier.cuh, and their bugs, as in thread_kernels.cu. The bytes that an
// mbarrier expects come from bulk copies: bulk_kernels.cu has those.
#include "core/cuda/ptx.cuh"
#include "emulator/self_test.h"

namespace warpformer::cuda {
namespace {

constexpr int kStages = 2;

DEVICE Barrier barrier_at(int i) { return Barrier(shared_memory<uint64_t>(8 * i)); }

/// Which of its rules the ring breaks.
enum Bug { none, no_wait_full, no_wait_empty, wrong_phase, empty_count, no_barrier_after_init };

/// Warp 0 fills a ring of kStages buffers by cp.async, warps 1 and 2 turn each around and write it
/// out.
///
///   producer:  wait empty[s] -> copies -> arrive_after_copies full[s]   (32 arrivals)
///   consumer:  wait full[s]  -> reads  -> arrive empty[s]               (64 arrivals)
KERNEL(96) ring(const float* in, float* out, int steps, int bug) {
  const int t = thread_index();
  const Shared<float> buffers = shared_memory<float>(64);
  if (t == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_at(s).init(32);
      barrier_at(kStages + s).init(bug == empty_count ? 65 : 64);
    }
    fence_barrier_init();
  }
  if (bug != no_barrier_after_init) sync_block();
  for (int i = 0; i < steps; ++i) {
    const int stage = i % kStages, phase = i / kStages % 2;
    const Shared<float> buffer = buffers + stage * 64;
    const Barrier full = barrier_at(stage), empty = barrier_at(kStages + stage);
    if (warp_index() == 0) {
      // caught: no_barrier_after_init empty_count
      if (bug != no_wait_empty) empty.wait(phase ^ 1);
      // caught: no_wait_empty no_wait_full
      copy_async4(buffer + t, in + i * 64 + t);
      copy_async4(buffer + 32 + t, in + i * 64 + 32 + t);
      full.arrive_after_copies();
    } else {
      // caught: no_barrier_after_init no_wait_empty
      if (bug != no_wait_full) full.wait(bug == wrong_phase ? phase ^ 1 : phase);
      // caught: no_wait_full no_wait_empty wrong_phase
      store(out + i * 64 + t - 32, buffer.load(95 - t));
      empty.arrive();
    }
  }
}

/// try_wait in a loop, and ordinary arrivals.
KERNEL(64) try_wait_loop(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>(16);
  const Barrier barrier = barrier_at(0);
  if (t == 0) barrier.init(32);
  sync_block();
  for (int phase = 0; phase < 2; ++phase) {
    if (warp_index() == 0) {
      (s + 32 * phase).store(t, load(in + 32 * phase + t));
      if (!broken || t != 5) barrier.arrive();
    } else {
      while (!barrier.try_wait(phase)) {  // caught: try_wait_loop
      }
      store(out + 32 * phase + t - 32, (s + 32 * phase).load(63 - t));
    }
    sync_block();  // caught: try_wait_loop
  }
}

KERNEL(64) too_many_arrivals(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Barrier barrier = barrier_at(0);
  if (t == 0) barrier.init(64);
  sync_block();
  if (t == 0 && broken) barrier.expect(4);  // the phase then cannot complete
  sync_block();
  barrier.arrive();
  sync_block();
  if (t == 7 && broken) barrier.arrive();  // caught: too_many_arrivals
  store(out + t, load(in + t));
}

KERNEL(64) one_arrival_left_over(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Barrier barrier = barrier_at(0);
  if (t == 0) barrier.init(64);
  sync_block();
  barrier.arrive();
  if (t == 7 && broken) barrier.arrive();
  store(out + t, load(in + t));
}

/// Two phases pass before the waiter sees the first: on hardware it may sleep for ever.
KERNEL(64) two_phases_late(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Barrier barrier = barrier_at(0);
  if (t == 0) barrier.init(1);
  sync_block();
  if (t == 0) barrier.arrive();
  if (t == 0 && broken) barrier.arrive();
  if (t == 32) barrier.wait(0);  // caught: two_phases_late
  sync_block();
  if (t == 0 && !broken) barrier.arrive();
  store(out + t, load(in + t));
}

KERNEL(32) not_initialised(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Barrier barrier = barrier_at(0);
  if (t == 0 && !broken) barrier.init(32);
  sync_warp();
  barrier.arrive();  // caught: not_initialised
  barrier.wait(0);
  store(out + t, load(in + t));
}

KERNEL(32) misaligned_barrier(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Barrier barrier(Shared<uint64_t>(shared_memory<uint8_t>(broken ? 4 : 8).address()));
  if (t == 0) barrier.init(32);  // caught: misaligned_barrier
  sync_warp();
  barrier.arrive();
  barrier.wait(0);
  store(out + t, load(in + t));
}

KERNEL(32) bytes_never_come(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Barrier barrier = barrier_at(0);
  if (t == 0) barrier.init(1);
  sync_warp();
  if (t == 0) {
    if (broken) {
      barrier.arrive_expect(128);
    } else {
      barrier.arrive();
    }
  }
  barrier.wait(0);  // caught: bytes_never_come
  store(out + t, load(in + t));
}

void bind(py::module_& m) {
  m.def(
      "ring",
      [](Tensor in, Tensor out, int bug) {
        LAUNCH(ring, 1, 96, 64 + kStages * 256, Stream{}, in.ptr<float>(), out.ptr<float>(),
               in.numel() / 64, bug);
      },
      nogil());
  PLANT(try_wait_loop, 1, 64, 16 + 256);
  PLANT(too_many_arrivals, 1, 64, 8);
  PLANT(one_arrival_left_over, 1, 64, 8);
  PLANT(two_phases_late, 1, 64, 8);
  PLANT(not_initialised, 1, 32, 8);
  PLANT(misaligned_barrier, 1, 32, 16);
  PLANT(bytes_never_come, 1, 32, 8);
}

}  // namespace
}  // namespace warpformer::cuda

namespace warpformer::emulator {
void bind_barrier(py::module_& m) { cuda::bind(m); }
}  // namespace warpformer::emulator

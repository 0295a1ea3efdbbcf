// Kernels that prove thread.cuh, reduce.cuh and the scheduler: right ones, and the same ones with a
// bug, which the line marked "caught: <name>" commits.
#include "core/cuda/ptx.cuh"
#include "emulator/self_test.h"

namespace warpformer::cuda {
namespace {

// ---- Values

KERNEL(128) shuffles(const float* in, float* out) {
  const int t = thread_index(), n = block_threads();
  const float x = load(in + t);
  store(out + t, shuffle(x, 5));
  store(out + n + t, shuffle(x, 31 - lane_index()));
  store(out + 2 * n + t, shuffle_xor(x, 9));
  store(out + 3 * n + t, shuffle_up(x, 3));
  store(out + 4 * n + t, shuffle_down(x, 17));
  const int64_t wide = int64_t{t} << 40;
  store(out + 5 * n + t, static_cast<float>(shuffle_xor(wide, 1) >> 40));
}

KERNEL(128) votes(const float* in, float* out) {
  const int t = thread_index(), n = block_threads();
  const bool p = load(in + t) > 0;
  const uint32_t bits = ballot(p);
  store(out + t, static_cast<float>(bits >> lane_index() & 1));
  store(out + n + t, any(p) ? 1.0f : 0.0f);
  store(out + 2 * n + t, all(p) ? 1.0f : 0.0f);
  store(out + 3 * n + t, sync_block_or(p) ? 1.0f : 0.0f);
  store(out + 4 * n + t, sync_block_and(p) ? 1.0f : 0.0f);
  store(out + 5 * n + t, static_cast<float>(sync_block_count(p)));
  store(out + 6 * n + t, elect() ? 1.0f : 0.0f);
  store(out + 7 * n + t, static_cast<float>(count_lanes(bits)));
}

KERNEL(1024) reductions(const float* in, float* out) {
  const int t = thread_index(), n = block_threads();
  const Shared<float> scratch = shared_memory<float>();
  const float x = load(in + t);
  store(out + t, warp_sum(x));
  store(out + n + t, warp_max(x));
  store(out + 2 * n + t, block_sum(x, scratch));
  store(out + 3 * n + t, block_max(x, scratch));
}

KERNEL(64) positions(float* out) {
  const int64_t block = block_index_y() * grid_blocks() + block_index();
  store(out + block * block_threads() + thread_index(),
        static_cast<float>(block * 1000 + warp_index() * 100 + lane_index()));
}

// ---- Bugs

/// Two values change places; `broken` kernels leave a barrier out.
KERNEL(128) missing_barrier(const float* in, float* out, bool broken) {
  const int t = thread_index(), n = block_threads();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  if (!broken) sync_block();
  store(out + t, s.load(n - 1 - t));  // caught: missing_barrier
}

/// A buffer is used again before all have read it: in FIFO order the result is still right.
KERNEL(128) missing_second_barrier(const float* in, float* out, bool broken) {
  const int t = thread_index(), n = block_threads();
  const Shared<float> s = shared_memory<float>();
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    s.store(t, load(in + t));  // caught: missing_second_barrier
    sync_block();
    sum += s.load(n - 1 - t);  // caught: missing_second_barrier
    if (!broken) sync_block();
  }
  store(out + t, sum / 4);
}

KERNEL(64) missing_sync_warp(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  if (!broken) sync_warp();
  store(out + (t ^ 31), s.load(t ^ 31));  // caught: missing_sync_warp
}

/// sync_warp is no barrier between warps.
KERNEL(64) sync_warp_for_block(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  if (broken) {
    sync_warp();
  } else {
    sync_block();
  }
  store(out + t, s.load(63 - t));  // caught: sync_warp_for_block
}

/// A shuffle orders no memory.
KERNEL(32) shuffle_for_barrier(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  shuffle(0.0f, 0);
  if (!broken) sync_warp();
  store(out + t, s.load(31 - t));  // caught: shuffle_for_barrier
}

KERNEL(64) divergent_shuffle(const float* in, float* out, bool broken) {
  const int t = thread_index();
  float x = load(in + t);
  if (broken && lane_index() < 16) {
    x = shuffle(x, 31 - lane_index());  // caught: divergent_shuffle
  } else {
    x = shuffle(x, 31 - lane_index());  // caught: divergent_shuffle
  }
  store(out + t / 32 * 32 + 31 - lane_index(), x);
}

KERNEL(128) divergent_barrier(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  if (broken && warp_index() == 2) {
    sync_block();  // caught: divergent_barrier
  } else {
    sync_block();  // caught: divergent_barrier
  }
  store(out + t, s.load(127 - t));
}

/// Half of a warp shuffles, the other half is at the barrier of the block.
KERNEL(64) shuffle_in_a_branch(const float* in, float* out, bool broken) {
  const int t = thread_index();
  float x = load(in + t);
  if (!broken || lane_index() < 16) x = shuffle_xor(x, 31);  // caught: shuffle_in_a_branch
  sync_block();                                              // caught: shuffle_in_a_branch
  store(out + (t ^ 31), x);
}

KERNEL(128) early_return(const float* in, float* out, bool broken) {
  const int t = thread_index();
  if (broken && t >= 100) return;
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  sync_block();  // caught: early_return
  store(out + t, s.load(127 - t));
}

/// Warp 0 hands values to warps 1..3 through named barriers, twice.
KERNEL(128) producer_and_consumers(const float* in, float* out, bool broken) {
  const int t = thread_index(), lane = lane_index();
  const Shared<float> s = shared_memory<float>();
  for (int i = 0; i < 2; ++i) {
    if (warp_index() == 0) {
      if (i && !broken) barrier_sync(2, 128);
      s.store(lane, load(in + 32 * i + lane));  // caught: producer_and_consumers
      barrier_arrive(1, 128);                   // caught: producer_and_consumers
    } else {
      barrier_sync(1, 128);
      store(out + 96 * i + t - 32, s.load(31 - lane));  // caught: producer_and_consumers
      if (!i && !broken) barrier_arrive(2, 128);
    }
  }
}

KERNEL(128) named_barrier_counts_differ(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  barrier_sync(1, broken && t >= 64 ? 96 : 128);  // caught: named_barrier_counts_differ
  store(out + t, s.load(127 - t));
}

KERNEL(64) arrives_twice(const float* in, float* out, bool broken) {
  const int t = thread_index();
  store(out + t, load(in + t));
  if (warp_index() == 0) {
    barrier_arrive(3, 64);
    if (broken) barrier_arrive(3, 64);  // caught: arrives_twice
  }
  if (warp_index() == 1 && !broken) barrier_arrive(3, 64);
}

KERNEL(64) named_barrier_left_over(const float* in, float* out, bool broken) {
  const int t = thread_index();
  store(out + t, load(in + t));
  if (!broken || warp_index() == 0) barrier_arrive(4, 64);
}

void bind(py::module_& m) {
  m.def(
      "shuffles",
      [](Tensor in, Tensor out) {
        LAUNCH(shuffles, 1, 128, 0, Stream{}, in.ptr<float>(), out.ptr<float>());
      },
      nogil());
  m.def(
      "votes",
      [](Tensor in, Tensor out) {
        LAUNCH(votes, 1, 128, 0, Stream{}, in.ptr<float>(), out.ptr<float>());
      },
      nogil());
  m.def(
      "reductions",
      [](Tensor in, Tensor out, int threads) {
        LAUNCH(reductions, 1, threads, 128, Stream{}, in.ptr<float>(), out.ptr<float>());
      },
      nogil());
  m.def(
      "positions",
      [](Tensor out, int64_t x, int64_t y) {
        LAUNCH(positions, Grid(x, y), 64, 0, Stream{}, out.ptr<float>());
      },
      nogil());
  m.def(
      "launch",
      [](Tensor in, Tensor out, int64_t grid, int threads, int64_t shared_bytes) {
        LAUNCH(missing_barrier, grid, threads, static_cast<size_t>(shared_bytes), Stream{},
               in.ptr<float>(), out.ptr<float>(), false);
      },
      nogil());
  PLANT(missing_barrier, 1, 128, 512);
  PLANT(missing_second_barrier, 1, 128, 512);
  PLANT(missing_sync_warp, 1, 64, 256);
  PLANT(sync_warp_for_block, 1, 64, 256);
  PLANT(shuffle_for_barrier, 1, 32, 128);
  PLANT(divergent_shuffle, 1, 64, 0);
  PLANT(divergent_barrier, 1, 128, 512);
  PLANT(shuffle_in_a_branch, 1, 64, 0);
  PLANT(early_return, 1, 128, 512);
  PLANT(producer_and_consumers, 1, 128, 128);
  PLANT(named_barrier_counts_differ, 1, 128, 512);
  PLANT(arrives_twice, 1, 64, 0);
  PLANT(named_barrier_left_over, 1, 64, 0);
}

}  // namespace
}  // namespace warpformer::cuda

namespace warpformer::emulator {
void bind_thread(py::module_& m) { cuda::bind(m); }
}  // namespace warpformer::emulator

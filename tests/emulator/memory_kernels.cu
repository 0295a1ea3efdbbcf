// Kernels that prove memory.cuh and atomic.cuh, and their bugs, as in thread_kernels.cu.
#include "core/cuda/ptx.cuh"
#include "emulator/self_test.h"

namespace warpformer::cuda {
namespace {

// ---- Values

/// Through registers and shared memory, with every kind of access; n is a multiple of 128 * 8.
template <class T>
KERNEL(128)
move(const T* in, T* out, int n) {
  const int t = thread_index(), step = Vector<T>::size;
  const Shared<T> s = shared_memory<T>(16);
  for (int begin = 0; begin < n; begin += 128 * step) {
    const T* from = in + begin;
    const auto cache = begin % 3 == 0 ? Cache::normal : Cache::streaming;
    s.store16(t * step, load16(from + t * step, cache));
    sync_block();
    for (int i = 0; i < step / 2; ++i) store(out + begin + i * 128 + t, s.load(i * 128 + t));
    sync_block();
    s.store(t, load(from + step / 2 * 128 + t));
    for (int i = 1; i < step / 2; ++i)
      (s + i * 128).store(t, load(from + (step / 2 + i) * 128 + t));
    sync_block();
    const int half = begin + step / 2 * 128;
    if (t < 64) store16(out + half + t * step, s.load16(t * step), cache);
    sync_block();
  }
}

/// A ring of two buffers filled by cp.async, read one step behind; `valid` of the rows exist.
KERNEL(64) copy_ring(const float* in, float* out, int rows, int valid) {
  const int t = thread_index();
  const Shared<float> ring = shared_memory<float>();
  auto issue = [&](int row) {
    if (row < rows) {
      const Shared<float> to = ring + row % 2 * 256;
      if (row % 3) {
        copy_async16(to + 4 * t, in + row * 256 + 4 * t, row < valid);
      } else {
        for (int i = 0; i < 4; ++i)
          copy_async4(to + i * 64 + t, in + row * 256 + i * 64 + t, row < valid);
      }
    }
    copy_async_commit();
  };
  issue(0);
  for (int row = 0; row < rows; ++row) {
    issue(row + 1);
    copy_async_wait<1>();
    sync_block();
    for (int i = 0; i < 4; ++i)
      store(out + row * 256 + i * 64 + t, (ring + row % 2 * 256).load(i * 64 + 63 - t));
    sync_block();
  }
}

/// Counts how often each of 32 values occurs, in shared and in global memory.
KERNEL(128) histogram(const int32_t* in, int32_t* shared_counts, int32_t* global_counts, int n) {
  const int t = thread_index();
  const Shared<int32_t> counts = shared_memory<int32_t>();
  if (t < 32) counts.store(t, 0);
  sync_block();
  for (int64_t i = block_index() * 128 + t; i < n; i += grid_blocks() * 128) {
    const int value = load(in + i);
    atomic_add(counts + value, 1);
    red_add(global_counts + value, 1);
  }
  sync_block();
  if (t < 32) atomic_add(shared_counts + t, counts.load(t));
}

/// One word each: sum, maximum, minimum, exchange, compare and exchange, sum of floats, of 64 bits.
KERNEL(128) atomics(const int32_t* in, int32_t* out, float* sum, uint64_t* wide) {
  const int t = thread_index();
  const int value = load(in + t);
  atomic_add(out, value);
  atomic_max(out + 1, value);
  atomic_min(out + 2, value);
  const int before = atomic_exchange(out + 3, t);
  atomic_add(out + 4, before);
  if (atomic_compare_exchange(out + 5, -1, t) == -1) atomic_add(out + 6, 1);
  atomic_add(sum, 1.0f);
  red_add(sum, 1.0f);
  atomic_add(wide, uint64_t{1} << 40);
}

template <class T>
KERNEL(64)
add_pairs(const T* in, T* out) {
  const int i = 2 * lane_index();
  red_add2(out + i, load(in + 2 * thread_index()), load(in + 2 * thread_index() + 1));
}

/// Persistent blocks take tickets, and note who took which.
KERNEL(32) tickets(int32_t* counter, int32_t* taken, int n) {
  for (;;) {
    int mine = 0;
    if (lane_index() == 0) mine = atomic_add(counter, 1);
    mine = shuffle(mine, 0);
    if (mine >= n) return;
    if (lane_index() == 0) store(taken + mine, static_cast<int32_t>(block_index()));
  }
}

/// A barrier of the whole grid, and what the neighbour wrote before it.
KERNEL(64) grid_barrier(int32_t* counter, int32_t* values, int32_t* out) {
  const int t = thread_index();
  const auto block = static_cast<int32_t>(block_index()),
             blocks = static_cast<int32_t>(grid_blocks());
  if (t == 0) store(values + block, 100 + block);
  sync_block();
  if (t == 0) {
    fence_gpu();
    atomic_add(counter, 1);
    spin_until(counter, [=](int32_t arrived) { return arrived == blocks; });
  }
  sync_block();
  if (t == 0) store(out + block, load_acquire(values + (block + 1) % blocks));
}

// ---- Bugs

KERNEL(128) shared_out_of_bounds(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(broken ? t + 1 : t, load(in + t));  // caught: shared_out_of_bounds
  sync_block();
  store(out + t, s.load(t));
}

KERNEL(128) shared_before_the_buffer(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  s.store(t, load(in + t));
  store(out + t, (s + t).load(broken ? -t - 1 : 0));  // caught: shared_before_the_buffer
}

KERNEL(32) shared_misaligned(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  for (int i = 0; i < 4; ++i) s.store(i * 32 + t, load(in + i * 32 + t));
  sync_block();
  const Vector<float> v =
      s.load16(broken && t < 31 ? 4 * t + 1 : 4 * t);  // caught: shared_misaligned
  store16(out + 4 * t, v);
}

/// 1024-byte alignment of the buffer is taken for granted; the schedules with base 1040 show it.
KERNEL(32) assumes_alignment(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  const uint32_t slack = s.address() % 64;
  if (!broken || slack == 0) s.store(t, load(in + t));
  store(out + t, s.load(t));  // caught: assumes_alignment
}

KERNEL(128) global_out_of_bounds(const float* in, float* out, bool broken) {
  const int t = thread_index();
  store(out + t, load(in + (broken ? t + 4 : t)));  // caught: global_out_of_bounds
}

KERNEL(128) global_write_before(const float* in, float* out, bool broken) {
  const int t = thread_index();
  store(broken ? out + t - 3 : out + t, load(in + t));  // caught: global_write_before
}

KERNEL(32) global_misaligned(const float* in, float* out, bool broken) {
  const int t = thread_index();
  if (t == 31 && broken) return;
  store16(out + 4 * t, load16(in + 4 * t + (broken ? 1 : 0)));  // caught: global_misaligned
}

KERNEL(128) uninitialised(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  if (!broken || t != 77) s.store(t, load(in + t));
  sync_block();
  store(out + t, s.load(127 - t));  // caught: uninitialised
}

/// Two warps write the same word.
KERNEL(128) race_of_warps(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  const int slot = broken ? t % 32 : t;
  s.store(slot, load(in + t));  // caught: race_of_warps
  sync_block();
  store(out + t, s.load(slot));
}

/// Neighbouring bytes belong to different threads; with the bug, so does one byte.
KERNEL(128) race_in_a_word(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<uint8_t> s = shared_memory<uint8_t>();
  s.store(t, static_cast<uint8_t>(t));
  if (broken && t == 2) s.store(1, 9);  // caught: race_in_a_word
  sync_block();
  store(out + t, load(in + s.load(t)));
}

KERNEL(64) plain_write_beside_atomic(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<int32_t> s = shared_memory<int32_t>();
  if (t == 0) s.store(0, 0);
  sync_block();
  atomic_add(s, 1);                      // caught: plain_write_beside_atomic
  if (broken && t == 40) s.store(0, 0);  // caught: plain_write_beside_atomic
  sync_block();
  store(out + t, s.load() == 64 ? load(in + t) : -1.0f);
}

KERNEL(64) wrong_wait_count(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  for (int i = 0; i < 2; ++i) {
    copy_async4(s + i * 64 + t, in + i * 64 + t);
    copy_async_commit();
  }
  if (broken) {
    copy_async_wait<1>();
  } else {
    copy_async_wait<0>();
  }
  sync_block();
  for (int i = 0; i < 2; ++i)
    store(out + i * 64 + t, s.load(i * 64 + t));  // caught: wrong_wait_count
}

/// What is not committed is not waited for.
KERNEL(64) missing_commit(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  copy_async4(s + t, in + t);
  if (!broken) copy_async_commit();
  copy_async_wait<0>();
  store(out + t, s.load(t));  // caught: missing_commit
}

/// A wait is for the own copies; those of others need a barrier.
KERNEL(64) missing_barrier_after_wait(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  copy_async4(s + t, in + t);
  copy_async_commit();
  copy_async_wait<0>();
  if (!broken) sync_block();
  store(out + t, s.load(63 - t));  // caught: missing_barrier_after_wait
}

KERNEL(64) copy_over_what_is_read(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  for (int i = 0; i < 3; ++i) {
    copy_async4(s + t, in + i * 64 + t);  // caught: copy_over_what_is_read
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    store(out + i * 64 + t, s.load(63 - t));  // caught: copy_over_what_is_read
    if (!broken) sync_block();
  }
}

KERNEL(64) write_over_a_copy(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  copy_async4(s + t, in + t);
  copy_async_commit();
  if (broken) s.store(t, 0.0f);  // caught: write_over_a_copy
  copy_async_wait<0>();
  store(out + t, s.load(t));
}

KERNEL(64) copy_in_flight_at_exit(const float* in, float* out, bool broken) {
  const int t = thread_index();
  store(out + t, load(in + t));
  copy_async4(shared_memory<float>() + t, in + t);  // caught: copy_in_flight_at_exit
  copy_async_commit();
  if (!broken) copy_async_wait<0>();
}

KERNEL(64) copy_out_of_bounds(const float* in, float* out, bool broken) {
  const int t = thread_index();
  const Shared<float> s = shared_memory<float>();
  const bool valid = t < 60;
  copy_async4(s + t, in + (valid ? t : 1000000), broken || valid);  // caught: copy_out_of_bounds
  copy_async_commit();
  copy_async_wait<0>();
  store(out + t, s.load(t));
}

KERNEL(32) spins_by_hand(const float* in, float* out, bool broken) {
  const int t = thread_index();
  auto* word = reinterpret_cast<int32_t*>(out);
  if (broken) {
    while (atomic_add(word, 0) != 12345) {  // caught: spins_by_hand
    }
  }
  store(out + t, load(in + t));
}

template <class T>
void bind_move(py::module_& m, const char* name) {
  m.def(
      name,
      [](Tensor in, Tensor out) {
        LAUNCH(move<T>, 1, 128, 16 + 128 * 16, Stream{}, in.ptr<T>(), out.ptr<T>(), in.numel());
      },
      nogil());
}

void bind(py::module_& m) {
  bind_move<float>(m, "move_f32");
  bind_move<bf16>(m, "move_bf16");
  bind_move<int8_t>(m, "move_i8");
  m.def(
      "copy_ring",
      [](Tensor in, Tensor out, int valid) {
        LAUNCH(copy_ring, 1, 64, 2048, Stream{}, in.ptr<float>(), out.ptr<float>(), out.dim(0),
               valid);
      },
      nogil());
  m.def(
      "histogram",
      [](Tensor in, Tensor shared_counts, Tensor global_counts, int64_t grid) {
        LAUNCH(histogram, grid, 128, 128, Stream{}, in.ptr<int32_t>(), shared_counts.ptr<int32_t>(),
               global_counts.ptr<int32_t>(), in.numel());
      },
      nogil());
  m.def(
      "atomics",
      [](Tensor in, Tensor out, Tensor sum, Tensor wide) {
        LAUNCH(atomics, 1, 128, 0, Stream{}, in.ptr<int32_t>(), out.ptr<int32_t>(),
               sum.ptr<float>(), wide.ptr<uint64_t>());
      },
      nogil());
  m.def(
      "add_pairs",
      [](Tensor in, Tensor out) {
        if (in.dtype == DType::f16)
          LAUNCH(add_pairs<f16>, 1, 64, 0, Stream{}, in.ptr<f16>(), out.ptr<f16>());
        else
          LAUNCH(add_pairs<bf16>, 1, 64, 0, Stream{}, in.ptr<bf16>(), out.ptr<bf16>());
      },
      nogil());
  m.def(
      "tickets",
      [](Tensor counter, Tensor taken, int64_t grid) {
        LAUNCH(tickets, grid, 32, 0, Stream{}, counter.ptr<int32_t>(), taken.ptr<int32_t>(),
               taken.numel());
      },
      nogil());
  m.def(
      "grid_barrier",
      [](Tensor counter, Tensor values, Tensor out) {
        LAUNCH(grid_barrier, out.numel(), 64, 0, Stream{}, counter.ptr<int32_t>(),
               values.ptr<int32_t>(), out.ptr<int32_t>());
      },
      nogil());
  PLANT(shared_out_of_bounds, 1, 128, 512);
  PLANT(shared_before_the_buffer, 1, 128, 512);
  PLANT(shared_misaligned, 1, 32, 512);
  PLANT(assumes_alignment, 1, 32, 128);
  PLANT(global_out_of_bounds, 1, 128, 0);
  PLANT(global_write_before, 1, 128, 0);
  PLANT(global_misaligned, 1, 32, 0);
  PLANT(uninitialised, 1, 128, 512);
  PLANT(race_of_warps, 1, 128, 512);
  PLANT(race_in_a_word, 1, 128, 128);
  PLANT(plain_write_beside_atomic, 1, 64, 16);
  PLANT(wrong_wait_count, 1, 64, 512);
  PLANT(missing_commit, 1, 64, 256);
  PLANT(missing_barrier_after_wait, 1, 64, 256);
  PLANT(copy_over_what_is_read, 1, 64, 256);
  PLANT(write_over_a_copy, 1, 64, 256);
  PLANT(copy_in_flight_at_exit, 1, 64, 256);
  PLANT(copy_out_of_bounds, 1, 64, 256);
  PLANT(spins_by_hand, 1, 32, 0);
}

}  // namespace
}  // namespace warpformer::cuda

namespace warpformer::emulator {
void bind_memory(py::module_& m) { cuda::bind(m); }
}  // namespace warpformer::emulator

// Positions, shuffles, votes, barriers, reductions, atomics, waiting on memory.
#include "conformance/case.h"

namespace warpformer::cuda {
namespace {

// [block y][block x][thread][8]
KERNEL(1024) positions(int32_t* out) {
  const int64_t block = block_index() + grid_blocks() * block_index_y();
  int32_t* mine = out + (block * block_threads() + thread_index()) * 8;
  store(mine + 0, thread_index());
  store(mine + 1, lane_index());
  store(mine + 2, warp_index());
  store(mine + 3, block_threads());
  store(mine + 4, static_cast<int32_t>(block_index()));
  store(mine + 5, static_cast<int32_t>(block_index_y()));
  store(mine + 6, static_cast<int32_t>(grid_blocks()));
  store(mine + 7, static_cast<int32_t>(grid_blocks_y()));
}
CASE(positions) { LAUNCH(positions, (Grid{3, 2}), 96, 0, call.stream, call.output<int32_t>()); }

// Four kinds of shuffle of 64 threads, their operand given: [kind][thread].
template <class T>
KERNEL(64)
shuffles(const T* in, T* out, int operand) {
  const T value = load(in + thread_index());
  const T results[4] = {shuffle(value, operand), shuffle_xor(value, operand % 32),
                        shuffle_up(value, operand % 32), shuffle_down(value, operand % 32)};
  for (int i = 0; i < 4; ++i) store(out + i * block_threads() + thread_index(), results[i]);
}
template <class T>
void run_shuffles(const conformance::Call& call) {
  LAUNCH(shuffles<T>, 1, 64, 0, call.stream, call.input<T>(0), call.output<T>(),
         static_cast<int>(call.number(0)));
}
CASE(shuffle_float) { run_shuffles<float>(call); }
CASE(shuffle_int32) { run_shuffles<int32_t>(call); }
CASE(shuffle_uint32) { run_shuffles<uint32_t>(call); }
CASE(shuffle_int64) { run_shuffles<int64_t>(call); }

// [thread][8]: any, all, ballot; of the block: or, and, count; lanes elected in the warp; lanes of
// the ballot.
KERNEL(128) votes(const int32_t* in, uint32_t* out) {
  const bool predicate = load(in + thread_index()) != 0;
  uint32_t* mine = out + thread_index() * 8;
  const bool some = any(predicate);
  const bool every = all(predicate);
  const uint32_t bits = ballot(predicate);
  const bool block_some = sync_block_or(predicate);
  const bool block_every = sync_block_and(predicate);
  const int block_count = sync_block_count(predicate);
  const bool elected = elect();
  const uint32_t leaders = ballot(elected);
  store<uint32_t>(mine + 0, some);
  store<uint32_t>(mine + 1, every);
  store<uint32_t>(mine + 2, bits);
  store<uint32_t>(mine + 3, block_some);
  store<uint32_t>(mine + 4, block_every);
  store<uint32_t>(mine + 5, static_cast<uint32_t>(block_count));
  store<uint32_t>(mine + 6, leaders != 0 && (leaders & (leaders - 1)) == 0);
  store<uint32_t>(mine + 7, static_cast<uint32_t>(count_lanes(bits)));
}
CASE(votes) {
  LAUNCH(votes, 1, 128, 0, call.stream, call.input<int32_t>(0), call.output<uint32_t>());
}

// Warp 0 hands numbers to warp 1 through shared memory by two named barriers, and warps 2 and 3
// exchange theirs; within a warp lanes reverse theirs by sync_warp.
KERNEL(128) barriers(const int32_t* in, int32_t* out) {
  const auto box = shared_memory<int32_t>(), pair = box + 32, reversed = pair + 64;
  const int warp = warp_index(), lane = lane_index();
  int32_t result = 0;
  if (warp == 0) {
    for (int round = 0; round < 3; ++round) {
      if (round > 0) barrier_sync(2, 64);
      box.store(lane, load(in + lane) + round);
      barrier_arrive(1, 64);
    }
  } else if (warp == 1) {
    for (int round = 0; round < 3; ++round) {
      barrier_sync(1, 64);
      result = 10 * result + box.load(31 - lane);
      if (round < 2) barrier_arrive(2, 64);
    }
  } else {
    pair.store(thread_index() - 64, load(in + thread_index()));
    barrier_sync(3, 64);
    result = pair.load((thread_index() - 64) ^ 32);
  }
  reversed.store(thread_index(), result);
  sync_warp();
  store(out + thread_index(), reversed.load(thread_index() ^ 31));
}
CASE(barriers) {
  LAUNCH(barriers, 1, 128, 4 * (32 + 64 + 128), call.stream, call.input<int32_t>(0),
         call.output<int32_t>());
}

// [4][thread]
KERNEL(96) reductions(const float* in, float* out) {
  const auto scratch = shared_memory<float>();
  const float x = load(in + thread_index());
  const float sum = warp_sum(x);
  const float max = warp_max(x);
  const float all_sum = block_sum(x, scratch);
  const float all_max = block_max(x, scratch);
  const float results[4] = {sum, max, all_sum, all_max};
  for (int i = 0; i < 4; ++i) store(out + i * block_threads() + thread_index(), results[i]);
}
CASE(reductions) {
  LAUNCH(reductions, 1, 96, 128, call.stream, call.input<float>(0), call.output<float>());
}

// Every thread of 4 blocks on the same words; the results do not depend on the order. Words: sum,
// max, min, exchange, sum of what the exchanges saw, a counter made of compare_exchange.
template <class P>
DEVICE void update(P words, int32_t x) {
  atomic_add(words, x);
  atomic_max(words + 1, x);
  atomic_min(words + 2, x);
  const int32_t before = atomic_exchange(words + 3, 7);
  atomic_add(words + 4, before);
  for (bool done = false; !done;) {
    const int32_t seen = atomic_add(words + 5, 0);
    done = atomic_compare_exchange(words + 5, seen, seen + 2) == seen;
  }
}
KERNEL(64) atomics(const int32_t* in, int32_t* out) {
  const auto words = shared_memory<int32_t>();
  if (thread_index() < 6) words.store(thread_index(), 0);
  sync_block();
  const int32_t x = load(in + block_index() * block_threads() + thread_index());
  update(words, x);
  update(out, x);
  sync_block();
  if (thread_index() < 6)
    store(out + 6 + block_index() * 6 + thread_index(), words.load(thread_index()));
}
CASE(atomics) {
  LAUNCH(atomics, 4, 64, 64, call.stream, call.input<int32_t>(0), call.output<int32_t>());
}

// Unsigned and 8-byte words, float: [add f32, red f32] [add u32, max u32, min u32] [add u64]
// [add i32] [sum of what blocks add to u64 in shared memory]
KERNEL(64) more_atomics(const uint32_t* in, float* f, uint32_t* u, uint64_t* w, int32_t* i) {
  const auto shared = shared_memory<uint64_t>();
  if (thread_index() == 0) shared.store(0, 0);
  sync_block();
  const uint32_t x = load(in + block_index() * block_threads() + thread_index());
  atomic_add(f, static_cast<float>(x & 255));
  red_add(f + 1, static_cast<float>(x & 255));
  atomic_add(u, x);
  atomic_max(u + 1, x);
  atomic_min(u + 2, x);
  atomic_add(w, uint64_t{x} << 20);
  red_add(i, static_cast<int32_t>(x & 255));
  atomic_add(shared, uint64_t{x} << 20);
  sync_block();
  if (thread_index() == 0) atomic_add(w + 2, shared.load());
}
CASE(more_atomics) {
  char* out = call.output<char>();
  LAUNCH(more_atomics, 4, 64, 8, call.stream, call.input<uint32_t>(0),
         reinterpret_cast<float*>(out), reinterpret_cast<uint32_t*>(out + 8),
         reinterpret_cast<uint64_t*>(out + 24), reinterpret_cast<int32_t*>(out + 32));
}

// Pairs of 2-byte numbers; bf16 needs sm_90.
template <class T>
KERNEL(64)
paired_atomics(T* out) {
  red_add2(out + 2 * (thread_index() % 4), from_float<T>(static_cast<float>(thread_index() % 8)),
           from_float<T>(-1.0f));
}
CASE(red_add2_f16) { LAUNCH(paired_atomics<f16>, 2, 64, 0, call.stream, call.output<f16>()); }
CASE(red_add2_bf16) { LAUNCH(paired_atomics<bf16>, 2, 64, 0, call.stream, call.output<bf16>()); }

// Block 0 hands a number to block 1 and so on: words[b] is released by block b. The data start as
// 0.
KERNEL(32) relay(int32_t* words, int32_t* data) {
  const auto block = static_cast<int32_t>(block_index());
  if (thread_index() != 0) return;
  int32_t before = 0;
  if (block > 0) {
    spin_until(words + block - 1, [](int32_t word) { return word == 1; });
    before = load(data + block - 1);
  }
  store(data + block, before + block + 1 + load_acquire(words + 3 + block));
  fence_block();
  fence_gpu();
  store_release(words + block, 1);
}
CASE(relay) {
  LAUNCH(relay, 3, 32, 0, call.stream, call.output<int32_t>(), call.output<int32_t>() + 3);
}

}  // namespace
}  // namespace warpformer::cuda

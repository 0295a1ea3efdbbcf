// Threads: who am I, shuffles, votes, barriers of warp and block. Every primitive of core/cuda has
// two bodies: PTX for nvcc and, under WARPFORMER_EMULATED, a call of tests/emulator, which runs the
// same kernel on the CPU. All collectives are full mask: 32 lanes, or every thread of the block.
#pragma once

#include <cstdint>

#include "core/types.h"

#ifdef WARPFORMER_EMULATED
#include "emulator/emulator.h"
#define DEVICE inline
#define KERNEL(...) inline void
#define GRID_CONSTANT
#else
#define DEVICE __device__ __forceinline__
/// KERNEL(threads[, min_blocks]) name(parameters) { ... }
#define KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
/// Of a parameter that may be referred to without a copy: `const GRID_CONSTANT Params p`.
#define GRID_CONSTANT __grid_constant__
#endif

namespace warpformer::cuda {

constexpr int kWarp = 32;

#ifdef WARPFORMER_EMULATED
using emulator::Where;
#else
/// The caller's line, for the emulator's reports; nothing on the device.
struct Where {
  DEVICE static constexpr Where here() { return {}; }
};
#define WHERE ::warpformer::cuda::Where where = ::warpformer::cuda::Where::here()
constexpr unsigned kFullMask = 0xffffffffu;
#endif

// ---- Position. Blocks are one-dimensional, a multiple of 32 threads.

/// Of this thread in its block.
DEVICE int thread_index() {
#ifdef WARPFORMER_EMULATED
  return emulator::here().thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}
DEVICE int lane_index() { return thread_index() % kWarp; }
DEVICE int warp_index() { return thread_index() / kWarp; }
/// Threads of the block.
DEVICE int block_threads() {
#ifdef WARPFORMER_EMULATED
  return emulator::here().threads;
#else
  return static_cast<int>(blockDim.x);
#endif
}
DEVICE int64_t block_index() {
#ifdef WARPFORMER_EMULATED
  return emulator::here().block.x;
#else
  return blockIdx.x;
#endif
}
DEVICE int64_t block_index_y() {
#ifdef WARPFORMER_EMULATED
  return emulator::here().block.y;
#else
  return blockIdx.y;
#endif
}
/// Blocks of the grid.
DEVICE int64_t grid_blocks() {
#ifdef WARPFORMER_EMULATED
  return emulator::here().grid.x;
#else
  return gridDim.x;
#endif
}
DEVICE int64_t grid_blocks_y() {
#ifdef WARPFORMER_EMULATED
  return emulator::here().grid.y;
#else
  return gridDim.y;
#endif
}

// ---- Shuffles of float, int32_t, uint32_t and int64_t. They order no memory.

#ifdef WARPFORMER_EMULATED
template <class T>
struct ShuffleArgument {
  T value, result;
  int lane;  // to read from
};
/// `source` may lie outside the warp: then the lane keeps its own value, as shuffle_up and _down
/// do.
template <class T>
T shuffle_from(const char* op, Where where, T value, int source) {
  ShuffleArgument<T> argument{value, value, source};
  emulator::warp_collective(op, where, argument, [](ShuffleArgument<T>* const* lanes) {
    for (int i = 0; i < kWarp; ++i)
      if (lanes[i]->lane >= 0 && lanes[i]->lane < kWarp)
        lanes[i]->result = lanes[lanes[i]->lane]->value;
  });
  return argument.result;
}
#endif

/// The value of lane `lane` mod 32.
template <class T>
DEVICE T shuffle(T value, int lane, WHERE) {
#ifdef WARPFORMER_EMULATED
  return shuffle_from("shuffle", where, value, lane & (kWarp - 1));
#else
  return __shfl_sync(kFullMask, value, lane);
#endif
}
/// The value of lane (own lane ^ mask), mask in 0..31.
template <class T>
DEVICE T shuffle_xor(T value, int mask, WHERE) {
#ifdef WARPFORMER_EMULATED
  return shuffle_from("shuffle_xor", where, value, lane_index() ^ mask);
#else
  return __shfl_xor_sync(kFullMask, value, mask);
#endif
}
/// The value of lane (own lane - delta); the own value in the first `delta` lanes.
template <class T>
DEVICE T shuffle_up(T value, int delta, WHERE) {
#ifdef WARPFORMER_EMULATED
  return shuffle_from("shuffle_up", where, value, lane_index() - delta);
#else
  return __shfl_up_sync(kFullMask, value, static_cast<unsigned>(delta));
#endif
}
/// The value of lane (own lane + delta); the own value in the last `delta` lanes.
template <class T>
DEVICE T shuffle_down(T value, int delta, WHERE) {
#ifdef WARPFORMER_EMULATED
  return shuffle_from("shuffle_down", where, value, lane_index() + delta);
#else
  return __shfl_down_sync(kFullMask, value, static_cast<unsigned>(delta));
#endif
}

// ---- Votes

#ifdef WARPFORMER_EMULATED
struct VoteArgument {
  bool predicate;
  uint32_t ballot;
};
inline uint32_t vote(const char* op, Where where, bool predicate) {
  VoteArgument argument{predicate, 0};
  emulator::warp_collective(op, where, argument, [](VoteArgument* const* lanes) {
    uint32_t ballot = 0;
    for (int i = 0; i < kWarp; ++i) ballot |= static_cast<uint32_t>(lanes[i]->predicate) << i;
    for (int i = 0; i < kWarp; ++i) lanes[i]->ballot = ballot;
  });
  return argument.ballot;
}
#endif

/// Bit i: the predicate of lane i.
DEVICE uint32_t ballot(bool predicate, WHERE) {
#ifdef WARPFORMER_EMULATED
  return vote("ballot", where, predicate);
#else
  return __ballot_sync(kFullMask, predicate);
#endif
}
DEVICE bool any(bool predicate, WHERE) {
#ifdef WARPFORMER_EMULATED
  return vote("any", where, predicate) != 0;
#else
  return __any_sync(kFullMask, predicate);
#endif
}
DEVICE bool all(bool predicate, WHERE) {
#ifdef WARPFORMER_EMULATED
  return vote("all", where, predicate) == ~0u;
#else
  return __all_sync(kFullMask, predicate);
#endif
}
/// The first lane of a ballot that is not empty.
DEVICE int first_lane(uint32_t ballot) {
#ifdef WARPFORMER_EMULATED
  return __builtin_ctz(ballot);
#else
  return __ffs(static_cast<int>(ballot)) - 1;
#endif
}
/// How many lanes a ballot has.
DEVICE int count_lanes(uint32_t ballot) {
#ifdef WARPFORMER_EMULATED
  return __builtin_popcount(ballot);
#else
  return __popc(ballot);
#endif
}
/// True in one lane of the warp, the same one at every call.
DEVICE bool elect(WHERE) {
#ifdef WARPFORMER_EMULATED
  vote("elect", where, true);
  return lane_index() == emulator::elected_lane();
#elif __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected;
#else
  return lane_index() == 0;
#endif
}

// ---- Barriers: they order shared and global memory among those who meet.

/// Of the warp.
DEVICE void sync_warp(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::sync_warp(where);
#else
  __syncwarp();
#endif
}
/// Of the block: every thread, at the same line.
DEVICE void sync_block(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::sync_block("sync_block", where);
#else
  __syncthreads();
#endif
}
/// sync_block, and whether the predicate holds for any thread.
DEVICE bool sync_block_or(bool predicate, WHERE) {
#ifdef WARPFORMER_EMULATED
  return emulator::sync_block("sync_block_or", where, predicate, emulator::Vote::any);
#else
  return __syncthreads_or(predicate);
#endif
}
/// sync_block, and whether the predicate holds for all threads.
DEVICE bool sync_block_and(bool predicate, WHERE) {
#ifdef WARPFORMER_EMULATED
  return emulator::sync_block("sync_block_and", where, predicate, emulator::Vote::all);
#else
  return __syncthreads_and(predicate);
#endif
}
/// sync_block, and for how many threads the predicate holds.
DEVICE int sync_block_count(bool predicate, WHERE) {
#ifdef WARPFORMER_EMULATED
  return emulator::sync_block("sync_block_count", where, predicate, emulator::Vote::count);
#else
  return __syncthreads_count(predicate);
#endif
}
/// Waits until `threads` threads (whole warps) have come to barrier `id` (1..15) by either of
/// these.
DEVICE void barrier_sync(int id, int threads, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::named_barrier("barrier_sync", where, id, threads, true);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}
/// Comes to barrier `id` and goes on.
DEVICE void barrier_arrive(int id, int threads, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::named_barrier("barrier_arrive", where, id, threads, false);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#endif
}

}  // namespace warpformer::cuda

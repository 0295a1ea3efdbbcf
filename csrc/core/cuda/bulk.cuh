// Bulk copies, sm_90: one thread has the copy engine move bytes, or boxes of tensors, between
// global and shared memory.
//
//   loads    tensor_load(tile, map, {x, y}, barrier)  complete on an mbarrier, which has been told
//                                                     to expect all bytes of the box
//   stores   tensor_store(map, {x, y}, tile)          complete in groups of the thread that issued
//            bulk_commit(); bulk_wait_read<0>();      them: then the tile may be written again
//
// Coordinates are in elements, innermost first, and may lie outside the tensor: what is outside
// loads as zeros (and counts as bytes) and is not stored. In shared memory the rows of a box follow
// each other, swizzled by their own addresses; it starts at a multiple of 128 bytes. Ordinary
// writes that a store reads need fence_proxy_async() first.
//
// The layouts (tests/emulator/layouts.h has the pictures) are unverified on hardware.
#pragma once

#include "core/cuda/barrier.cuh"
#include "core/cuda/tensor_map.cuh"

#ifdef WARPFORMER_EMULATED
#include "emulator/bulk.h"
#endif

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

namespace warpformer::cuda {

// ---- Bytes: `bytes` and both addresses are multiples of 16

template <class T>
DEVICE void bulk_load(Shared<T> to, const T* from, int bytes, Barrier barrier, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::bulk_load(to.address(), from, bytes, barrier.address(), where);
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to.address()),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier.address())
      : "memory");
#endif
}

template <class T>
DEVICE void bulk_store(T* to, Shared<T> from, int bytes, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::bulk_store(to, from.address(), bytes, where);
#else
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(to)),
               "r"(from.address()), "r"(bytes)
               : "memory");
#endif
}

/// to[i] += from[i], each addition atomic; T is float, int32_t, bf16 or f16.
template <class T>
DEVICE void bulk_add(T* to, Shared<T> from, int bytes, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::bulk_add(to, from.address(), bytes, kElement<T>, where);
#else
  const auto global = __cvta_generic_to_global(to);
  if constexpr (std::is_same_v<T, float>) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global),
        "r"(from.address()), "r"(bytes)
        : "memory");
  } else if constexpr (std::is_same_v<T, int32_t>) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(global),
        "r"(from.address()), "r"(bytes)
        : "memory");
  } else if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%0], [%1], %2;" ::"l"(
            global),
        "r"(from.address()), "r"(bytes)
        : "memory");
  } else {
    static_assert(std::is_same_v<T, f16>, "additions are of float, int32_t, bf16 or f16");
    asm volatile(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.f16 [%0], [%1], %2;" ::"l"(
            global),
        "r"(from.address()), "r"(bytes)
        : "memory");
  }
#endif
}

// ---- Boxes of tensors

/// Fetches the map itself ahead of its first use.
DEVICE void prefetch(const TensorMap& map) {
#ifdef WARPFORMER_EMULATED
  (void)map;
#else
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
#endif
}

#ifndef WARPFORMER_EMULATED
// The coordinates as asm text and operands, the first of them operand %3 of the loads, %2 of the
// others.
#define BULK_COORDINATES_1(c) "r"(c[0])
#define BULK_COORDINATES_2(c) "r"(c[0]), "r"(c[1])
#define BULK_COORDINATES_3(c) "r"(c[0]), "r"(c[1]), "r"(c[2])
#define BULK_COORDINATES_4(c) "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
#define BULK_COORDINATES_5(c) "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
#define BULK_FROM_3_1 "%3"
#define BULK_FROM_3_2 "%3, %4"
#define BULK_FROM_3_3 "%3, %4, %5"
#define BULK_FROM_3_4 "%3, %4, %5, %6"
#define BULK_FROM_3_5 "%3, %4, %5, %6, %7"
#define BULK_FROM_2_1 "%2"
#define BULK_FROM_2_2 "%2, %3"
#define BULK_FROM_2_3 "%2, %3, %4"
#define BULK_FROM_2_4 "%2, %3, %4, %5"
#define BULK_FROM_2_5 "%2, %3, %4, %5, %6"
#define BULK_LOAD(RANK)                                                                  \
  if constexpr (rank == RANK)                                                            \
    asm volatile("cp.async.bulk.tensor." #RANK                                           \
                 "d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "     \
                 "[%1, {" BULK_FROM_3_##RANK "}], [%2];" ::"r"(to.address()),            \
                 "l"(&map), "r"(barrier.address()), BULK_COORDINATES_##RANK(coordinates) \
                 : "memory");
#define BULK_STORE(RANK)                                                          \
  if constexpr (rank == RANK)                                                     \
    asm volatile("cp.async.bulk.tensor." #RANK                                    \
                 "d.global.shared::cta.tile.bulk_group [%0, {" BULK_FROM_2_##RANK \
                 "}], [%1];" ::"l"(&map),                                         \
                 "r"(from.address()), BULK_COORDINATES_##RANK(coordinates)        \
                 : "memory");
#define BULK_ADD(RANK)                                                                \
  if constexpr (rank == RANK)                                                         \
    asm volatile("cp.reduce.async.bulk.tensor." #RANK                                 \
                 "d.global.shared::cta.add.tile.bulk_group [%0, {" BULK_FROM_2_##RANK \
                 "}], [%1];" ::"l"(&map),                                             \
                 "r"(from.address()), BULK_COORDINATES_##RANK(coordinates)            \
                 : "memory");
#define BULK_EVERY_RANK(FORM) FORM(1) FORM(2) FORM(3) FORM(4) FORM(5)
#endif

template <class T, int rank>
DEVICE void tensor_load(Shared<T> to, const TensorMap& map, const int (&coordinates)[rank],
                        Barrier barrier, WHERE) {
  static_assert(rank >= 1 && rank <= 5);
#ifdef WARPFORMER_EMULATED
  emulator::tensor_load(to.address(), map, coordinates, rank, barrier.address(), where);
#else
  BULK_EVERY_RANK(BULK_LOAD)
#endif
}

template <class T, int rank>
DEVICE void tensor_store(const TensorMap& map, const int (&coordinates)[rank], Shared<T> from,
                         WHERE) {
  static_assert(rank >= 1 && rank <= 5);
#ifdef WARPFORMER_EMULATED
  emulator::tensor_store(map, coordinates, rank, from.address(), false, where);
#else
  BULK_EVERY_RANK(BULK_STORE)
#endif
}

/// Adds the box to the tensor, each element's addition atomic; the map is of float, int32_t, bf16
/// or f16.
template <class T, int rank>
DEVICE void tensor_add(const TensorMap& map, const int (&coordinates)[rank], Shared<T> from,
                       WHERE) {
  static_assert(rank >= 1 && rank <= 5);
#ifdef WARPFORMER_EMULATED
  emulator::tensor_store(map, coordinates, rank, from.address(), true, where);
#else
  BULK_EVERY_RANK(BULK_ADD)
#endif
}

// ---- Groups of stores and additions

/// Closes the group of this thread's stores since the last one.
DEVICE void bulk_commit(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::bulk_commit(where);
#else
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}
/// Waits until at most `pending` of this thread's newest groups still read shared memory.
template <int pending>
DEVICE void bulk_wait_read(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::bulk_wait(pending, true, where);
#else
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory");
#endif
}
/// Waits until all but the `pending` newest groups have also written global memory, for this thread
/// to see.
template <int pending>
DEVICE void bulk_wait(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::bulk_wait(pending, false, where);
#else
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace warpformer::cuda
#endif

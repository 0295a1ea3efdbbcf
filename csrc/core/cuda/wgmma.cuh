// wgmma, sm_90a alone (code for other architectures traps): the four warps of a warpgroup multiply
// a 64 x K tile by a K x n tile into accumulators in registers. B, and A unless it comes in
// registers, are read from shared memory by descriptor, asynchronously.
//
//   wgmma_fence(d);                       registers written before may be read and written by wgmma
//   wgmma<bf16>(d, a, b, accumulate);     once per K of an instruction, as many as wanted
//   wgmma_commit();                       closes the group
//   wgmma_wait<0>(d);                     until then: d untouched, operands in shared memory
//   unchanged
//
// K of an instruction is 32 bytes: 16 bf16 or f16, 8 tf32, 32 s8. bf16 and f16 operands lie K-major
// or MN-major, the others K-major. Every thread of the warpgroup makes the same calls with the same
// descriptors. Ordinary writes to an operand need fence_proxy_async() before the barrier that
// publishes them.
//
// The layouts (tests/emulator/layouts.h has the pictures) are unverified on hardware.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"
#include "core/cuda/swizzle.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#include "core/cuda/wgmma_shapes.h"

namespace warpformer::cuda {

/// The direction in which neighbours in memory lie: along K, or along M (of A) and N (of B).
enum class Major { k, mn };

/// Where an operand lies in shared memory.
struct Descriptor {
  uint64_t bits;
  /// The operand that starts so many bytes later (a multiple of 16). The start has the lowest bits;
  /// nothing carries into the upper word.
  DEVICE Descriptor operator+(int bytes) const {
    return {bits >> 32 << 32 | (uint32_t(bits) + (uint32_t(bytes) >> 4))};
  }
};

/// An operand that starts at `start`, in units of eight 16-byte chunks. `stride_bytes` leads from
/// one unit to the next across the direction of neighbours. `leading_bytes` leads from one span to
/// the next along it: K-major this matters without swizzle only, as from chunk to chunk. Without
/// swizzle, MN-major operands take the two the other way round. `base_offset` is 0 where the
/// swizzle's pattern starts at a multiple of 8 spans, else bits 7 to 9 of its start.
template <class T>
DEVICE Descriptor make_descriptor(Shared<T> start, int leading_bytes, int stride_bytes,
                                  Swizzle swizzle, int base_offset = 0) {
  int mode = swizzle == Swizzle::none       ? 0
             : swizzle == Swizzle::bytes128 ? 1
             : swizzle == Swizzle::bytes64  ? 2
                                            : 3;
  return {uint64_t((start.address() & 0x3ffff) >> 4) |
          uint64_t((uint32_t(leading_bytes) & 0x3ffff) >> 4) << 16 |
          uint64_t((uint32_t(stride_bytes) & 0x3ffff) >> 4) << 32 | uint64_t(base_offset) << 49 |
          uint64_t(mode) << 62};
}

/// Tells the compiler that the accumulators are in use here: it may neither move a read of them to
/// before this point nor a write to after it.
template <class D, int count>
DEVICE void hold([[maybe_unused]] D (&d)[count]) {
#ifndef WARPFORMER_EMULATED
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (std::is_array_v<D>) {
      hold(d[i]);
    } else if constexpr (std::is_same_v<D, float>) {
      asm volatile("" : "+f"(d[i])::"memory");
    } else {
      asm volatile("" : "+r"(d[i])::"memory");
    }
  }
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
// One asm statement for each width; the numbers are those of the operands after the accumulators.
// In PTX text the matrix types end with factors of +1 or -1 for the float ones and then, 2-byte
// ones only, with the majors.
#define WGMMA_SS(N, SHAPE, ACCUMULATOR, TAIL, a, b, c, e, f, ...)                             \
  if constexpr (n == N)                                                                       \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c                                      \
                 ", 0;\n"                                                                     \
                 "wgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" WGMMA_NAMES_##N            \
                 "}, %" #a ", %" #b ", p" TAIL(e, f) ";\n}"                                   \
                 : WGMMA_REGISTERS_##N(ACCUMULATOR)                                           \
                 : "l"(a_bits), "l"(b_bits), "r"(int(accumulate)), "n"(a_major), "n"(b_major) \
                 : "memory");
#define WGMMA_RS(N, SHAPE, ACCUMULATOR, TAIL, a0, a1, a2, a3, b, c, e)                            \
  if constexpr (n == N)                                                                           \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #c                                          \
                 ", 0;\n"                                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" WGMMA_NAMES_##N                \
                 "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b ", p" TAIL(e, e) ";\n}"      \
                 : WGMMA_REGISTERS_##N(ACCUMULATOR)                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_bits), "r"(int(accumulate)), \
                   "n"(b_major)                                                                   \
                 : "memory");
#define WGMMA_MAJORS(e, f) ", 1, 1, %" #e ", %" #f
#define WGMMA_MAJOR(e, f) ", 1, 1, %" #e
#define WGMMA_SIGNS(e, f) ", 1, 1"
#define WGMMA_PLAIN(e, f) ""

#define WGMMA_SS_BF16(N, ...) \
  WGMMA_SS(N, "k16.f32.bf16.bf16", WGMMA_FLOAT, WGMMA_MAJORS, __VA_ARGS__)
#define WGMMA_SS_F16(N, ...) WGMMA_SS(N, "k16.f32.f16.f16", WGMMA_FLOAT, WGMMA_MAJORS, __VA_ARGS__)
#define WGMMA_SS_TF32(N, ...) WGMMA_SS(N, "k8.f32.tf32.tf32", WGMMA_FLOAT, WGMMA_SIGNS, __VA_ARGS__)
#define WGMMA_SS_S8(N, ...) WGMMA_SS(N, "k32.s32.s8.s8", WGMMA_INT, WGMMA_PLAIN, __VA_ARGS__)
#define WGMMA_RS_BF16(N, ...) \
  WGMMA_RS(N, "k16.f32.bf16.bf16", WGMMA_FLOAT, WGMMA_MAJOR, __VA_ARGS__)
#define WGMMA_RS_F16(N, ...) WGMMA_RS(N, "k16.f32.f16.f16", WGMMA_FLOAT, WGMMA_MAJOR, __VA_ARGS__)
#define WGMMA_RS_TF32(N, ...) WGMMA_RS(N, "k8.f32.tf32.tf32", WGMMA_FLOAT, WGMMA_SIGNS, __VA_ARGS__)
#define WGMMA_RS_S8(N, ...) WGMMA_RS(N, "k32.s32.s8.s8", WGMMA_INT, WGMMA_PLAIN, __VA_ARGS__)

template <class T, int n, int a_major, int b_major>
DEVICE void wgmma_ss(auto& d, uint64_t a_bits, uint64_t b_bits, bool accumulate) {
  if constexpr (std::is_same_v<T, bf16>) {
    WGMMA_ALL_WIDTHS(WGMMA_SS_BF16)
  } else if constexpr (std::is_same_v<T, f16>) {
    WGMMA_ALL_WIDTHS(WGMMA_SS_F16)
  } else if constexpr (std::is_same_v<T, tf32>) {
    WGMMA_ALL_WIDTHS(WGMMA_SS_TF32)
  } else {
    WGMMA_EVEN_WIDTHS(WGMMA_SS_S8)
  }
}

template <class T, int n, int b_major>
DEVICE void wgmma_rs(auto& d, const uint32_t (&a)[4], uint64_t b_bits, bool accumulate) {
  if constexpr (std::is_same_v<T, bf16>) {
    WGMMA_ALL_WIDTHS(WGMMA_RS_BF16)
  } else if constexpr (std::is_same_v<T, f16>) {
    WGMMA_ALL_WIDTHS(WGMMA_RS_F16)
  } else if constexpr (std::is_same_v<T, tf32>) {
    WGMMA_ALL_WIDTHS(WGMMA_RS_TF32)
  } else {
    WGMMA_EVEN_WIDTHS(WGMMA_RS_S8)
  }
}
#endif

/// What the operand types allow.
template <class T, class D, int n, Major major>
DEVICE constexpr void check_wgmma() {
  constexpr bool half = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;
  constexpr bool integer = std::is_same_v<T, int8_t>;
  static_assert(half || integer || std::is_same_v<T, tf32>, "operands are bf16, f16, tf32 or s8");
  static_assert(std::is_same_v<D, std::conditional_t<integer, int32_t, float>>,
                "s8 accumulates in int32, everything else in float");
  static_assert(n % 8 == 0 && n >= 8 && n <= 256, "n is 8, 16 .. 256");
  static_assert(!integer || n <= 32 || n % 16 == 0, "n of s8 is 8, 16, 24, 32, 48, 64 .. 256");
  static_assert(half || major == Major::k, "only 2-byte operands may be MN-major");
}

/// d = a b + (accumulate ? d : 0), where d is this thread's part of the 64 x n tile, n = 2 count.
template <class T, Major a_major = Major::k, Major b_major = Major::k, class D, int count>
DEVICE void wgmma(D (&d)[count], Descriptor a, Descriptor b, bool accumulate, WHERE) {
  check_wgmma<T, D, 2 * count, a_major>();
  check_wgmma<T, D, 2 * count, b_major>();
#ifdef WARPFORMER_EMULATED
  emulator::wgmma({emulator::matrix_type<T>(), 2 * count, a_major == Major::mn,
                   b_major == Major::mn, accumulate, nullptr, a.bits, b.bits, d},
                  where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wgmma_ss<T, 2 * count, int(a_major), int(b_major)>(d, a.bits, b.bits, accumulate);
#else
  __trap();
#endif
}

/// The same with A in registers (a fragment of mma a warp, rows 16 warp and on), unchanged until
/// the wait.
template <class T, Major b_major = Major::k, class D, int count>
DEVICE void wgmma(D (&d)[count], const uint32_t (&a)[4], Descriptor b, bool accumulate, WHERE) {
  check_wgmma<T, D, 2 * count, b_major>();
#ifdef WARPFORMER_EMULATED
  emulator::wgmma({emulator::matrix_type<T>(), 2 * count, false, b_major == Major::mn, accumulate,
                   a, 0, b.bits, d},
                  where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wgmma_rs<T, 2 * count, int(b_major)>(d, a, b.bits, accumulate);
#else
  __trap();
#endif
}

/// Before the first wgmma of every group: orders it after all that was done to the registers of d,
/// one array of accumulators or an array of such, and of A.
template <class D, int count>
DEVICE void wgmma_fence(D (&d)[count], WHERE) {
  hold(d);
#ifdef WARPFORMER_EMULATED
  emulator::wgmma_fence(where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

/// Closes the group of the wgmmas since the last commit.
DEVICE void wgmma_commit(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::wgmma_commit(where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  __trap();
#endif
}

/// Waits until at most `pending` of the newest groups run. Those before have written d and no
/// longer read shared memory.
template <int pending, class D, int count>
DEVICE void wgmma_wait(D (&d)[count], WHERE) {
  static_assert(pending >= 0 && pending <= 7, "wgmma waits for all but 0 to 7 groups");
#ifdef WARPFORMER_EMULATED
  emulator::wgmma_wait(pending, where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#else
  __trap();
#endif
  hold(d);
}

/// Every warp of the warpgroup asks for more registers a thread (and waits until others have given
/// them back), or gives all above `count` back: a multiple of 8 from 24 to 256. The kernel must
/// name its blocks a multiprocessor, KERNEL(threads, min_blocks), or this does nothing.
template <int count>
DEVICE void increase_registers(WHERE) {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256,
                "registers: a multiple of 8, 24..256");
#ifdef WARPFORMER_EMULATED
  emulator::set_registers(count, true, where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
#else
  __trap();
#endif
}
template <int count>
DEVICE void decrease_registers(WHERE) {
  static_assert(count % 8 == 0 && count >= 24 && count <= 256,
                "registers: a multiple of 8, 24..256");
#ifdef WARPFORMER_EMULATED
  emulator::set_registers(count, false, where);
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
#else
  __trap();
#endif
}

}  // namespace warpformer::cuda
#endif

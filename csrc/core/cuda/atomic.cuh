// Atomics (relaxed), acquire and release, fences, and the one way to wait on memory.
#pragma once

#include <type_traits>

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"

namespace warpformer::cuda {

// ---- On global memory (T*) and shared memory (Shared<T>); T is int32_t, uint32_t or, for
// addition, uint64_t or, in global memory, float. Each returns the value before.

#ifdef WARPFORMER_EMULATED
/// Replaces *p by f(*p).
template <class T, class F>
T atomic_apply(T* p, const char* op, Where where, F f) {
  emulator::hand_over(op, where);
  emulator::global_access(emulator::Access::atomic, p, sizeof(T), alignof(T), op, where);
  const T before = *p;
  *p = f(before);
  return before;
}
template <class T, class F>
T atomic_apply(Shared<T> s, const char* op, Where where, F f) {
  T* p = reinterpret_cast<T*>(emulator::shared_access(emulator::Access::atomic, s.address(),
                                                      sizeof(T), alignof(T), op, where));
  const T before = *p;
  *p = f(before);
  return before;
}
#else
template <class T>
DEVICE auto* atomic_pointer(T* p) {
  __builtin_assume(__isGlobal(p));
  if constexpr (sizeof(T) == 8) {
    return reinterpret_cast<unsigned long long*>(p);  // the only 8-byte type of CUDA's atomics
  } else {
    return p;
  }
}
template <class T>
DEVICE auto* atomic_pointer(Shared<T> s) {
  using Value = std::conditional_t<sizeof(T) == 8, unsigned long long, T>;
  return static_cast<Value*>(__cvta_shared_to_generic(s.address()));
}
#endif

template <class T>
struct Pointee;
template <class T>
struct Pointee<T*> {
  using type = T;
};
template <class T>
struct Pointee<Shared<T>> {
  using type = T;
};
/// T of a T* or a Shared<T>.
template <class P>
using Value = typename Pointee<P>::type;

template <class P>
DEVICE Value<P> atomic_add(P p, std::type_identity_t<Value<P>> value, WHERE) {
#ifdef WARPFORMER_EMULATED
  return atomic_apply(p, "atomic_add", where, [=](auto before) { return before + value; });
#else
  return atomicAdd(atomic_pointer(p), value);
#endif
}
template <class P>
DEVICE Value<P> atomic_max(P p, std::type_identity_t<Value<P>> value, WHERE) {
#ifdef WARPFORMER_EMULATED
  return atomic_apply(p, "atomic_max", where, [=](auto b) { return b < value ? value : b; });
#else
  return atomicMax(atomic_pointer(p), value);
#endif
}
template <class P>
DEVICE Value<P> atomic_min(P p, std::type_identity_t<Value<P>> value, WHERE) {
#ifdef WARPFORMER_EMULATED
  return atomic_apply(p, "atomic_min", where, [=](auto b) { return value < b ? value : b; });
#else
  return atomicMin(atomic_pointer(p), value);
#endif
}
template <class P>
DEVICE Value<P> atomic_exchange(P p, std::type_identity_t<Value<P>> value, WHERE) {
#ifdef WARPFORMER_EMULATED
  return atomic_apply(p, "atomic_exchange", where, [=](auto) { return value; });
#else
  return atomicExch(atomic_pointer(p), value);
#endif
}
/// Stores `value` where *p is `expected`.
template <class P>
DEVICE Value<P> atomic_compare_exchange(P p, std::type_identity_t<Value<P>> expected,
                                        std::type_identity_t<Value<P>> value, WHERE) {
#ifdef WARPFORMER_EMULATED
  return atomic_apply(p, "atomic_compare_exchange", where,
                      [=](auto before) { return before == expected ? value : before; });
#else
  return atomicCAS(atomic_pointer(p), expected, value);
#endif
}

// ---- Additions to global memory whose result nobody needs

DEVICE void red_add(float* p, float value, WHERE) {
#ifdef WARPFORMER_EMULATED
  atomic_apply(p, "red_add", where, [=](float before) { return before + value; });
#else
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "f"(value)
               : "memory");
#endif
}
DEVICE void red_add(int32_t* p, int32_t value, WHERE) {
#ifdef WARPFORMER_EMULATED
  atomic_apply(p, "red_add", where, [=](int32_t before) { return before + value; });
#else
  asm volatile("red.relaxed.gpu.global.add.s32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
               "r"(value)
               : "memory");
#endif
}

/// Adds two neighbours, rounding each sum to nearest even: one access of 4 bytes, a multiple of 4.
template <class T>
DEVICE void red_add2(T* p, T low, T high, WHERE) {
  static_assert(std::is_same_v<T, f16> || std::is_same_v<T, bf16>);
#ifdef WARPFORMER_EMULATED
  emulator::hand_over("red_add2", where);
  emulator::global_access(emulator::Access::atomic, p, 4, 4, "red_add2", where);
  p[0] = from_float<T>(to_float(p[0]) + to_float(low));
  p[1] = from_float<T>(to_float(p[1]) + to_float(high));
#else
  const uint32_t both = low.bits | uint32_t{high.bits} << 16;
  if constexpr (std::is_same_v<T, f16>) {
    asm volatile(
        "red.relaxed.gpu.global.add.noftz.f16x2 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
        "r"(both)
        : "memory");
  } else {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "red.relaxed.gpu.global.add.noftz.bf16x2 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
        "r"(both)
        : "memory");
#else
    __trap();
#endif
  }
#endif
}

// ---- Between blocks, on global memory; T has 4 or 8 bytes

/// Reads *p; what its writer released is visible afterwards.
template <class T>
DEVICE T load_acquire(const T* p, WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#ifdef WARPFORMER_EMULATED
  emulator::hand_over("load_acquire", where);
  emulator::global_access(emulator::Access::read, p, sizeof(T), alignof(T), "load_acquire", where);
  return *p;
#else
  if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];"
                 : "=r"(bits)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    return bits_as<T>(bits);
  } else {
    uint64_t bits;
    asm volatile("ld.acquire.gpu.global.b64 %0, [%1];"
                 : "=l"(bits)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
    return bits_as<T>(bits);
  }
#endif
}
/// Writes *p after everything this thread has written.
template <class T>
DEVICE void store_release(T* p, std::type_identity_t<T> value, WHERE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
#ifdef WARPFORMER_EMULATED
  emulator::hand_over("store_release", where);
  emulator::global_access(emulator::Access::write, p, sizeof(T), alignof(T), "store_release",
                          where);
  *p = value;
#else
  if constexpr (sizeof(T) == 4) {
    asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
                 "r"(bits_as<uint32_t>(value))
                 : "memory");
  } else {
    asm volatile("st.release.gpu.global.b64 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
                 "l"(bits_as<uint64_t>(value))
                 : "memory");
  }
#endif
}
/// Waits until predicate(*p) holds for a value another block (resident at the same time) released,
/// and returns it: the one way to wait on memory.
template <class T, class Predicate>
DEVICE T spin_until(const T* p, Predicate predicate, WHERE) {
  for (;;) {
    const T value = load_acquire(p, where);
    if (predicate(value)) return value;
#ifdef WARPFORMER_EMULATED
    emulator::wait_for_write("spin_until", where);
#else
    __nanosleep(32);
#endif
  }
}

/// Orders this thread's accesses before and after it, for all threads of the GPU.
DEVICE void fence_gpu() {
#ifndef WARPFORMER_EMULATED
  __threadfence();
#endif
}
/// The same, for the threads of the block.
DEVICE void fence_block() {
#ifndef WARPFORMER_EMULATED
  __threadfence_block();
#endif
}

}  // namespace warpformer::cuda

// Shared and global memory, and the copies between them that need no registers (cp.async). Kernels
// dereference no pointer themselves: bounds, alignment and order of every access are checked in
// emulation.
#pragma once

#include <type_traits>

#include "core/cuda/thread.cuh"
#ifdef WARPFORMER_EMULATED
#include "emulator/wgmma.h"
#endif

namespace warpformer::cuda {

/// 16 bytes in registers: the widest access of one thread.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / static_cast<int>(sizeof(T));
  T values[size];
  DEVICE T& operator[](int i) { return values[i]; }
  DEVICE const T& operator[](int i) const { return values[i]; }
};

/// The same bits as another type of the same size.
template <class To, class From>
DEVICE To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

/// x, of which the compiler no longer knows where it comes from: it does not compute what follows
/// from it before a loop and keep all of that in registers.
template <class T>
DEVICE T opaque(T x) {
  static_assert(sizeof(T) == 4);
#ifndef WARPFORMER_EMULATED
  asm volatile("" : "+r"(x));
#endif
  return x;
}

#ifdef WARPFORMER_EMULATED
/// Accumulators of a wgmma in flight may not be stored.
template <class T>
void check_stored(const T& value, const char* op, Where where) {
  if constexpr (std::is_same_v<T, float>) emulator::check_value(value, op, where);
}
template <class T>
void check_stored(const Vector<T>& vector, const char* op, Where where) {
  for (const T& value : vector.values) check_stored(value, op, where);
}
#endif

/// What a global access leaves in the caches: `streaming` is used once, `read_only` is not written
/// while the kernel runs.
enum class Cache { normal, streaming, read_only };

// ---- Shared memory: one dynamic buffer, carved by byte offsets

/// A typed address in shared memory.
template <class T>
class Shared {
 public:
  DEVICE explicit Shared(uint32_t address) : address_(address) {}
  /// Of 32 bits, as ldmatrix, copies and barriers take it.
  DEVICE uint32_t address() const { return address_; }
  DEVICE Shared operator+(int n) const {
    return Shared(address_ + n * static_cast<int>(sizeof(T)));
  }
  template <class U>
  DEVICE Shared<U> as() const {
    return Shared<U>(address_);
  }

  DEVICE T load(int i = 0, WHERE) const { return access<T>(i, "load", where); }
  DEVICE void store(int i, T value, WHERE) const { assign(i, value, "store", where); }
  /// The 16 bytes from element i on; their address is a multiple of 16.
  DEVICE Vector<T> load16(int i = 0, WHERE) const { return access<Vector<T>>(i, "load16", where); }
  DEVICE void store16(int i, const Vector<T>& value, WHERE) const {
    assign(i, value, "store16", where);
  }

 private:
#ifndef WARPFORMER_EMULATED
  /// 16 bytes move as one uint4, whatever their type.
  template <class V>
  using Bits = std::conditional_t<sizeof(V) == 16, uint4, V>;
#endif
  template <class V>
  DEVICE V access(int i, const char* op, Where where) const {
#ifdef WARPFORMER_EMULATED
    return *reinterpret_cast<const V*>(emulator::shared_access(
        emulator::Access::read, (*this + i).address(), sizeof(V), alignof(V), op, where));
#else
    // By a value of its own: copied from a reference, it would be loaded byte by byte where the
    // compiler does not know the address to be a multiple of its size.
    const Bits<V> bits =
        *static_cast<const Bits<V>*>(__cvta_shared_to_generic((*this + i).address()));
    return bits_as<V>(bits);
#endif
  }
  template <class V>
  DEVICE void assign(int i, const V& value, const char* op, Where where) const {
#ifdef WARPFORMER_EMULATED
    check_stored(value, op, where);
    *reinterpret_cast<V*>(emulator::shared_access(emulator::Access::write, (*this + i).address(),
                                                  sizeof(V), alignof(V), op, where)) = value;
#else
    *static_cast<Bits<V>*>(__cvta_shared_to_generic((*this + i).address())) =
        bits_as<Bits<V>>(value);
#endif
  }

  uint32_t address_;
};

#ifndef WARPFORMER_EMULATED
extern __shared__ unsigned char dynamic_shared_memory[];
#endif

/// The block's shared memory from `byte_offset` on. It begins at a multiple of 16 bytes, no more.
template <class T>
DEVICE Shared<T> shared_memory(int byte_offset = 0) {
#ifdef WARPFORMER_EMULATED
  return Shared<T>(emulator::shared_base() + byte_offset);
#else
  return Shared<T>(static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared_memory)) +
                   byte_offset);
#endif
}

// ---- Global memory

template <class T>
DEVICE T load(const T* p, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::global_access(emulator::Access::read, p, sizeof(T), alignof(T), "load", where);
#else
  __builtin_assume(__isGlobal(p));
#endif
  return *p;
}
template <class T>
DEVICE void store(T* p, T value, WHERE) {
#ifdef WARPFORMER_EMULATED
  check_stored(value, "store", where);
  emulator::global_access(emulator::Access::write, p, sizeof(T), alignof(T), "store", where);
#else
  __builtin_assume(__isGlobal(p));
#endif
  *p = value;
}

/// 16 bytes at a multiple of 16.
template <class T>
DEVICE Vector<T> load16(const T* p, Cache cache = Cache::normal, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::global_access(emulator::Access::read, p, 16, 16, "load16", where);
  (void)cache;
  Vector<T> result;
  __builtin_memcpy(&result, p, 16);
  return result;
#else
  __builtin_assume(__isGlobal(p));
  const uint4* from = reinterpret_cast<const uint4*>(p);
  const uint4 bits = cache == Cache::read_only   ? __ldg(from)
                     : cache == Cache::streaming ? __ldcs(from)
                                                 : *from;
  return bits_as<Vector<T>>(bits);
#endif
}
template <class T>
DEVICE void store16(T* p, const Vector<T>& value, Cache cache = Cache::normal, WHERE) {
#ifdef WARPFORMER_EMULATED
  check_stored(value, "store16", where);
  emulator::global_access(emulator::Access::write, p, 16, 16, "store16", where);
  (void)cache;
  __builtin_memcpy(p, &value, 16);
#else
  __builtin_assume(__isGlobal(p));
  const uint4 bits = bits_as<uint4>(value);
  uint4* to = reinterpret_cast<uint4*>(p);
  if (cache == Cache::streaming) {
    __stcs(to, bits);
  } else {
    *to = bits;
  }
#endif
}

// ---- Asynchronous copies, global to shared. They land at copy_async_wait of the thread that
// issued them; other threads need a barrier after that.

/// Copies 16 bytes past L1; zeros where not `valid`, and then `from` is not read.
template <class T>
DEVICE void copy_async16(Shared<T> to, const T* from, bool valid = true, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::copy_async(to.address(), from, 16, valid, "copy_async16", where);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0)
               : "memory");
#endif
}
/// The same for 4 bytes, through L1.
template <class T>
DEVICE void copy_async4(Shared<T> to, const T* from, bool valid = true, WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::copy_async(to.address(), from, 4, valid, "copy_async4", where);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to.address()),
               "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0)
               : "memory");
#endif
}
/// Makes a group of the copies issued since the last one.
DEVICE void copy_async_commit(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::copy_async_commit(where);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits until at most the `groups` newest groups of this thread are in flight.
template <int groups>
DEVICE void copy_async_wait(WHERE) {
#ifdef WARPFORMER_EMULATED
  emulator::copy_async_wait(groups, where);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

}  // namespace warpformer::cuda

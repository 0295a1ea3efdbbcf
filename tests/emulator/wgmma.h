// Host bodies of wgmma.cuh.
#pragma once

#include <bit>

#include "emulator/matrix.h"

namespace warpformer::emulator {

struct Wgmma {
  MatrixType type;
  int n;
  bool a_mn_major, b_mn_major, accumulate;
  const uint32_t* a_registers;  // else A is in shared memory
  uint64_t a, b;                // descriptors
  void* d;                      // float[n / 2], of s8 int32_t[n / 2]
};
void wgmma(const Wgmma& operation, Where where);
void wgmma_fence(Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);
void set_registers(int count, bool increase, Where where);

/// What an accumulator holds from wgmma to wait: a NaN that arithmetic hands on.
constexpr uint32_t kInFlight = 0x7fc0acc0;

/// Fails where an accumulator is used too early.
inline void check_value(float value, const char* op, Where where) {
  if ((std::bit_cast<uint32_t>(value) & 0x7fffffff) == kInFlight) [[unlikely]]
    fail(op, where, "uses an accumulator before its wgmma_wait");
}

}  // namespace warpformer::emulator

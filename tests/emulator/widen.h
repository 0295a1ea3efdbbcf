// Operands of the matrix instructions as floats, eight registers at a time.
#pragma once

#include <cstdint>
#include <cstring>

#include "emulator/matrix.h"

namespace warpformer::emulator {

using F8 = float __attribute__((vector_size(32)));
using U8 = uint32_t __attribute__((vector_size(32)));
using I8 = int32_t __attribute__((vector_size(32)));

/// Compiles the function for AVX2 as well, to be chosen where the CPU has it. What it calls is
/// inlined.
#define FOR_EACH_CPU [[gnu::target_clones("avx2", "default"), gnu::optimize("O3"), gnu::flatten]]

template <class V>
inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store(void* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

/// f16 in the low half of each lane: the exponent moves by the factor 2^112, which makes subnormals
/// right as well; infinities and NaNs then get the exponent they lack.
inline F8 widen_f16(U8 bits) {
  const U8 sign = (bits & 0x8000) << 16;
  const F8 scaled = reinterpret_cast<F8>((bits & 0x7fff) << 13) * 0x1p112f;
  const U8 special = reinterpret_cast<U8>((bits & 0x7c00) == 0x7c00) & 0x7f800000;
  return reinterpret_cast<F8>(reinterpret_cast<U8>(scaled) | special | sign);
}

/// Element `i` of each register.
template <MatrixType type>
inline F8 widen(U8 bits, int i) {
  if constexpr (type == MatrixType::bf16) {
    return reinterpret_cast<F8>(i ? bits & 0xffff0000 : bits << 16);
  } else if constexpr (type == MatrixType::f16) {
    return widen_f16(i ? bits >> 16 : bits & 0xffff);
  } else if constexpr (type == MatrixType::tf32) {
    return reinterpret_cast<F8>(bits & 0xffffe000);
  } else {
    return __builtin_convertvector(reinterpret_cast<I8>(bits << (24 - 8 * i)) >> 24, F8);
  }
}

}  // namespace warpformer::emulator

// Functions of float and conversions of the 2-byte types. The _approx functions are one instruction
// on the device, within the PTX manual's bounds, and flush subnormals to zero (tanh_approx
// excepted); their host bodies are exact. All others are CUDA's accurate functions.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "core/cuda/thread.cuh"

#ifdef WARPFORMER_EMULATED
#include "emulator/wgmma.h"
#endif

namespace warpformer::cuda {

/// Names the tf32 format where a type is asked for: a float of which the low 13 bits are not read.
struct tf32 {
  uint32_t bits;
};

#ifdef WARPFORMER_EMULATED
inline float flush(double x) {
  const float y = static_cast<float>(x);
  return std::fabs(y) < 0x1p-126f ? std::copysign(0.0f, y) : y;
}
#endif

/// 2^x, relative error below 2^-22.
DEVICE float exp2_approx(float x) {
#ifdef WARPFORMER_EMULATED
  return flush(std::exp2(static_cast<double>(flush(x))));
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// log2 x, error below 2^-22: absolute for x in 0.5..2, relative elsewhere.
DEVICE float log2_approx(float x) {
#ifdef WARPFORMER_EMULATED
  return flush(std::log2(static_cast<double>(flush(x))));
#else
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// 1 / x, relative error below 2^-23.
DEVICE float rcp_approx(float x) {
#ifdef WARPFORMER_EMULATED
  return flush(1 / static_cast<double>(flush(x)));
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// 1 / sqrt x, relative error below 2^-22.9.
DEVICE float rsqrt_approx(float x) {
#ifdef WARPFORMER_EMULATED
  return flush(1 / std::sqrt(static_cast<double>(flush(x))));
#else
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
/// tanh x, relative error below 2^-11.
DEVICE float tanh_approx(float x) {
#ifdef WARPFORMER_EMULATED
  return static_cast<float>(std::tanh(static_cast<double>(x)));
#else
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- Accurate: within 2 ulp; fma, sqrt and rsqrt are rounded correctly

DEVICE float exp(float x) { return ::expf(x); }
DEVICE float log(float x) { return ::logf(x); }
DEVICE float log1p(float x) { return ::log1pf(x); }
DEVICE float erf(float x) { return ::erff(x); }
DEVICE float tanh(float x) { return ::tanhf(x); }
DEVICE float sqrt(float x) { return ::sqrtf(x); }
DEVICE float rsqrt(float x) {
#ifdef WARPFORMER_EMULATED
  return static_cast<float>(1 / std::sqrt(static_cast<double>(x)));
#else
  return __frsqrt_rn(x);
#endif
}
DEVICE float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
DEVICE float abs(float x) { return ::fabsf(x); }
/// The other argument where one is NaN.
DEVICE float max(float a, float b) { return ::fmaxf(a, b); }
DEVICE float min(float a, float b) { return ::fminf(a, b); }

// ---- Conversions, to nearest even; a NaN becomes 0x7fff

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) {
#ifdef WARPFORMER_EMULATED
  return std::bit_cast<float>(uint32_t{x.bits} << 16);
#else
  return __uint_as_float(uint32_t{x.bits} << 16);
#endif
}
DEVICE float to_float(f16 x) {
#ifdef WARPFORMER_EMULATED
  return static_cast<float>(std::bit_cast<_Float16>(x.bits));
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#endif
}

DEVICE bool is_finite(float x) { return abs(x) <= __FLT_MAX__; }
DEVICE bool is_finite(bf16 x) { return (x.bits & 0x7f80) != 0x7f80; }
DEVICE bool is_finite(f16 x) { return (x.bits & 0x7c00) != 0x7c00; }

/// T is float, bf16 or f16.
template <class T>
DEVICE T from_float(float x, WHERE) {
  static_assert(std::is_same_v<T, float> || std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#ifdef WARPFORMER_EMULATED
  emulator::check_value(x, "from_float", where);
#endif
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    uint16_t bits;
#ifdef WARPFORMER_EMULATED
    const uint32_t wide = std::bit_cast<uint32_t>(x);
    if (x != x) {
      bits = 0x7fff;
    } else if constexpr (std::is_same_v<T, bf16>) {
      bits = static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
    } else {
      bits = std::bit_cast<uint16_t>(static_cast<_Float16>(x));
    }
#else
    if constexpr (std::is_same_v<T, bf16>) {
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    } else {
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    }
#endif
    return T{bits};
  }
}

/// Two bf16 or f16 in a register, `low` in its low half.
template <class T>
DEVICE uint32_t pack2(float low, float high, WHERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#ifdef WARPFORMER_EMULATED
  return from_float<T>(low, where).bits | uint32_t{from_float<T>(high, where).bits} << 16;
#else
  uint32_t both;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  }
  return both;
#endif
}
template <class T>
DEVICE void unpack2(uint32_t both, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(both)});
  high = to_float(T{static_cast<uint16_t>(both >> 16)});
}

/// Sums of the two numbers of each register.
template <class T>
DEVICE uint32_t add2(uint32_t a, uint32_t b, WHERE) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, f16>);
#ifdef WARPFORMER_EMULATED
  float a_low, a_high, b_low, b_high;
  unpack2<T>(a, a_low, a_high);
  unpack2<T>(b, b_low, b_high);
  return pack2<T>(a_low + b_low, a_high + b_high, where);
#else
  uint32_t sum;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(0x3f803f80), "r"(b));
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sum) : "r"(a), "r"(b));
  }
  return sum;
#endif
}

/// (x & mask) ^ bits in one instruction: given two constants, the compiler would make two of it.
template <uint32_t mask, uint32_t bits>
DEVICE uint32_t mask_xor(uint32_t x) {
#ifdef WARPFORMER_EMULATED
  return (x & mask) ^ bits;
#else
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
#endif
}

/// The nearest tf32, ties away from zero.
DEVICE uint32_t to_tf32(float x) {
#ifdef WARPFORMER_EMULATED
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return x != x || std::isinf(x) ? bits : (bits + 0x1000) & ~0x1fffu;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#endif
}

}  // namespace warpformer::cuda

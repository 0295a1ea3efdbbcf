// Vec: a register of floats, and the few operations the CPU kernels are written in. One section per
// register width; kernels say Vec and are compiled once per ISA (WF_ISA names the namespace).
//
//   load(p) load(p, n)      f32, bf16, f16 or int8 in memory, the first n lanes and 0 in the others
//   store(p, v) store(p, v, n)     rounds to nearest even
//   stream(p, v)            store past the caches; p is a multiple of what it writes
//   fma(a, b, c) = a * b + c       the product is not rounded
//
// Only C headers and plain functions here: what the linker could merge across ISAs would put AVX
// code into files that must run everywhere.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "core/types.h"

#define WF_INLINE inline __attribute__((always_inline))

namespace warpformer::cpu::WF_ISA {

WF_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

#if defined(__AVX512F__)

struct Vec {
  static constexpr int kWidth = 16;
  __m512 v;
};
WF_INLINE Vec set(float f) { return {_mm512_set1_ps(f)}; }
WF_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
WF_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
WF_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
WF_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
WF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max and min of every section return their second operand where either is NaN, as the instructions
// do.
WF_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
WF_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
WF_INLINE Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
WF_INLINE Vec round(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
/// a * 2^n for integral n.
WF_INLINE Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
/// Lane by lane: a < b ? yes : no.
WF_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
/// Lane by lane: chosen ? yes : no.
WF_INLINE Vec where(const bool* chosen, Vec yes, Vec no) {
  const __m128i bytes = _mm_loadu_si128((const __m128i*)chosen);
  return {_mm512_mask_blend_ps(_mm_test_epi8_mask(bytes, bytes), no.v, yes.v)};
}
WF_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  const __m512i bit = _mm512_set1_epi32(INT32_MIN);  // 0xCA: sign where the bit is set
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign.v),
                                                        _mm512_castps_si512(magnitude.v), 0xCA))};
}
/// Lanes 0 and 1 exchanged, 2 and 3, and so on.
WF_INLINE Vec swap_neighbours(Vec a) { return {_mm512_permute_ps(a.v, 0xB1)}; }
WF_INLINE float sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
WF_INLINE float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }

WF_INLINE __mmask16 lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
WF_INLINE Vec widen(__m256i half) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
WF_INLINE __m256i narrow(Vec v) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormals (class 0x20) for 0: those, which are rare, go the long way.
  if (__builtin_expect(!_mm512_fpclass_ps_mask(v.v, 0x20), true))
    return (__m256i)_mm512_cvtneps_pbh(v.v);
#endif
  const __m512i u = _mm512_castps_si512(v.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v.v, v.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_set1_epi32(0x400000);  // a NaN, never infinity
  return _mm512_cvtepi32_epi16(
      _mm512_srli_epi32(_mm512_mask_or_epi32(rounded, is_nan, u, quiet), 16));
}
WF_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
WF_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
WF_INLINE Vec load(const bf16* p) { return widen(_mm256_loadu_si256((const __m256i*)p)); }
WF_INLINE Vec load(const bf16* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(lanes(n), p));
}
WF_INLINE Vec load(const f16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))};
}
WF_INLINE Vec load(const f16* p, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(n), p))};
}
WF_INLINE Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
WF_INLINE Vec load(const int8_t* p, int64_t n) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes(n), p)))};
}
WF_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v.v); }
WF_INLINE void store(float* p, Vec v, int64_t n) { _mm512_mask_storeu_ps(p, lanes(n), v.v); }
WF_INLINE void store(bf16* p, Vec v) { _mm256_storeu_si256((__m256i*)p, narrow(v)); }
WF_INLINE void store(bf16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes(n), narrow(v));
}
WF_INLINE void store(f16* p, Vec v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}
WF_INLINE void store(f16* p, Vec v, int64_t n) {
  _mm256_mask_storeu_epi16(p, lanes(n), _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}
WF_INLINE void stream(float* p, Vec v) { _mm512_stream_ps(p, v.v); }
WF_INLINE void stream(bf16* p, Vec v) { _mm256_stream_si256((__m256i*)p, narrow(v)); }
WF_INLINE void stream(f16* p, Vec v) {
  _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}

#else

#if defined(__AVX2__)

struct Vec {
  static constexpr int kWidth = 8;
  __m256 v;
};
WF_INLINE Vec set(float f) { return {_mm256_set1_ps(f)}; }
WF_INLINE Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
WF_INLINE Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
WF_INLINE Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
WF_INLINE Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
WF_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
WF_INLINE Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
WF_INLINE Vec min(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
WF_INLINE Vec abs(Vec a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
WF_INLINE Vec round(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
WF_INLINE Vec scale_by_power(Vec a, Vec n) {
  // Two factors, because 2^n alone is out of range where the result is a denormal or near infinity.
  const __m256i i = _mm256_cvtps_epi32(n.v);
  const __m256i half = _mm256_srai_epi32(i, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i p = _mm256_slli_epi32(_mm256_add_epi32(half, bias), 23);
  const __m256i q = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, half), bias), 23);
  return {_mm256_mul_ps(_mm256_mul_ps(a.v, _mm256_castsi256_ps(p)), _mm256_castsi256_ps(q))};
}
WF_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
  return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
WF_INLINE Vec where(const bool* chosen, Vec yes, Vec no) {
  const __m256i words = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)chosen));
  const __m256i none = _mm256_cmpeq_epi32(words, _mm256_setzero_si256());
  return {_mm256_blendv_ps(yes.v, no.v, _mm256_castsi256_ps(none))};
}
WF_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  const __m256 bit = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_and_ps(bit, sign.v), _mm256_andnot_ps(bit, magnitude.v))};
}
WF_INLINE Vec swap_neighbours(Vec a) { return {_mm256_permute_ps(a.v, 0xB1)}; }
WF_INLINE float sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
WF_INLINE float max_lane(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
WF_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
WF_INLINE Vec load(const bf16* p) {
  const __m256i u = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))};
}
WF_INLINE Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
WF_INLINE Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
WF_INLINE __m128i narrow(Vec v) {
  const __m256i u = _mm256_castps_si256(v.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256 is_nan = _mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q);
  const __m256i word =
      _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(is_nan)), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(word, word), 0x08);
  return _mm256_castsi256_si128(packed);
}
WF_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v.v); }
WF_INLINE void store(bf16* p, Vec v) { _mm_storeu_si128((__m128i*)p, narrow(v)); }
WF_INLINE void store(f16* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}
WF_INLINE void stream(float* p, Vec v) { _mm256_stream_ps(p, v.v); }
WF_INLINE void stream(bf16* p, Vec v) { _mm_stream_si128((__m128i*)p, narrow(v)); }
WF_INLINE void stream(f16* p, Vec v) {
  _mm_stream_si128((__m128i*)p, _mm256_cvtps_ph(v.v, _MM_FROUND_TO_NEAREST_INT));
}

#else  // any CPU: four lanes in the compiler's portable vectors (SSE2, NEON, ...)

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));
typedef double Double4 __attribute__((vector_size(32)));

struct Vec {
  static constexpr int kWidth = 4;
  Float4 v;
};
WF_INLINE Vec set(float f) { return {Float4{f, f, f, f}}; }
WF_INLINE Vec operator+(Vec a, Vec b) { return {a.v + b.v}; }
WF_INLINE Vec operator-(Vec a, Vec b) { return {a.v - b.v}; }
WF_INLINE Vec operator*(Vec a, Vec b) { return {a.v * b.v}; }
WF_INLINE Vec operator/(Vec a, Vec b) { return {a.v / b.v}; }
/// Through double, which holds the product exactly: the results are as exact as with FMA hardware.
WF_INLINE Vec fma(Vec a, Vec b, Vec c) {
  const Double4 product =
      __builtin_convertvector(a.v, Double4) * __builtin_convertvector(b.v, Double4);
  return {__builtin_convertvector(product + __builtin_convertvector(c.v, Double4), Float4)};
}
WF_INLINE Vec max(Vec a, Vec b) { return {a.v > b.v ? a.v : b.v}; }
WF_INLINE Vec min(Vec a, Vec b) { return {a.v < b.v ? a.v : b.v}; }
WF_INLINE Vec abs(Vec a) { return {(Float4)((Int4)a.v & INT32_MAX)}; }
/// |a| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
WF_INLINE Vec round(Vec a) { return {(a.v + 0x1.8p23f) - 0x1.8p23f}; }
WF_INLINE Vec scale_by_power(Vec a, Vec n) {
  const Int4 i = __builtin_convertvector(n.v, Int4), half = i >> 1;
  return {a.v * (Float4)((half + 127) << 23) * (Float4)((i - half + 127) << 23)};
}
WF_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) { return {a.v < b.v ? yes.v : no.v}; }
WF_INLINE Vec where(const bool* chosen, Vec yes, Vec no) {
  const Int4 lanes = {chosen[0], chosen[1], chosen[2], chosen[3]};
  return {lanes != 0 ? yes.v : no.v};
}
WF_INLINE Vec copy_sign(Vec magnitude, Vec sign) {
  return {(Float4)(((Int4)magnitude.v & INT32_MAX) | ((Int4)sign.v & INT32_MIN))};
}
WF_INLINE Vec swap_neighbours(Vec a) { return {Float4{a.v[1], a.v[0], a.v[3], a.v[2]}}; }
WF_INLINE float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
WF_INLINE float max_lane(Vec a) {
  const float low = a.v[0] > a.v[2] ? a.v[0] : a.v[2], high = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return low > high ? low : high;
}

WF_INLINE uint32_t bits_of(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}
WF_INLINE float float_of(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}
WF_INLINE float widen(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
WF_INLINE float widen(f16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, rest = value.bits & 0x7FFFu;
  if (rest >= 0x7C00u) return float_of(sign | 0x7F800000u | (rest & 0x3FFu) << 13);
  const float magnitude =
      rest < 0x400u ? static_cast<float>(rest) * 0x1p-24f : float_of((rest << 13) + (112u << 23));
  return sign ? -magnitude : magnitude;
}
WF_INLINE void narrow(float f, bf16* to) {
  const uint32_t u = bits_of(f);
  const uint32_t rounded = f == f ? u + 0x7FFFu + (u >> 16 & 1u) : u | 0x400000u;
  to->bits = static_cast<uint16_t>(rounded >> 16);
}
WF_INLINE void narrow(float f, f16* to) {
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000u, rest = u & 0x7FFFFFFFu;
  uint32_t half;
  if (rest > 0x7F800000u) {
    half = 0x7E00u | (rest >> 13 & 0x3FFu);
  } else if (rest >= 0x477FF000u) {  // rounds to 65536 or more
    half = 0x7C00u;
  } else if (rest < 0x38800000u) {  // a denormal half: the float adder rounds it into place
    half = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);
  } else {
    half = (rest + 0xFFFu + (rest >> 13 & 1u) - (112u << 23)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}
WF_INLINE Vec load(const float* p) {
  Vec v;
  memcpy(&v.v, p, sizeof v.v);
  return v;
}
WF_INLINE void store(float* p, Vec v) { memcpy(p, &v.v, sizeof v.v); }
WF_INLINE Vec load(const int8_t* p) {
  return {Float4{float(p[0]), float(p[1]), float(p[2]), float(p[3])}};
}
template <class Half>
WF_INLINE Vec load(const Half* p) {
  return {Float4{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])}};
}
template <class Half>
WF_INLINE void store(Half* p, Vec v) {
  for (int i = 0; i < 4; ++i) narrow(v.v[i], p + i);
}
template <class T>
WF_INLINE void stream(T* p, Vec v) {
  store(p, v);
}

#endif

template <class T>
WF_INLINE Vec load(const T* p, int64_t n) {
  T lanes[Vec::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
WF_INLINE void store(T* p, Vec v, int64_t n) {
  T lanes[Vec::kWidth];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

#endif  // register width

/// One element, for strided access. A register that is stored whole and read in part stalls: where
/// bits suffice, none is used.
template <class T>
WF_INLINE float to_float(T value) {
  if constexpr (__is_same(T, float)) {
    return value;
  } else if constexpr (__is_same(T, bf16)) {
    return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16);
  } else {
    float lane;
    store(&lane, load(&value, 1), 1);
    return lane;
  }
}
template <class T>
WF_INLINE T from_float(float f) {
  if constexpr (__is_same(T, float)) return f;
  T value;
  store(&value, set(f), 1);
  return value;
}

/// How many lanes of a register are in use: all of them, known to the compiler, or the first n.
struct Full {};
struct Tail {
  int64_t n;
};
template <class T>
WF_INLINE Vec load(const T* p, Full) {
  return load(p);
}
template <class T>
WF_INLINE Vec load(const T* p, Tail tail) {
  return load(p, tail.n);
}
/// As load, with `other` in the lanes past the end.
WF_INLINE Vec load_or(const float* p, Full, float) { return load(p); }
WF_INLINE Vec load_or(const float* p, Tail tail, float other) {
#if defined(__AVX512F__)
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(other), lanes(tail.n), p)};
#else
  float lanes[Vec::kWidth];
  store(lanes, set(other));
  for (int64_t i = 0; i < tail.n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}
/// v, with 0 in the lanes past the end.
WF_INLINE Vec keep(Vec v, Full) { return v; }
WF_INLINE Vec keep(Vec v, Tail tail) {
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(lanes(tail.n), v.v)};
#else
  float kept[Vec::kWidth];
  store(kept, v);
  return load(kept, tail.n);
#endif
}
/// v, with `other` in the lanes past the end.
WF_INLINE Vec pad(Vec v, Full, float) { return v; }
WF_INLINE Vec pad(Vec v, Tail tail, float other) {
#if defined(__AVX512F__)
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), lanes(tail.n), v.v)};
#else
  float padded[Vec::kWidth];
  store(padded, v);
  return load_or(padded, tail, other);
#endif
}
WF_INLINE Vec where(const bool* chosen, Full, Vec yes, Vec no) { return where(chosen, yes, no); }
WF_INLINE Vec where(const bool* chosen, Tail tail, Vec yes, Vec no) {
  bool lanes[Vec::kWidth] = {};
  for (int64_t i = 0; i < tail.n; ++i) lanes[i] = chosen[i];
  return where(lanes, yes, no);
}
template <class T>
WF_INLINE void store(T* p, Vec v, Full) {
  store(p, v);
}
template <class T>
WF_INLINE void store(T* p, Vec v, Tail tail) {
  store(p, v, tail.n);
}
/// Where not all lanes are in use, p need not be at any multiple.
template <class T>
WF_INLINE void stream(T* p, Vec v, Full) {
  stream(p, v);
}
template <class T>
WF_INLINE void stream(T* p, Vec v, Tail tail) {
  store(p, v, tail.n);
}

/// Makes what this thread has streamed visible, in its order, to others.
WF_INLINE void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

/// Calls f(i, lanes) over [0, n), register by register: f(i, Full) for whole ones, f(i, Tail) last.
template <class F>
WF_INLINE void for_lanes(int64_t n, const F& f) {
  int64_t i = 0;
  // Four at a time, as many as Sum has chains. One call, which the compiler so always inlines.
  while (i + Vec::kWidth <= n) {
#pragma GCC unroll 4
    for (int j = 0; j < 4 && i + Vec::kWidth <= n; ++j, i += Vec::kWidth) f(i, Full{});
  }
  if (i < n) f(i, Tail{n - i});
}

/// for_lanes that calls f(i, Full) only where p + i is at a multiple of a whole register's
/// elements, as `stream` needs it.
template <class T, class F>
WF_INLINE void for_aligned_lanes(const T* p, int64_t n, const F& f) {
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % Vec::kWidth);
  const int64_t first = past == 0 ? 0 : Vec::kWidth - past < n ? Vec::kWidth - past : n;
  if (first > 0) f(0, Tail{first});
  int64_t i = first;
  for (; i + Vec::kWidth <= n; i += Vec::kWidth) f(i, Full{});
  if (i < n) f(i, Tail{n - i});
}

/// A sum of registers in four interleaved chains: a long chain of additions rounds more, and waits
/// for each one. Zeros at the end change no bit of it.
struct Sum {
  Vec chain[4] = {set(0.0f), set(0.0f), set(0.0f),
                  set(0.0f)};  // chain[0] is the next one to add to
  int added = 0;
  WF_INLINE void add(Vec v) {
    // The chains move on instead of an index, which would keep them in memory.
    const Vec first = chain[0] + v;
    chain[0] = chain[1];
    chain[1] = chain[2];
    chain[2] = chain[3];
    chain[3] = first;
    ++added;
  }
  WF_INLINE Vec lanes() {
    while (added % 4 != 0) add(set(0.0f));
    return (chain[0] + chain[1]) + (chain[2] + chain[3]);
  }
  WF_INLINE float total() { return sum(lanes()); }
};

// exp(x) = 2^n e^r, n = round(x / ln 2), r = x - n ln 2; e^r by a minimax polynomial on
// |r| <= ln(2) / 2, relative error 2e-9 before rounding.
WF_INLINE Vec power_times_exp(Vec n, Vec r) {
  Vec p = set(0.00139561f);
  p = fma(p, r, set(0.00837513f));
  p = fma(p, r, set(0.04166608f));
  p = fma(p, r, set(0.16666415f));
  p = fma(p, r, set(0.50000002f));
  p = fma(p, r, set(1.0f));
  p = fma(p, r, set(1.0f));
  return scale_by_power(p, n);
}
WF_INLINE Vec exp(Vec x) {
  const Vec bounded = min(set(89.0f), max(set(-104.0f), x));  // NaN stays: it is the second operand
  const Vec n = round(bounded * set(1.44269504f));
  return power_times_exp(n, fma(n, set(2.12194440e-4f), fma(n, set(-0.693359375f), bounded)));
}
/// exp(x) of a probability, x <= 0, in fewer instructions: the error grows by 2e-9 |x|, which is
/// below the rounding where the result counts beside a 1.
WF_INLINE Vec exp_negative(Vec x) {
  const Vec bounded = max(set(-104.0f), x);
  const Vec n = round(bounded * set(1.44269504f));
  return power_times_exp(n, fma(n, set(-0.693147182f), bounded));
}

// tanh(x): x + x^3 P(x^2) where |x| < 0.625, else 1 - 2 / (e^2|x| + 1).
WF_INLINE Vec tanh(Vec x) {
  const Vec a = abs(x), square = x * x;
  Vec p = set(0.00229894f);
  p = fma(p, square, set(-0.00835001f));
  p = fma(p, square, set(0.021771f));
  p = fma(p, square, set(-0.05395955f));
  p = fma(p, square, set(0.13333305f));
  p = fma(p, square, set(-0.33333333f));
  const Vec small = fma(p * square, x, x);
  const Vec large = set(1.0f) - set(2.0f) / (exp(a + a) + set(1.0f));
  return where_less(a, set(0.625f), small, copy_sign(large, x));
}

}  // namespace warpformer::cpu::WF_ISA

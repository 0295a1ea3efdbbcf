// Ints: a register of int32 as wide as a Vec, and the few operations of integer products. Included
// by cpu files only.
#pragma once

#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

#if defined(__AVX512F__)

struct Ints {
  __m512i v;
};
WF_INLINE Ints set(int32_t i) { return {_mm512_set1_epi32(i)}; }
WF_INLINE Ints load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
WF_INLINE Ints load(const int16_t* p) {
  return {_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)p))};
}
WF_INLINE void store(int32_t* p, Ints i) { _mm512_storeu_si512(p, i.v); }
WF_INLINE Vec to_float(Ints i) { return {_mm512_cvtepi32_ps(i.v)}; }
WF_INLINE Vec bits_as_float(Ints i) { return {_mm512_castsi512_ps(i.v)}; }
WF_INLINE Ints bits_of(Vec v) { return {_mm512_castps_si512(v.v)}; }
WF_INLINE Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
WF_INLINE Ints operator^(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
WF_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
WF_INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
WF_INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
WF_INLINE Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
WF_INLINE int32_t max_lane(Ints a) { return _mm512_reduce_max_epi32(a.v); }
template <int kBits>
WF_INLINE Ints shift_right(Ints a) {  // zeros come in
  return {_mm512_srli_epi32(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_right_signed(Ints a) {  // copies of the sign do
  return {_mm512_srai_epi32(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_left(Ints a) {
  return {_mm512_slli_epi32(a.v, kBits)};
}
/// Per 16 bits; to the right, copies of the sign come in.
template <int kBits>
WF_INLINE Ints shift_left_halves(Ints a) {
  return {_mm512_slli_epi16(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_right_halves(Ints a) {
  return {_mm512_srai_epi16(a.v, kBits)};
}
WF_INLINE Ints subtract_halves(Ints a, Ints b) { return {_mm512_sub_epi16(a.v, b.v)}; }
/// sum + a.even b.even + a.odd b.odd, of 16-bit halves.
WF_INLINE Ints add_products_of_halves(Ints a, Ints b, Ints sum) {
  return {_mm512_add_epi32(sum.v, _mm512_madd_epi16(a.v, b.v))};
}
/// sum + a.even b.even + a.odd b.odd in 16 bits, of the bytes of both halves; a has no sign.
WF_INLINE Ints add_products_of_bytes(Ints a, Ints b, Ints sum) {
  return {_mm512_add_epi16(sum.v, _mm512_maddubs_epi16(a.v, b.v))};
}
/// The lanes of v, which are integral and in [-128, 127].
WF_INLINE void store_bytes(int8_t* p, Vec v) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
}

#elif defined(__AVX2__)

struct Ints {
  __m256i v;
};
WF_INLINE Ints set(int32_t i) { return {_mm256_set1_epi32(i)}; }
WF_INLINE Ints load(const int32_t* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
WF_INLINE Ints load(const int16_t* p) {
  return {_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)p))};
}
WF_INLINE void store(int32_t* p, Ints i) { _mm256_storeu_si256((__m256i*)p, i.v); }
WF_INLINE Vec to_float(Ints i) { return {_mm256_cvtepi32_ps(i.v)}; }
WF_INLINE Vec bits_as_float(Ints i) { return {_mm256_castsi256_ps(i.v)}; }
WF_INLINE Ints bits_of(Vec v) { return {_mm256_castps_si256(v.v)}; }
WF_INLINE Ints operator&(Ints a, Ints b) { return {_mm256_and_si256(a.v, b.v)}; }
WF_INLINE Ints operator^(Ints a, Ints b) { return {_mm256_xor_si256(a.v, b.v)}; }
WF_INLINE Ints operator+(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
WF_INLINE Ints operator-(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
WF_INLINE Ints operator*(Ints a, Ints b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
WF_INLINE Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
WF_INLINE int32_t max_lane(Ints a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xB1)));
}
template <int kBits>
WF_INLINE Ints shift_right(Ints a) {
  return {_mm256_srli_epi32(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_right_signed(Ints a) {
  return {_mm256_srai_epi32(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_left(Ints a) {
  return {_mm256_slli_epi32(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_left_halves(Ints a) {
  return {_mm256_slli_epi16(a.v, kBits)};
}
template <int kBits>
WF_INLINE Ints shift_right_halves(Ints a) {
  return {_mm256_srai_epi16(a.v, kBits)};
}
WF_INLINE Ints subtract_halves(Ints a, Ints b) { return {_mm256_sub_epi16(a.v, b.v)}; }
WF_INLINE Ints add_products_of_halves(Ints a, Ints b, Ints sum) {
  return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, b.v))};
}
WF_INLINE Ints add_products_of_bytes(Ints a, Ints b, Ints sum) {
  return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(a.v, b.v))};
}
WF_INLINE void store_bytes(int8_t* p, Vec v) {
  const __m256i i = _mm256_cvtps_epi32(v.v);
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(halves, halves));
}

#else

typedef int16_t Short8 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));

struct Ints {
  Int4 v;
};
WF_INLINE Ints set(int32_t i) { return {Int4{i, i, i, i}}; }
WF_INLINE Ints load(const int32_t* p) {
  Ints i;
  memcpy(&i.v, p, sizeof i.v);
  return i;
}
WF_INLINE Ints load(const int16_t* p) { return {Int4{p[0], p[1], p[2], p[3]}}; }
WF_INLINE void store(int32_t* p, Ints i) { memcpy(p, &i.v, sizeof i.v); }
WF_INLINE Vec to_float(Ints i) { return {__builtin_convertvector(i.v, Float4)}; }
WF_INLINE Vec bits_as_float(Ints i) { return {(Float4)i.v}; }
WF_INLINE Ints bits_of(Vec v) { return {(Int4)v.v}; }
WF_INLINE Ints operator&(Ints a, Ints b) { return {a.v & b.v}; }
WF_INLINE Ints operator^(Ints a, Ints b) { return {a.v ^ b.v}; }
WF_INLINE Ints operator+(Ints a, Ints b) { return {a.v + b.v}; }
WF_INLINE Ints operator-(Ints a, Ints b) { return {a.v - b.v}; }
WF_INLINE Ints operator*(Ints a, Ints b) { return {a.v * b.v}; }
WF_INLINE Ints max(Ints a, Ints b) { return {a.v > b.v ? a.v : b.v}; }
WF_INLINE int32_t max_lane(Ints a) {
  const int32_t low = a.v[0] > a.v[2] ? a.v[0] : a.v[2], high = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return low > high ? low : high;
}
template <int kBits>
WF_INLINE Ints shift_right(Ints a) {
  return {(Int4)((Word4)a.v >> kBits)};
}
template <int kBits>
WF_INLINE Ints shift_right_signed(Ints a) {
  return {a.v >> kBits};
}
template <int kBits>
WF_INLINE Ints shift_left(Ints a) {
  return {a.v << kBits};
}
template <int kBits>
WF_INLINE Ints shift_left_halves(Ints a) {
  return {(Int4)((Short8)a.v << kBits)};
}
template <int kBits>
WF_INLINE Ints shift_right_halves(Ints a) {
  return {(Int4)((Short8)a.v >> kBits)};
}
WF_INLINE Ints subtract_halves(Ints a, Ints b) { return {(Int4)((Short8)a.v - (Short8)b.v)}; }
WF_INLINE Ints add_products_of_halves(Ints a, Ints b, Ints sum) {
#if defined(__SSE2__)
  typedef long long Long2 __attribute__((vector_size(16)));
  return {sum.v + (Int4)(Long2)__builtin_ia32_pmaddwd128((Short8)a.v, (Short8)b.v)};
#else
  const Short8 x = (Short8)a.v, y = (Short8)b.v;
  Ints result = sum;
  for (int i = 0; i < 4; ++i) result.v[i] += x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
  return result;
#endif
}
WF_INLINE void store_bytes(int8_t* p, Vec v) {
  for (int i = 0; i < 4; ++i) p[i] = static_cast<int8_t>(v.v[i]);
}

#endif

}  // namespace warpformer::cpu::WF_ISA

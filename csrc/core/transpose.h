// Squares of words, as many each way as a register has: rows in, columns out. Included by cpu files
// only.
#pragma once

#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

/// a0 b0 a1 b1 ... of the lower halves, and of the upper ones.
WF_INLINE void zip(Vec a, Vec b, Vec& low, Vec& high) {
#if defined(__AVX512F__)
  const __m512i of_low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  low = {_mm512_permutex2var_ps(a.v, of_low, b.v)};
  high = {_mm512_permutex2var_ps(a.v, _mm512_add_epi32(of_low, _mm512_set1_epi32(8)), b.v)};
#elif defined(__AVX2__)
  const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);
  low = {_mm256_permute2f128_ps(even, odd, 0x20)};
  high = {_mm256_permute2f128_ps(even, odd, 0x31)};
#else
  low = {__builtin_shuffle(a.v, b.v, Int4{0, 4, 1, 5})};
  high = {__builtin_shuffle(a.v, b.v, Int4{2, 6, 3, 7})};
#endif
}

/// Each round brings the lanes of a register half as far apart as they were, from different
/// registers together.
WF_INLINE void transpose(Vec (&v)[Vec::kWidth]) {
  constexpr int kHalf = Vec::kWidth / 2;
#pragma GCC unroll 4
  for (int round = 1; round < Vec::kWidth; round *= 2) {
    Vec zipped[Vec::kWidth];
#pragma GCC unroll 8
    for (int i = 0; i < kHalf; ++i) zip(v[i], v[i + kHalf], zipped[2 * i], zipped[2 * i + 1]);
#pragma GCC unroll 16
    for (int i = 0; i < Vec::kWidth; ++i) v[i] = zipped[i];
  }
}

}  // namespace warpformer::cpu::WF_ISA

// Transposes in registers. Included by cpu files only.
#pragma once

#include "core/rows.h"
#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

/// v[i] lane j and v[j] lane i exchanged, for a square of words: bits are moved, never computed
/// with.
#if defined(__AVX512F__)
WF_INLINE void transpose(Vec (&v)[Vec::kWidth]) {
  __m512 quarter[16];  // of quarter[4i + c]: rows 4i to 4i + 3 of columns c, 4 + c, 8 + c, 12 + c
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(v[i].v, v[i + 1].v)),
                  high = _mm512_castps_pd(_mm512_unpackhi_ps(v[i].v, v[i + 1].v)),
                  next_low = _mm512_castps_pd(_mm512_unpacklo_ps(v[i + 2].v, v[i + 3].v)),
                  next_high = _mm512_castps_pd(_mm512_unpackhi_ps(v[i + 2].v, v[i + 3].v));
    quarter[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, next_low));
    quarter[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, next_low));
    quarter[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high, next_high));
    quarter[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high, next_high));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even = _mm512_shuffle_f32x4(quarter[c], quarter[4 + c], 0x88),
                 odd = _mm512_shuffle_f32x4(quarter[c], quarter[4 + c], 0xDD),
                 next_even = _mm512_shuffle_f32x4(quarter[8 + c], quarter[12 + c], 0x88),
                 next_odd = _mm512_shuffle_f32x4(quarter[8 + c], quarter[12 + c], 0xDD);
    v[c].v = _mm512_shuffle_f32x4(even, next_even, 0x88);
    v[4 + c].v = _mm512_shuffle_f32x4(odd, next_odd, 0x88);
    v[8 + c].v = _mm512_shuffle_f32x4(even, next_even, 0xDD);
    v[12 + c].v = _mm512_shuffle_f32x4(odd, next_odd, 0xDD);
  }
}
#elif defined(__AVX2__)
WF_INLINE void transpose(Vec (&v)[Vec::kWidth]) {
  __m256 half[8];  // of half[4i + c]: rows 4i to 4i + 3 of columns c, 4 + c
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    const __m256d low = _mm256_castps_pd(_mm256_unpacklo_ps(v[i].v, v[i + 1].v)),
                  high = _mm256_castps_pd(_mm256_unpackhi_ps(v[i].v, v[i + 1].v)),
                  next_low = _mm256_castps_pd(_mm256_unpacklo_ps(v[i + 2].v, v[i + 3].v)),
                  next_high = _mm256_castps_pd(_mm256_unpackhi_ps(v[i + 2].v, v[i + 3].v));
    half[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low, next_low));
    half[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low, next_low));
    half[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high, next_high));
    half[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high, next_high));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c].v = _mm256_permute2f128_ps(half[c], half[4 + c], 0x20);
    v[4 + c].v = _mm256_permute2f128_ps(half[c], half[4 + c], 0x31);
  }
}
#else
WF_INLINE void transpose(Vec (&v)[Vec::kWidth]) {
  const Float4 a = v[0].v, b = v[1].v, c = v[2].v, d = v[3].v;
  for (int i = 0; i < Vec::kWidth; ++i) v[i].v = Float4{a[i], b[i], c[i], d[i]};
}
#endif

/// to[i][j] = from[j][i] for Vec::kWidth rows of `from` and i in [0, n). Rows of `from` are read to
/// a multiple of the register.
WF_INLINE void transpose(const float* from, int64_t from_row, int64_t n, float* to,
                         int64_t to_row) {
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    Vec square[Vec::kWidth];
#pragma GCC unroll 16
    for (int j = 0; j < Vec::kWidth; ++j) square[j] = load(from + j * from_row + i);
    transpose(square);
    if (i + Vec::kWidth <= n) {
#pragma GCC unroll 16
      for (int j = 0; j < Vec::kWidth; ++j) store(to + (i + j) * to_row, square[j]);
    } else {
#pragma GCC unroll 16
      for (int j = 0; j < Vec::kWidth; ++j)
        if (i + j < n) store(to + (i + j) * to_row, square[j]);
    }
  }
}

/// Rows [r, r + count) of x, which are neighbours as in is_columns(), as rows of floats at `to`:
/// count <= Vec::kWidth, and `to` has room for whole registers of each.
inline Rows transpose_columns(const Rows& x, int64_t r, int64_t count, float* to) {
  const int64_t row = (x.n + Vec::kWidth - 1) / Vec::kWidth * Vec::kWidth;
  by_float(x.dtype, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(x.data) + row_offset(x, r);
    for (int64_t i = 0; i < x.n; i += Vec::kWidth) {
      Vec square[Vec::kWidth];
      for (int64_t j = 0; j < Vec::kWidth; ++j)
        square[j] = i + j < x.n ? load(from + (i + j) * x.step, count) : set(0.0f);
      transpose(square);
      for (int64_t j = 0; j < count; ++j) store(to + j * row + i, square[j]);
    }
  });
  return {to, DType::f32, x.n, 1, count, 1, {count}, {row}};
}

}  // namespace warpformer::cpu::WF_ISA

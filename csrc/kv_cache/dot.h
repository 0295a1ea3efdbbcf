// Two small products with rows of the cache where they lie: 4 rows of keys with up to 4 queries,
// and up to 4 rows of weights with the rows of values of a tile.
//
//           d -->                                        columns -->
//   k[0] |........|   x  q[r] |........|         v[0] |....|....|....|....|
//   k[1] |........|      = s[r][0..3]            v[1] |....|....|....|....|    o[r] += w[r][j] v[j]
//   k[2] |........|                               ...
//   k[3] |........|                              one load of v for all rows r
//
// Each row r has its own sums, in an order that no other row changes.
#pragma once

#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

constexpr int kKeys = 4;
constexpr int64_t kLine = 64;  // bytes of a line of the cache

/// Fetches the lines that begin in kBytes bytes from p on, into the second cache: the first one is
/// too small to wait in. Kernels ask for a later tile line by line as they use up this one: many at
/// once would stop them until all have come.
template <int64_t kBytes>
WF_INLINE void fetch(const void* p, int64_t offset) {
  if (kBytes < kLine && offset % kLine != 0) return;
  for (int64_t byte = 0; byte < kBytes; byte += kLine)
    __builtin_prefetch(static_cast<const char*>(p) + offset + byte, 0, 2);
}

/// out[i] = the sum of the lanes of a[i].
WF_INLINE void sum_lanes(const Vec (&a)[kKeys], float* out) {
#if defined(__AVX512F__)
  const __m512 ab =
      _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
  const __m512 cd =
      _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
  const __m512 abcd =
      _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif defined(__AVX2__)
  const __m256 half =
      _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < kKeys; ++i) out[i] = sum(a[i]);
#endif
}

/// Products in float: any cache, widened in registers.
struct Floats {
  using Query = float;
  static constexpr int kStep = Vec::kWidth;
  template <class T, class Lanes>
  static WF_INLINE Vec load_key(const T* p, Lanes lanes) {
    return load(p, lanes);
  }
  static WF_INLINE Vec load_query(const float* p) { return load(p); }
  static WF_INLINE Vec multiply_add(Vec q, Vec k, Vec sum) { return fma(q, k, sum); }
};

#if defined(__AVX512BF16__)
/// Products of pairs of bf16, exact, summed in float.
struct Bfloats {
  using Query = bf16;
  static constexpr int kStep = 32;
  static WF_INLINE __m512i load_key(const bf16* p, Full) { return _mm512_loadu_si512(p); }
  static WF_INLINE __m512i load_key(const bf16* p, Tail tail) {
    return _mm512_maskz_loadu_epi16((1u << tail.n) - 1, p);
  }
  static WF_INLINE __m512i load_query(const bf16* p) { return _mm512_loadu_si512(p); }
  static WF_INLINE Vec multiply_add(__m512i q, __m512i k, Vec sum) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)q, (__m512bh)k)};
  }
};
#endif

template <class Dot, int kRows, class T, class Lanes>
WF_INLINE void add_products(const typename Dot::Query* q, int64_t q_stride, const T* const* k,
                            const T* const* next, int64_t d, Lanes lanes,
                            Vec (&sums)[kRows][kKeys]) {
  decltype(Dot::load_key(k[0], lanes)) key[kKeys];
  for (int i = 0; i < kKeys; ++i) {
    key[i] = Dot::load_key(k[i] + d, lanes);
    fetch<Dot::kStep * int64_t{sizeof(T)}>(next[i], d * int64_t{sizeof(T)});
  }
  for (int r = 0; r < kRows; ++r) {
    const auto query = Dot::load_query(q + r * q_stride + d);
    for (int i = 0; i < kKeys; ++i) sums[r][i] = Dot::multiply_add(query, key[i], sums[r][i]);
  }
}

/// s[r * s_stride + i] = q[r] k[i]; next[i] is fetched. Rows of q are padded with zeros to a
/// multiple of Dot::kStep.
template <class Dot, int kRows, class T>
WF_INLINE void score(const typename Dot::Query* q, int64_t q_stride, const T* const* k,
                     const T* const* next, int64_t width, float* s, int64_t s_stride) {
  Vec sums[kRows][kKeys];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < kKeys; ++i) sums[r][i] = set(0.0f);
  int64_t d = 0;
  for (; d + Dot::kStep <= width; d += Dot::kStep)
    add_products<Dot, kRows>(q, q_stride, k, next, d, Full{}, sums);
  if (d < width) add_products<Dot, kRows>(q, q_stride, k, next, d, Tail{width - d}, sums);
  for (int r = 0; r < kRows; ++r) sum_lanes(sums[r], s + r * s_stride);
}

/// o[r][0, kColumns registers) += sum over j of w[r][j] v[j][...], v[j] being rows[j] + column;
/// next[j] is fetched.
template <int kRows, int kColumns, class T, class Lanes>
WF_INLINE void add_values(const float* w, int64_t w_stride, const T* const* rows,
                          const T* const* next, int64_t column, int64_t begin, int64_t end,
                          Lanes lanes, float* o, int64_t o_stride) {
  Vec sums[kRows][kColumns];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) sums[r][c] = load(o + r * o_stride + c * Vec::kWidth);
  for (int64_t j = begin; j < end; ++j) {
    Vec v[kColumns];
    for (int c = 0; c < kColumns; ++c) v[c] = load(rows[j] + column + c * Vec::kWidth, lanes);
    fetch<kColumns * Vec::kWidth * int64_t{sizeof(T)}>(next[j], column * int64_t{sizeof(T)});
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = set(w[r * w_stride + j]);
      for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(weight, v[c], sums[r][c]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kColumns; ++c) store(o + r * o_stride + c * Vec::kWidth, sums[r][c]);
}

/// The same for all `width` columns; rows of o are padded to whole registers.
template <int kRows, class T>
void add_values(const float* w, int64_t w_stride, const T* const* rows, const T* const* next,
                int64_t width, int64_t begin, int64_t end, float* o, int64_t o_stride) {
  constexpr int kWide = 4;
  int64_t c = 0;
  for (; c + kWide * Vec::kWidth <= width; c += kWide * Vec::kWidth)
    add_values<kRows, kWide>(w, w_stride, rows, next, c, begin, end, Full{}, o + c, o_stride);
  for (; c + Vec::kWidth <= width; c += Vec::kWidth)
    add_values<kRows, 1>(w, w_stride, rows, next, c, begin, end, Full{}, o + c, o_stride);
  if (c < width)
    add_values<kRows, 1>(w, w_stride, rows, next, c, begin, end, Tail{width - c}, o + c, o_stride);
}

}  // namespace warpformer::cpu::WF_ISA

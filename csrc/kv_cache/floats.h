// Products in float with rows of the cache where they lie: 4 rows of keys with up to 4 queries, and
// up to 4 rows of weights with the rows of values of a tile.
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
#include "kv_cache/tile.h"

namespace warpformer::cpu::WF_ISA {

constexpr int kKeys = 4;

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

/// Of keys: any T, widened in registers, by queries in float.
struct FloatKeys {
  using Query = float;
  static constexpr int64_t kStep = Vec::kWidth;
  template <class T, class Lanes>
  static WF_INLINE Vec load_key(const T* p, Lanes lanes) {
    return load(p, lanes);
  }
  static WF_INLINE Vec load_query(const float* p) { return load(p); }
  static WF_INLINE Vec multiply_add(Vec q, Vec k, Vec sum) { return fma(q, k, sum); }
};

#if defined(__AVX512BF16__)
/// Of keys in bf16, by queries in bf16: products of pairs, exact, summed in float.
struct BfloatKeys {
  using Query = bf16;
  static constexpr int64_t kStep = 32;
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

template <class T, class Keys>
struct Floats {
  using Element = T;
  using Query = typename Keys::Query;
  static constexpr bool kFinite = __is_same(T, int8_t);  // 0 times any element is 0
  static constexpr int64_t kSlots = 16 / sizeof(T);      // of a tile; the sums are those of any
  static constexpr int64_t kManySlots = sizeof(T) == 4 ? 8 : 16;
  static constexpr int64_t kColumns = Vec::kWidth;  // rows of o are padded to a multiple of it
  using Tile = WF_ISA::Tile<T, 16>;

  /// Floats that a packed query takes.
  static int64_t query_size(int64_t width) { return round_up(width, Keys::kStep); }
  static void pack_query(const float* x, int64_t width, float* packed) {
    Query* q = reinterpret_cast<Query*>(packed);
    for (int64_t d = width / Vec::kWidth * Vec::kWidth; d < query_size(width); ++d) q[d] = Query{};
    for_lanes(width, [&](int64_t d, auto k) { store(q + d, load(x + d, k), k); });
  }

  /// s[r * s_stride + j] = q[r] k[j] for the rows k of the tile.
  template <int kRows>
  static WF_INLINE void score(const float* packed, const Tile& tile, int64_t width, float* s,
                              int64_t s_stride) {
    const Query* q = reinterpret_cast<const Query*>(packed);
    const int64_t q_stride = query_size(width) * int64_t{sizeof(float) / sizeof(Query)};
    for (int64_t j = 0; j < tile.count; j += kKeys) {
      Vec sums[kRows][kKeys];
      for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kKeys; ++i) sums[r][i] = set(0.0f);
      int64_t d = 0;
      for (; d + Keys::kStep <= width; d += Keys::kStep)
        add_products<kRows>(q + d, q_stride, tile, j, d, Full{}, sums);
      if (d < width) add_products<kRows>(q + d, q_stride, tile, j, d, Tail{width - d}, sums);
      for (int r = 0; r < kRows; ++r) sum_lanes(sums[r], s + r * s_stride + j);
    }
  }

  static void pack_weights(float*, int64_t) {}
  static void finish(const float*, int64_t, float*) {}

  /// o[r * o_stride + c] += sum over j in `slots` of w[r * w_stride + slot + j] v[j][c] for the
  /// rows v of the tile, which begins with `slot`.
  template <int kRows>
  static void add_values(const float* w, int64_t w_stride, int64_t slot, const Tile& tile,
                         Range slots, int64_t width, float* o, int64_t o_stride) {
    constexpr int kWide = 4;
    w += slot;
    int64_t c = 0;
    for (; c + kWide * Vec::kWidth <= width; c += kWide * Vec::kWidth)
      add_columns<kRows, kWide>(w, w_stride, tile, slots, c, Full{}, o + c, o_stride);
    for (; c + Vec::kWidth <= width; c += Vec::kWidth)
      add_columns<kRows, 1>(w, w_stride, tile, slots, c, Full{}, o + c, o_stride);
    if (c < width)
      add_columns<kRows, 1>(w, w_stride, tile, slots, c, Tail{width - c}, o + c, o_stride);
  }

 private:
  template <int kRows, class Lanes>
  static WF_INLINE void add_products(const Query* q, int64_t q_stride, const Tile& tile, int64_t j,
                                     int64_t d, Lanes lanes, Vec (&sums)[kRows][kKeys]) {
    decltype(Keys::load_key(tile.rows[0], lanes)) key[kKeys];
    for (int i = 0; i < kKeys; ++i) key[i] = Keys::load_key(tile.rows[j + i] + d, lanes);
    for (int r = 0; r < kRows; ++r) {
      const auto query = Keys::load_query(q + r * q_stride);
      for (int i = 0; i < kKeys; ++i) sums[r][i] = Keys::multiply_add(query, key[i], sums[r][i]);
    }
  }

  template <int kRows, int kRegisters, class Lanes>
  static WF_INLINE void add_columns(const float* w, int64_t w_stride, const Tile& tile, Range slots,
                                    int64_t column, Lanes lanes, float* o, int64_t o_stride) {
    Vec sums[kRows][kRegisters];
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kRegisters; ++c) sums[r][c] = load(o + r * o_stride + c * Vec::kWidth);
    for (int64_t j = slots.begin; j < slots.end; ++j) {
      Vec v[kRegisters];
      for (int c = 0; c < kRegisters; ++c)
        v[c] = load(tile.rows[j] + column + c * Vec::kWidth, lanes);
      for (int r = 0; r < kRows; ++r) {
        const Vec weight = set(w[r * w_stride + j]);
        for (int c = 0; c < kRegisters; ++c) sums[r][c] = fma(weight, v[c], sums[r][c]);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kRegisters; ++c) store(o + r * o_stride + c * Vec::kWidth, sums[r][c]);
  }
};

}  // namespace warpformer::cpu::WF_ISA

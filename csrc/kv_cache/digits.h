// Products with int8 rows of the cache in whole numbers (vpdpbusd). What multiplies them, queries
// and weights, becomes numbers of 2 or 3 signed bytes, its digits: 15 or 23 bits below the largest
// of a row. Sums of products are exact.
//
//   x[i] = unit * n[i],    n[i] = 2^8 (2^8 d0 + d1) + d2
//
// The unit is a power of two: of a query in bf16, two digits hold what is above 1/64 of the largest
// exactly.
//
// One instruction multiplies four neighbours in memory and adds the products up in a lane. So four
// neighbours of a key meet four of a query, each lane a key of its own: 16 keys are transposed in
// registers. And four values of a column meet their weights: 4 rows are interleaved.
#pragma once

#include "core/simd.h"
#include "kv_cache/tile.h"

#if defined(__AVX512VNNI__)
namespace warpformer::cpu::WF_ISA {

/// The digits of 16 numbers, in the memory of the 16 floats that they come from.
struct Group {
  int8_t digits[3][16];
  int32_t sums[3];  // 128 times those of the digits: bytes of the cache are taken as 128 more
  float unit;       // of the whole row; in its first group
};
static_assert(sizeof(Group) == 16 * sizeof(float));

WF_INLINE __m512i four(const int8_t* digits) {
  int32_t bits;
  memcpy(&bits, digits, sizeof bits);
  return _mm512_set1_epi32(bits);
}

/// n floats, n a multiple of 16, become digits where they lie. Infinity and NaN make the unit NaN.
template <int kDigits>
void make_digits(float* x, int64_t n) {
  Vec high = set(0.0f), check = set(0.0f);
  for (int64_t i = 0; i < n; i += 16) {
    const Vec v = load(x + i);
    high = max(high, abs(v));
    check = fma(v, set(0.0f), check);
  }
  // The first digit is at most 127, hence 128 / 127.
  const float largest = max_lane(high) * (128.0f / 127.0f);
  const int exponent = ilogbf(fminf(fmaxf(largest, 0x1p-100f), __FLT_MAX__));
  const float unit = ldexpf(1.0f, exponent + 2 - 8 * kDigits);
  const Vec inverse = set(1.0f / unit);
  for (int64_t i = 0; i < n; i += 16) {
    __m512i number = _mm512_cvtps_epi32((load(x + i) * inverse).v);
    Group& group = *reinterpret_cast<Group*>(x + i);
    for (int d = kDigits - 1; d >= 0; --d) {
      const __m128i digits = _mm512_cvtepi32_epi8(number);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(group.digits[d]), digits);
      const __m128i sums = _mm_dpbusd_epi32(_mm_setzero_si128(), _mm_set1_epi8(INT8_MIN), digits);
      const __m128i pairs = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4E));
      group.sums[d] = _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0xB1)));
      number = _mm512_srai_epi32(_mm512_add_epi32(number, _mm512_set1_epi32(128)), 8);
    }
  }
  if (n > 0) reinterpret_cast<Group*>(x)->unit = unit + sum(check);
}

/// A row of t[i] is one of the dwords i of the 16 rows.
WF_INLINE void transpose(__m512i (&t)[16]) {
  __m512i u[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512i a = _mm512_unpacklo_epi32(t[i], t[i + 1]);
    const __m512i b = _mm512_unpackhi_epi32(t[i], t[i + 1]);
    const __m512i c = _mm512_unpacklo_epi32(t[i + 2], t[i + 3]);
    const __m512i d = _mm512_unpackhi_epi32(t[i + 2], t[i + 3]);
    u[i] = _mm512_unpacklo_epi64(a, c);
    u[i + 1] = _mm512_unpackhi_epi64(a, c);
    u[i + 2] = _mm512_unpacklo_epi64(b, d);
    u[i + 3] = _mm512_unpackhi_epi64(b, d);
  }
  for (int i = 0; i < 4; ++i) {  // quarters of registers: of keys 0-3, 4-7, 8-11 and 12-15
    const __m512i a = _mm512_shuffle_i32x4(u[i], u[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(u[i], u[i + 4], 0xDD);
    const __m512i c = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(u[i + 8], u[i + 12], 0xDD);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(a, c, 0xDD);
    t[i + 12] = _mm512_shuffle_i32x4(b, d, 0xDD);
  }
}

template <int kQueryDigits, int kWeightDigits>
struct Digits {
  using Element = int8_t;
  static constexpr bool kFinite = true;
  static constexpr int64_t kSlots = 16, kManySlots = 16;
  static constexpr int64_t kColumns = 64;  // rows of o are padded to a multiple of it
  using Tile = WF_ISA::Tile<int8_t, kSlots>;

  /// Floats that a packed query takes.
  static int64_t query_size(int64_t width) { return round_up(width, 64); }
  static void pack_query(const float* x, int64_t width, float* packed) {
    for (int64_t d = 0; d < query_size(width); ++d) packed[d] = d < width ? x[d] : 0.0f;
    make_digits<kQueryDigits>(packed, query_size(width));
    Group* q = reinterpret_cast<Group*>(packed);
    for (int64_t i = 1; i < query_size(width) / 16; ++i)
      for (int d = 0; d < kQueryDigits; ++d) q[0].sums[d] += q[i].sums[d];
  }
  static void pack_weights(float* w, int64_t n) {
    for (int64_t j = n; j < round_up(n, kSlots); ++j) w[j] = 0.0f;
    make_digits<kWeightDigits>(w, round_up(n, kSlots));
  }

  /// s[r * s_stride + j] = q[r] k[j] for the rows k of the tile.
  template <int kRows>
  static void score(const float* packed, const Tile& tile, int64_t width, float* s,
                    int64_t s_stride) {
    const Group* q = reinterpret_cast<const Group*>(packed);
    const int64_t q_stride = query_size(width) / 16;
    __m512i sums[kRows][kQueryDigits];
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < kQueryDigits; ++d)
        sums[r][d] = _mm512_set1_epi32(width > 0 ? -q[r * q_stride].sums[d] : 0);
    for (int64_t at = 0; at < width; at += 64) {
      const __mmask64 lanes = width - at < 64 ? (uint64_t{1} << (width - at)) - 1 : ~uint64_t{0};
      __m512i keys[16];
      for (int j = 0; j < 16; ++j)
        keys[j] = as_unsigned(_mm512_maskz_loadu_epi8(lanes, tile.rows[j] + at));
      transpose(keys);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        for (int r = 0; r < kRows; ++r)
          for (int d = 0; d < kQueryDigits; ++d) {
            const Group& group = q[r * q_stride + at / 16 + i / 4];
            sums[r][d] =
                _mm512_dpbusd_epi32(sums[r][d], keys[i], four(group.digits[d] + i % 4 * 4));
          }
    }
    for (int r = 0; r < kRows; ++r) {
      Vec total = set(0.0f);
      for (int d = 0; d < kQueryDigits; ++d)
        total = fma(total, set(256.0f), {_mm512_cvtepi32_ps(sums[r][d])});
      store(s + r * s_stride, total * set(width > 0 ? q[r * q_stride].unit : 0.0f));
    }
  }

  /// o[r * o_stride + c] += sum over j of n[r * w_stride + slot + j] v[j][c] for the rows v of the
  /// tile, which begins with `slot`; the columns in the order in which they come out of
  /// interleaving.
  template <int kRows>
  static void add_values(const float* w, int64_t w_stride, int64_t slot, const Tile& tile, Range,
                         int64_t width, float* o, int64_t o_stride) {
    w += slot;
    for (int64_t c = 0; c < width; c += 64) {
      const __mmask64 lanes = width - c < 64 ? (uint64_t{1} << (width - c)) - 1 : ~uint64_t{0};
      add_columns<kRows, false>(w, w_stride, tile, c, lanes, o + c, o_stride);
      add_columns<kRows, true>(w, w_stride, tile, c, lanes, o + c + 32, o_stride);
    }
  }

  /// Puts the columns of a row of o in order, and takes them times the unit of its weights.
  static void finish(const float* w, int64_t width, float* o) {
    const Vec unit = set(reinterpret_cast<const Group*>(w)->unit);
    for (int64_t c = 0; c < width; c += 64) {
      __m512 t[4];
      for (int i = 0; i < 4; ++i) t[i] = (load(o + c + i * 16) * unit).v;
      const __m512 a = _mm512_shuffle_f32x4(t[0], t[1], 0x44),
                   b = _mm512_shuffle_f32x4(t[0], t[1], 0xEE);
      const __m512 d = _mm512_shuffle_f32x4(t[2], t[3], 0x44),
                   e = _mm512_shuffle_f32x4(t[2], t[3], 0xEE);
      _mm512_storeu_ps(o + c, _mm512_shuffle_f32x4(a, d, 0x88));
      _mm512_storeu_ps(o + c + 16, _mm512_shuffle_f32x4(a, d, 0xDD));
      _mm512_storeu_ps(o + c + 32, _mm512_shuffle_f32x4(b, e, 0x88));
      _mm512_storeu_ps(o + c + 48, _mm512_shuffle_f32x4(b, e, 0xDD));
    }
  }

 private:
  static WF_INLINE __m512i as_unsigned(__m512i bytes) {
    return _mm512_xor_si512(bytes, _mm512_set1_epi8(INT8_MIN));
  }

  /// Half of 64 columns: the lower or upper 8 of each 16.
  template <int kRows, bool kUpper>
  static WF_INLINE void add_columns(const float* w, int64_t w_stride, const Tile& tile, int64_t c,
                                    __mmask64 lanes, float* o, int64_t o_stride) {
    const auto group = [&](int r) -> const Group& {
      return *reinterpret_cast<const Group*>(w + r * w_stride);
    };
    __m512i sums[kRows][kWeightDigits][2];
    for (int r = 0; r < kRows; ++r)
      for (int d = 0; d < kWeightDigits; ++d)
        sums[r][d][0] = sums[r][d][1] = _mm512_set1_epi32(-(group(r).sums[d]));
    for (int j = 0; j < kSlots; j += 4) {
      __m512i row[4];
      for (int i = 0; i < 4; ++i) row[i] = _mm512_maskz_loadu_epi8(lanes, tile.rows[j + i] + c);
      const auto bytes = [](__m512i a, __m512i b) {
        return as_unsigned(kUpper ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b));
      };
      const __m512i first = bytes(row[0], row[1]), second = bytes(row[2], row[3]);
      const __m512i v[2] = {_mm512_unpacklo_epi16(first, second),
                            _mm512_unpackhi_epi16(first, second)};
      for (int r = 0; r < kRows; ++r)
        for (int d = 0; d < kWeightDigits; ++d) {
          const __m512i weights = four(group(r).digits[d] + j);
          for (int i = 0; i < 2; ++i)
            sums[r][d][i] = _mm512_dpbusd_epi32(sums[r][d][i], v[i], weights);
        }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 2; ++i) {
        float* to = o + r * o_stride + i * 16;
        // Two digits of 16 products fit together into an int32.
        const Vec high{_mm512_cvtepi32_ps(
            _mm512_add_epi32(_mm512_slli_epi32(sums[r][0][i], 8), sums[r][1][i]))};
        if constexpr (kWeightDigits == 2) {
          store(to, load(to) + high);
        } else {
          const Vec low{_mm512_cvtepi32_ps(sums[r][2][i])};
          store(to, fma(high, set(256.0f), load(to) + low));
        }
      }
  }
};

}  // namespace warpformer::cpu::WF_ISA
#endif

// Products in bf16 with rows of a cache in bf16 (vdpbf16ps): the weights are rounded to bf16, too,
// and two neighbouring slots are multiplied by one instruction, their products summed in float.
//
//               columns -->                                          columns in this order -->
//   v[j]     |a0 a1 a2 ...|     interleaved  |a0 b0 a1 b1 a2 b2 ...|     o[r] += w[r][j, j + 1]
//   v[j + 1] |b0 b1 b2 ...|     per 4        |a4 b4 a5 b5 ...      |
#pragma once

#include "kv_cache/floats.h"

#if defined(__AVX512BF16__)
namespace warpformer::cpu::WF_ISA {

struct Pairs : Floats<bf16, BfloatKeys> {
  static constexpr int64_t kColumns = 32;  // rows of o are padded to a multiple of it

  /// n weights of a line, where they lie: bf16, and 0 behind an odd end.
  static void pack_weights(float* w, int64_t n) {
    bf16* packed = reinterpret_cast<bf16*>(w);
    for_lanes(n, [&](int64_t j, auto k) { store(packed + j, load(w + j, k), k); });
    packed[n] = {};
  }

  /// o[r * o_stride + c] += sum over j in `slots` of w[r * w_stride][slot + j] v[j][c] for the rows
  /// v of the tile, which begins with `slot`; the columns in the order in which they are
  /// interleaved.
  template <int kRows>
  static void add_values(const float* w, int64_t w_stride, int64_t slot, const Tile& tile,
                         Range slots, int64_t width, float* o, int64_t o_stride) {
    const bf16* pairs = reinterpret_cast<const bf16*>(w) + slot;
    int64_t c = 0;
    for (; c + 64 <= width; c += 64)
      add_columns<kRows, 2>(pairs, 2 * w_stride, tile, slots, c, ~0u, o + c, o_stride);
    for (; c < width; c += 32) {
      const uint32_t lanes = width - c < 32 ? (1u << (width - c)) - 1 : ~0u;
      add_columns<kRows, 1>(pairs, 2 * w_stride, tile, slots, c, lanes, o + c, o_stride);
    }
  }

  /// Puts the columns of a row of o in order.
  static void finish(const float*, int64_t width, float* o) {
    for (int64_t c = 0; c < width; c += 32) {
      const __m512 low = load(o + c).v, high = load(o + c + 16).v;
      const __m512 a = _mm512_shuffle_f32x4(low, high, 0x44),
                   b = _mm512_shuffle_f32x4(low, high, 0xEE);
      _mm512_storeu_ps(o + c, _mm512_shuffle_f32x4(a, a, 0xD8));
      _mm512_storeu_ps(o + c + 16, _mm512_shuffle_f32x4(b, b, 0xD8));
    }
  }

 private:
  template <int kRows, int kGroups>
  static WF_INLINE void add_columns(const bf16* w, int64_t w_stride, const Tile& tile, Range slots,
                                    int64_t column, uint32_t lanes, float* o, int64_t o_stride) {
    __m512 sums[kRows][2 * kGroups];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 2 * kGroups; ++i) sums[r][i] = _mm512_loadu_ps(o + r * o_stride + i * 16);
    for (int64_t j = slots.begin / 2 * 2; j < slots.end; j += 2) {
      const __mmask32 even = j < slots.begin ? 0 : lanes, odd = j + 1 < slots.end ? lanes : 0;
      __m512i v[2 * kGroups];
      for (int i = 0; i < kGroups; ++i) {
        const __m512i a = _mm512_maskz_loadu_epi16(even, tile.rows[j] + column + i * 32);
        const __m512i b = _mm512_maskz_loadu_epi16(odd, tile.rows[j + 1] + column + i * 32);
        v[2 * i] = _mm512_unpacklo_epi16(a, b);
        v[2 * i + 1] = _mm512_unpackhi_epi16(a, b);
      }
      for (int r = 0; r < kRows; ++r) {
        int32_t pair;
        memcpy(&pair, w + r * w_stride + j, sizeof pair);
        const __m512bh weights = (__m512bh)_mm512_set1_epi32(pair);
        for (int i = 0; i < 2 * kGroups; ++i)
          sums[r][i] = _mm512_dpbf16_ps(sums[r][i], (__m512bh)v[i], weights);
      }
    }
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 2 * kGroups; ++i) _mm512_storeu_ps(o + r * o_stride + i * 16, sums[r][i]);
  }
};

}  // namespace warpformer::cpu::WF_ISA
#endif

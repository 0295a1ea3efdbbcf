// Operands of attention's products, as words of core/gemm.h: floats, or Pairs of bf16. Included by
// cpu files only.
#pragma once

#include "core/gemm.h"
#include "core/rows.h"

namespace warpformer::cpu::WF_ISA {

/// Words that n elements take.
template <class Word>
constexpr int64_t words(int64_t n) {
  return __is_same(Word, float) ? n : (n + 1) / 2;
}
/// Products q k summed in one chain. The error of the softmax and of its sums hides that of longer
/// chains than chain(width), unless each product is rounded, too (scalar); with bf16 operands the
/// rounding of the weights does.
template <class Word>
int64_t chain_of_scores(int64_t width) {
#if defined(__AVX2__)
  if (!__is_same(Word, float)) return kChain;
  if (width > 32 && width <= 64) return 32;
#endif
  return chain(width);
}
inline int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }
inline int64_t tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

/// Part of a row as words: floats, or Pairs with 0 after an odd end. `times` is 1, -1 or 0.
inline void pack_row(const Rows& rows, int64_t r, int64_t first, int64_t n, float times,
                     float* to) {
  read_span(rows, r, first, n, to);
  if (times != 1.0f)
    for (int64_t i = 0; i < n; ++i) to[i] *= times;
}
inline void pack_row(const Rows& rows, int64_t r, int64_t first, int64_t n, float times, Pair* to) {
  bf16* half = &to->even;
  const bf16* from = static_cast<const bf16*>(rows.data) + row_offset(rows, r) + first * rows.step;
  if (times != 1.0f) {
    for (int64_t i = 0; i < n; ++i)
      half[i] = from_float<bf16>(to_float(from[i * rows.step]) * times);
  } else if (rows.step == 1) {
    memcpy(half, from, n * sizeof(bf16));
  } else {
    for (int64_t i = 0; i < n; ++i) half[i] = from[i * rows.step];
  }
  if (n % 2) half[n] = {};
}

/// Keys [first, first + count) -> [keys / 16][width][16] words.
template <class Word>
void pack_keys(const Rows& k, int64_t first, int64_t count, int64_t width, float* buffer,
               float* panels) {
  const float* row = buffer;
  for (int64_t j = 0; j < padded(count); ++j) {
    float* to = panels + j / kPanel * width * kPanel + j % kPanel;
    if (j < count) {
      pack_row(k, first + j, 0, k.n, 1.0f, reinterpret_cast<Word*>(buffer));
      for (int64_t d = 0; d < width; ++d) to[d * kPanel] = row[d];
    } else {
      for (int64_t d = 0; d < width; ++d) to[d * kPanel] = 0.0f;
    }
  }
}

/// Values [first, first + count) -> [Dv / 16][panel_rows][16] words. Returns whether every one is
/// finite: 0 * v is then 0, and the product P v may be used as it is.
inline bool pack_values(const Rows& v, int64_t first, int64_t count, int64_t panel_rows,
                        float* buffer, float* panels, float) {
  Vec zero = set(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    const float* row = row_in(v, first + j, buffer);
    for (int64_t i = v.n; i < padded(v.n); ++i)
      panels[(i / kPanel * panel_rows + j) * kPanel + i % kPanel] = 0.0f;
    for_lanes(v.n, [&](int64_t i, auto k) {
      const Vec value = load(row + i, k);
      store(panels + (i / kPanel * panel_rows + j) * kPanel + i % kPanel, value, k);
      zero = fma(value, set(0.0f), zero);
    });
  }
  return sum(zero) == 0.0f;
}
inline bool pack_values(const Rows& v, int64_t first, int64_t count, int64_t panel_rows,
                        float* buffer, float* panels, Pair) {
  uint16_t largest = 0;
  bf16* even = reinterpret_cast<bf16*>(buffer);
  bf16* odd = even + padded(v.n);
  for (int64_t i = v.n; i < padded(v.n); ++i) even[i] = odd[i] = {};
  for (int64_t j = 0; j < count; j += 2) {
    pack_row(v, first + j, 0, v.n, 1.0f, reinterpret_cast<Pair*>(even));
    if (j + 1 < count) {
      pack_row(v, first + j + 1, 0, v.n, 1.0f, reinterpret_cast<Pair*>(odd));
    } else {
      memset(odd, 0, v.n * sizeof(bf16));
    }
    for (int64_t i = 0; i < padded(v.n); i += kPanel) {
      Pair* to = reinterpret_cast<Pair*>(panels + (i / kPanel * panel_rows + j / 2) * kPanel);
      for (int64_t c = 0; c < kPanel; ++c) {
        to[c] = {even[i + c], odd[i + c]};
        const uint16_t a = even[i + c].bits & 0x7FFF, b = odd[i + c].bits & 0x7FFF;
        largest = largest > a ? largest : a;
        largest = largest > b ? largest : b;
      }
    }
  }
  return largest < 0x7F80;
}

/// e -> weights[i, i + a register), as words.
WF_INLINE void store_weights(float* weights, int64_t i, Vec e) { store(weights + i, e); }
#if defined(__AVX512BF16__)
WF_INLINE void store_weights(Pair* weights, int64_t i, Vec e) {
  _mm256_storeu_si256((__m256i*)(weights + i / 2), (__m256i)_mm512_cvtneps_pbh(e.v));
}
#endif

/// multiply_add without 0 * inf and 0 * NaN: where a weight is 0, its value does not count.
inline Vec multiply_add_visible(const float* weight, const float* values, Vec sum) {
  return *weight != 0.0f ? fma(set(*weight), load(values), sum) : sum;
}
#if defined(__AVX512BF16__)
inline Vec multiply_add_visible(const Pair* weight, const float* values, Vec sum) {
  const uint32_t kept = (weight->even.bits ? 0xFFFFu : 0u) | (weight->odd.bits ? 0xFFFF0000u : 0u);
  const __m512i seen = _mm512_and_si512(_mm512_castps_si512(load(values).v),
                                        _mm512_set1_epi32(static_cast<int32_t>(kept)));
  return multiply_add(weight, {_mm512_castsi512_ps(seen)}, sum);
}
#endif

/// Clears what is not finite in `n` words: 0 times it is then 0.
inline void clear_non_finite(float* words, int64_t n, float) {
  for (int64_t i = 0; i < n; ++i)
    if (!(words[i] - words[i] == 0.0f)) words[i] = 0.0f;
}
inline void clear_non_finite(float* words, int64_t n, Pair) {
  bf16* half = reinterpret_cast<bf16*>(words);
  for (int64_t i = 0; i < 2 * n; ++i)
    if ((half[i].bits & 0x7F80) == 0x7F80) half[i] = {};
}

}  // namespace warpformer::cpu::WF_ISA

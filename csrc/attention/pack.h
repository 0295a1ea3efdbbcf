// Operands of attention's products, as words of core/gemm.h: floats, or Pairs of bf16. Included by
// cpu files only.
#pragma once

#include "core/gemm.h"
#include "core/rows.h"
#include "core/transpose.h"

namespace warpformer::cpu::WF_ISA {

/// Words that n elements take.
template <class Word>
constexpr int64_t words(int64_t n) {
  return (n + kPerWord<Word> - 1) / kPerWord<Word>;
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

/// Part of a row as words: floats, or Pairs with 0 after an odd end. `times` is 1, -1 or 0.
inline void pack_row(const Rows& rows, int64_t r, int64_t first, int64_t n, float times,
                     float* to) {
  if (rows.dtype == DType::f32 && rows.step == 1) {
    const float* from = static_cast<const float*>(rows.data) + row_offset(rows, r) + first;
    for_lanes(n, [&](int64_t i, auto k) { store(to + i, load(from + i, k) * set(times), k); });
    return;
  }
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

/// Whether rows are words where they lie, whole registers of them.
template <class Word>
bool are_words(const Rows& rows) {
  return rows.dtype == (__is_same(Word, float) ? DType::f32 : DType::bf16) && rows.step == 1 &&
         rows.n % (kPerWord<Word> * kPanel) == 0 && rows.stride[0] % kPerWord<Word> == 0;
}

/// Keys [first, first + count) -> [keys / 16][width][16] words. `buffer` has room for kPanel rows.
template <class Word>
void pack_keys(const Rows& k, int64_t first, int64_t count, int64_t width, float* buffer,
               float* panels) {
  const int64_t apart = padded(width);
  for (int64_t j = 0; j < count; j += kPanel) {
    const float* from = buffer;
    int64_t row = apart;
    if (are_words<Word>(k) && j + kPanel <= count) {
      row = k.stride[0] / kPerWord<Word>;
      from = static_cast<const float*>(k.data) + (first + j) * row;
    } else {
      for (int64_t r = 0; r < kPanel; ++r) {
        float* copy = buffer + r * apart;
        if (j + r < count) {
          pack_row(k, first + j + r, 0, k.n, 1.0f, reinterpret_cast<Word*>(copy));
        } else {
          memset(copy, 0, width * sizeof(float));
        }
      }
    }
    for (int64_t r = 0; r < kPanel; r += Vec::kWidth)
      transpose(from + r * row, row, width, panels + j * width + r, kPanel);
  }
}

/// Values [first, first + count) -> [Dv / 16][panel_rows][16] words. Returns whether every one is
/// finite: 0 * v is then 0, and the product P v may be used as it is.
inline bool pack_values(const Rows& v, int64_t first, int64_t count, int64_t panel_rows,
                        float* buffer, float* panels, float) {
  Ints largest = set(int32_t{0});  // without sign, floats are in the order of their bits
  for (int64_t j = 0; j < count; ++j) {
    const float* row = row_in(v, first + j, buffer);
    for (int64_t i = v.n; i < padded(v.n); ++i)
      panels[(i / kPanel * panel_rows + j) * kPanel + i % kPanel] = 0.0f;
    for_lanes(v.n, [&](int64_t i, auto k) {
      const Vec value = load(row + i, k);
      store(panels + (i / kPanel * panel_rows + j) * kPanel + i % kPanel, value, k);
      largest = max(largest, bits_of(value) & set(INT32_MAX));
    });
  }
  return max_lane(largest) < 0x7F800000;
}
#if defined(__AVX512BF16__)
WF_INLINE __m512i load_halves(const bf16* p, Full) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
}
WF_INLINE __m512i load_halves(const bf16* p, Tail tail) {
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes(tail.n), p));
}
inline bool pack_values(const Rows& v, int64_t first, int64_t count, int64_t panel_rows,
                        float* buffer, float* panels, Pair) {
  bf16* copies = reinterpret_cast<bf16*>(buffer);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t j = 0; j < count; j += 2) {
    const bf16* even = row_in(v, first + j, copies);
    const bf16* odd = even;
    if (j + 1 < count) {
      odd = row_in(v, first + j + 1, copies + padded(v.n));
    }
    const __m512i kept = _mm512_set1_epi32(j + 1 < count ? -1 : 0xFFFF);
    for_lanes(v.n, [&](int64_t i, auto k) {
      const __m512i pairs =
          _mm512_and_si512(kept, _mm512_or_si512(load_halves(even + i, k),
                                                 _mm512_slli_epi32(load_halves(odd + i, k), 16)));
      _mm512_storeu_si512(panels + (i / kPanel * panel_rows + j / 2) * kPanel, pairs);
      largest = _mm512_max_epu16(largest, _mm512_and_si512(pairs, _mm512_set1_epi16(0x7FFF)));
    });
  }
  return !_mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7F80));
}
#endif

/// Panels beside whose products, each with `depth` words, lines of rows are fetched that are read
/// later: many at once would wait for each other.
struct PanelsAhead : Panels {
  const char* row;
  int64_t apart, last;  // bytes from one row to the next; the last line
  int shift;            // lines of a row, as a power of two
  int64_t depth;

  template <int kPanels>
  WF_INLINE void prefetch(int64_t p, int64_t k) const {
    fetch_line(at_most(k * kPanels + p, last));
  }
  WF_INLINE void fetch_line(int64_t line) const {
    const int64_t column = line & ((int64_t{1} << shift) - 1);
    __builtin_prefetch(row + (line >> shift) * apart + column * kLine, 0, 2);
  }
  WF_INLINE void skip(int64_t panels) {
    Panels::skip(panels);
    skip_lines(panels * depth);
  }
  WF_INLINE void skip_lines(int64_t lines) {
    const int64_t rows = at_most(lines, last) >> shift;
    row += rows * apart;
    last -= rows << shift;
  }
  static constexpr int64_t kLine = 64;  // bytes of a line of the cache
};

/// Rows to fetch beside products.
class RowFetcher {
 public:
  /// Rows [begin, end); of at most four calls, up to the next fetch_all().
  void append(const Rows& rows, int64_t begin, int64_t end) {
    if (rows.step != 1 || begin >= end || rows.n == 0) return;
    const int64_t size = rows.dtype == DType::f32 ? 4 : 2;
    int shift = 0;
    while (PanelsAhead::kLine << shift < rows.n * size) ++shift;
    parts_[count_++] = {{},
                        static_cast<const char*>(rows.data) + row_offset(rows, begin) * size,
                        rows.stride[0] * size,
                        ((end - begin) << shift) - 1,
                        shift,
                        0};
  }
  bool is_empty() const { return count_ == 0; }
  /// `panels` of b, beside whose products the next lines are fetched.
  PanelsAhead beside(const Panels& b, int64_t panels, int64_t depth) {
    PanelsAhead &part = parts_[count_ - 1], now = part;
    static_cast<Panels&>(now) = b;
    now.depth = depth;
    if (panels * depth > part.last) {
      --count_;
    } else {
      part.skip_lines(panels * depth);
    }
    return now;
  }
  void fetch_all() {
    while (count_ > 0) {
      const PanelsAhead& part = parts_[--count_];
      for (int64_t line = 0; line <= part.last; ++line) part.fetch_line(line);
    }
  }

 private:
  PanelsAhead parts_[4];
  int count_ = 0;
};

/// What a tile of rows takes of a product.
struct Extent {
  int64_t panels, depth;
};

/// gemm for more rows than one tile has, with an extent for each tile, none below the one before:
/// they pass panels of B one after the other, while these are in the first cache. Inlined, so that
/// q k and P v have tile kernels of their own: GCC makes faster ones where it knows what is added.
template <class Word>
WF_INLINE void gemm_tall(int64_t rows, const Extent* extents, const Word* a, Panels b,
                         int64_t chain, float* c, int64_t c_row, bool add, RowFetcher& ahead) {
  constexpr int kPanels = tile_panels(kTileRows);
  const int64_t whole = rows / kTileRows, rest = rows % kTileRows;
  const auto multiply = [&](int64_t tile, int64_t first,
                            int64_t panels) __attribute__((always_inline)) {
    const int64_t row = tile * kTileRows, depth = extents[tile].depth;
    const Word* rows_of_a = a + row * kStride;
    const Add sink{c + row * c_row + first * kPanel, c_row, add};
    const auto by = [&](const auto& from) __attribute__((always_inline)) {
      if (tile < whole && panels == kPanels) {
        gemm_tile<kTileRows, kPanels, 1, Layout::rows>(rows_of_a, from, depth, chain, sink);
      } else {
        const int height = static_cast<int>(tile < whole ? kTileRows : rest);
        gemm_rows<1, Layout::rows>(height, panels, rows_of_a, from, depth, chain, sink);
      }
    };
    const Panels from{b.data + first * b.panel, b.panel, b.row};
    if (ahead.is_empty()) {
      by(from);
    } else {
      by(ahead.beside(from, panels, depth));
    }
  };
  for (int64_t p = 0; whole > 0 && p < extents[whole - 1].panels; p += kPanels)
    for (int64_t i = 0; i < whole; ++i)
      if (extents[i].panels > p) multiply(i, p, at_most(kPanels, extents[i].panels - p));
  if (rest) multiply(whole, 0, extents[whole].panels);
}

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

}  // namespace warpformer::cpu::WF_ISA

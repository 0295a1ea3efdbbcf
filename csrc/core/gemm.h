// The matrix product that linear and attention share: one register tile at a time. A word of A or B
// is a float or, where the ISA multiplies bf16, a Pair of bf16 neighbours along k; sums are float.
//
//              panel 0    panel 1          B: panels of 16 columns, row k of a panel is 16 words
//            +----------+----------+
//     a[0]   |  acc     |  acc     |       A: up to kTileRows rows of at most kDepth words,
//     kStride
//     ...    |          |          |          apart, so that every address is one base + constants
//     a[11]  |          |          |
//            +----------+----------+       C: rows of floats, `c_row` apart
//
// AVX-512 holds 12 x 2 panels in 24 of its 32 registers, AVX2 6 x 1 (two registers a panel) in 12
// of
// 16. Every element is summed in chains of fused multiply-adds over k in ascending order, which are
// added to C one after the other, whatever the number of rows beside it: a row gives the same bits
// in every batch.
#pragma once

namespace warpformer {

constexpr int kPanel = 16;            // columns of a packed panel, on every ISA
constexpr int kDepth = 256;           // longest stretch of k that one tile of A holds
constexpr int kStride = kDepth + 16;  // 17 cache lines: neighbouring rows fall into different sets
constexpr int kMaxTileRows = 12, kMaxTileColumns = 2 * kPanel;

}  // namespace warpformer

#if defined(WF_ISA)
#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kTilePanels = 2;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTilePanels = 1;
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
constexpr int kTileColumns = kTilePanels * kPanel;

WF_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
/// Stretches of kDepth that [0, depth) has; one even where it is empty, so that C is written as 0.
WF_INLINE int64_t stretches(int64_t depth) { return depth ? (depth + kDepth - 1) / kDepth : 1; }

/// Elements 2k and 2k + 1 along the depth, in bf16.
struct Pair {
  bf16 even, odd;
};

WF_INLINE Vec multiply_add(const float* a, Vec b, Vec sum) { return fma(set(*a), b, sum); }
#if defined(__AVX512BF16__)
WF_INLINE Vec multiply_add(const Pair* a, Vec b, Vec sum) {
  int32_t both;
  memcpy(&both, a, 4);
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(both), (__m512bh)b.v)};
}
#endif

/// Where the panels of B lie, in words.
struct Panels {
  const float* data;  // of Pairs too: a register of 16 words
  int64_t panel;      // from one panel to the next
  int64_t row;        // from one k to the next
};

/// Products summed in one chain before they are added to C: rounding grows with the length of the
/// chains and with their number, so short sums take short ones.
constexpr int64_t kChain = 64;
WF_INLINE int64_t chain(int64_t depth) { return depth <= 32 ? 8 : depth <= 64 ? 16 : kChain; }

/// How A lies in memory: its rows kStride apart, or its columns.
enum class Layout { rows, columns };

template <int kRows, int kPanels, Layout kLayout, class Word>
void gemm_tile(const Word* a, Panels b, int64_t depth, int64_t chain, float* c, int64_t c_row,
               bool add) {
  constexpr int64_t kRow = kLayout == Layout::rows ? kStride : 1;
  constexpr int64_t kColumn = kLayout == Layout::rows ? 1 : kStride;
  constexpr int kPerPanel = kPanel / Vec::kWidth, kVecs = kPerPanel * kPanels;
  const float* panel[kPanels];
#pragma GCC unroll 16
  for (int j = 0; j < kPanels; ++j) panel[j] = b.data + j * b.panel;
  int64_t k = 0;
  do {
    Vec acc[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] = set(0.0f);
    const int64_t end = at_most(k + chain, depth);
    for (; k < end; ++k) {
      Vec row[kVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j)
        row[j] = load(panel[j / kPerPanel] + j % kPerPanel * Vec::kWidth);
#pragma GCC unroll 16
      for (int j = 0; j < kPanels; ++j) panel[j] += b.row;
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j)
          acc[i][j] = multiply_add(a + i * kRow + k * kColumn, row[j], acc[i][j]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) {
        float* to = c + i * c_row + j * Vec::kWidth;
        store(to, add ? load(to) + acc[i][j] : acc[i][j]);
      }
    add = true;
  } while (k < depth);
}

template <Layout kLayout, int kRows = kTileRows, class Word>
void gemm_rows(int rows, int panels, const Word* a, Panels b, int64_t depth, int64_t chain,
               float* c, int64_t c_row, bool add) {
  if (rows == kRows) {
    if (panels == kTilePanels) {
      gemm_tile<kRows, kTilePanels, kLayout>(a, b, depth, chain, c, c_row, add);
    } else {
      gemm_tile<kRows, 1, kLayout>(a, b, depth, chain, c, c_row, add);
    }
  } else if constexpr (kRows > 1) {
    gemm_rows<kLayout, kRows - 1>(rows, panels, a, b, depth, chain, c, c_row, add);
  }
}

/// C[rows, 16 * panels] (+)= A[rows, depth] B, rows <= kTileRows, depth <= kDepth.
template <Layout kLayout = Layout::rows, class Word>
inline void gemm(int rows, int64_t panels, const Word* a, Panels b, int64_t depth, int64_t chain,
                 float* c, int64_t c_row, bool add) {
  for (int64_t p = 0; p < panels; p += kTilePanels) {
    const int now = panels - p < kTilePanels ? 1 : kTilePanels;
    gemm_rows<kLayout>(rows, now, a, {b.data + p * b.panel, b.panel, b.row}, depth, chain,
                       c + p * kPanel, c_row, add);
  }
}

}  // namespace warpformer::cpu::WF_ISA
#endif

// The matrix product that linear and attention share: one register tile at a time. A word of A or B
// is a float, or holds several neighbours along k: a Pair of bf16, whose sums are float, too, or
// Shorts or a Quad of bytes, whose sums are int32.
//
//              panel 0    panel 1          B: panels of 16 columns, row k of a panel is 16 words
//            +----------+----------+
//     a[0]   |  acc     |  acc     |       A: up to kTileRows rows of at most kDepth words, kStride
//     ...    |          |          |          apart, so that every address is one base + constants
//     a[11]  |          |          |
//            +----------+----------+       C: rows of floats, `c_row` apart
//
// AVX-512 holds 12 x 2 panels in 24 of its 32 registers, AVX2 6 x 1 (two registers a panel) in 12
// of 16; fewer rows take more panels. Every element is summed in chains over k in ascending order,
// which are added to C one after the other, whatever the number of rows beside it: a row gives the
// same bits in every batch.
#pragma once

namespace warpformer {

constexpr int kPanel = 16;            // columns of a packed panel, on every ISA
constexpr int kDepth = 256;           // longest stretch of k that one tile of A holds
constexpr int kStride = kDepth + 16;  // 17 cache lines: neighbouring rows fall into different sets

}  // namespace warpformer

#if defined(WF_ISA)
#include "core/integers.h"

namespace warpformer::cpu::WF_ISA {

#if defined(__AVX512F__)
constexpr int kTileRows = 12, kVecRegisters = 32;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kVecRegisters = 16;
#else
constexpr int kTileRows = 2, kVecRegisters = 16;
#endif

/// n columns in whole panels.
WF_INLINE int64_t padded(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

/// Stretches of kDepth that [0, depth) has; one even where it is empty, so that C is written as 0.
WF_INLINE int64_t stretches(int64_t depth) { return depth ? (depth + kDepth - 1) / kDepth : 1; }

/// Neighbours along the depth that one word of A or B holds, and that one instruction multiplies:
/// two bf16; two int16; or four bytes, signed in A and unsigned in B.
struct Pair {
  bf16 even, odd;
};
struct Shorts {
  int16_t even, odd;
};
struct Quad {
  int8_t byte[4];
};

/// Elements along the depth that a word holds.
template <class Word>
constexpr int64_t kPerWord = 1;
template <>
inline constexpr int64_t kPerWord<Pair> = 2;
template <>
inline constexpr int64_t kPerWord<Shorts> = 2;
template <>
inline constexpr int64_t kPerWord<Quad> = 4;

WF_INLINE int32_t word_at(const void* word) {
  int32_t bits;
  memcpy(&bits, word, 4);
  return bits;
}

WF_INLINE Vec multiply_add(const float* a, Vec b, Vec sum) { return fma(set(*a), b, sum); }
WF_INLINE Ints multiply_add(const Shorts* a, Vec b, Ints sum) {
  return add_products_of_halves(set(word_at(a)), bits_of(b), sum);
}
#if defined(__AVX512BF16__)
WF_INLINE Vec multiply_add(const Pair* a, Vec b, Vec sum) {
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)set(word_at(a)).v, (__m512bh)b.v)};
}
#endif
#if defined(__AVX512VNNI__)
constexpr bool kQuadSumsAreHalves = false;
WF_INLINE Ints multiply_add(const Quad* a, Vec b, Ints sum) {
  // The intrinsic's sum moves from register to register in GCC 12, and to memory.
  asm("vpdpbusd %1, %2, %0" : "+v"(sum.v) : "v"(set(word_at(a)).v), "v"(b.v));
  return sum;
}
#elif defined(__AVX2__)
constexpr bool kQuadSumsAreHalves = true;  // two of 16 bits, which the caller must know to suffice
WF_INLINE Ints multiply_add(const Quad* a, Vec b, Ints sum) {
  return add_products_of_bytes(bits_of(b), set(word_at(a)), sum);
}
#else
constexpr bool kQuadSumsAreHalves = false;
#endif

/// Where the panels of B lie, in words. Other types of B unpack as they load: one fetch gives
/// kWords words along k.
struct Panels {
  const float* data;  // of any word: a register of 16 of them
  int64_t panel;      // from one panel to the next
  int64_t row;        // from one k to the next

  static constexpr int kWords = 1;
  WF_INLINE Vec fetch(int64_t p, int64_t k, int v) const {
    return load(data + p * panel + k * row + v * Vec::kWidth);
  }
  template <int kWord>
  WF_INLINE Vec word(Vec fetched) const {
    return fetched;
  }
  template <int kPanels>
  WF_INLINE void prefetch(int64_t, int64_t) const {}
  WF_INLINE void skip(int64_t panels) { data += panels * panel; }
  WF_INLINE void skip_scales(int64_t) {}  // there are none between the words
};

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
/// f(Constant<0>{}), ..., f(Constant<kEnd - 1>{})
template <int kEnd, int kBegin = 0, class F>
WF_INLINE void unrolled(const F& f) {
  if constexpr (kBegin < kEnd) {
    f(Constant<kBegin>{});
    unrolled<kEnd, kBegin + 1>(f);
  }
}

/// Products summed in one chain before they are added to C: rounding grows with the length of the
/// chains and with their number, so short sums take short ones.
constexpr int64_t kChain = 64;
WF_INLINE int64_t chain(int64_t depth) { return depth <= 32 ? 8 : depth <= 64 ? 16 : kChain; }

/// How A lies in memory: its rows kStride apart (those of its parts one after the other), or its
/// columns.
enum class Layout { rows, columns };

/// Panels that a tile takes at a time which needs so many registers a column: with them it still
/// fits.
constexpr int tile_panels(int registers) {
  constexpr int kPerPanel = kPanel / Vec::kWidth;
  int panels = 8;
  while (panels > 1 && (registers + 1) * panels * kPerPanel + 1 > kVecRegisters) panels /= 2;
  return panels;
}

/// Where a tile's sums come from and go to, chain by chain: C += sum. A sink may hold C in
/// registers while a tile lasts; this one leaves it in memory.
struct Add {
  float* c;
  int64_t c_row;
  bool add;  // to what is there, from the first chain on

  struct None {};
  static constexpr int kRegisters = 1;  // for an element of C
  static constexpr int kChain = 0;  // words of a chain, of which the depth has whole ones; 0: any
  WF_INLINE None held(int, int) const { return {}; }
  WF_INLINE None scale(int64_t, int) const { return {}; }
  WF_INLINE int64_t lines_before(int64_t) const { return 0; }  // of scales in B, before a chain
  WF_INLINE Vec start(int64_t, int, int) const { return set(0.0f); }
  WF_INLINE None finish(int64_t chain, int i, int j, Vec sum, None, None) const {
    float* to = c + i * c_row + j * Vec::kWidth;
    store(to, add || chain ? load(to) + sum : sum);
    return {};
  }
  WF_INLINE void release(int, int, None) const {}
  WF_INLINE Add from(int64_t panel) const { return {c + panel * kPanel, c_row, add}; }
};

/// A is the sum of `kParts` matrices. `chain` words are summed in one chain. A function of its own:
/// inlined, it would share the registers of its loops with those around it.
template <int kRows, int kPanels, int kParts, Layout kLayout, class Word, class B, class Sink>
__attribute__((noinline)) void gemm_tile(const Word* a, const B& b, int64_t depth, int64_t chain,
                                         const Sink sink) {
  constexpr int64_t kRow = kLayout == Layout::rows ? kParts * kStride : 1;
  constexpr int64_t kColumn = kLayout == Layout::rows ? 1 : kStride;
  constexpr int kPerPanel = kPanel / Vec::kWidth, kVecs = kPerPanel * kPanels;
  int64_t k = 0, chains = 0;
  decltype(sink.held(0, 0)) held[kRows][kVecs];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) held[i][j] = sink.held(i, j);
  do {
    decltype(sink.start(0, 0, 0)) acc[kRows][kVecs];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) acc[i][j] = sink.start(chains, i, j);
    B of_chain = b;
    of_chain.skip_scales(sink.lines_before(chains));
    const auto multiply = [&](int64_t k) __attribute__((always_inline)) {
      decltype(b.fetch(0, 0, 0)) fetched[kVecs];
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j) fetched[j] = of_chain.fetch(j / kPerPanel, k, j % kPerPanel);
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; ++p) of_chain.template prefetch<kPanels>(p, k);
      unrolled<B::kWords>([&](auto word) __attribute__((always_inline)) {
        Vec row[kVecs];
#pragma GCC unroll 16
        for (int j = 0; j < kVecs; ++j) row[j] = of_chain.template word<word.value>(fetched[j]);
        const Word* column = a + (k + word.value) * kColumn;
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
          for (int part = 0; part < kParts; ++part)
#pragma GCC unroll 16
            for (int j = 0; j < kVecs; ++j)
              acc[i][j] = multiply_add(column + i * kRow + part * kStride, row[j], acc[i][j]);
      });
    };
    if constexpr (Sink::kChain > 0) {
      unrolled<Sink::kChain / B::kWords>(
          [&](auto i) __attribute__((always_inline)) { multiply(k + i.value * B::kWords); });
      k += Sink::kChain;
    } else {
      for (const int64_t end = at_most(k + chain, depth); k < end; k += B::kWords) multiply(k);
    }
    decltype(sink.scale(0, 0)) scale[kVecs];
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) scale[j] = sink.scale(chains, j);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
      for (int j = 0; j < kVecs; ++j)
        held[i][j] = sink.finish(chains, i, j, acc[i][j], scale[j], held[i][j]);
    asm volatile("" ::: "memory");  // or GCC carries C on the stack, too, to the next chain
    ++chains;
  } while (k < depth);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kVecs; ++j) sink.release(i, j, held[i][j]);
}

/// At most kRows rows.
template <int kParts, Layout kLayout, int kRows = kTileRows, class Word, class B, class Sink>
void gemm_rows(int rows, int64_t panels, const Word* a, B b, int64_t depth, int64_t chain,
               const Sink& sink) {
  if (rows == kRows) {
    constexpr int kPanels = tile_panels(kRows * Sink::kRegisters);
    int64_t p = 0;
    for (; p + kPanels <= panels; p += kPanels, b.skip(kPanels))
      gemm_tile<kRows, kPanels, kParts, kLayout>(a, b, depth, chain, sink.from(p));
    if constexpr (kPanels > 1)
      for (; p < panels; ++p, b.skip(1))
        gemm_tile<kRows, 1, kParts, kLayout>(a, b, depth, chain, sink.from(p));
  } else if constexpr (kRows > 1) {
    gemm_rows<kParts, kLayout, kRows - 1>(rows, panels, a, b, depth, chain, sink);
  }
}

/// C[rows, 16 * panels] (+)= A[rows, depth] B, rows <= kTileRows, depth <= kDepth.
template <Layout kLayout = Layout::rows, class Word>
inline void gemm(int rows, int64_t panels, const Word* a, Panels b, int64_t depth, int64_t chain,
                 float* c, int64_t c_row, bool add) {
  gemm_rows<1, kLayout>(rows, panels, a, b, depth, chain, Add{c, c_row, add});
}

}  // namespace warpformer::cpu::WF_ISA
#endif

// From rows of x to tiles of words of core/gemm.h, and what is known of each row:
//
//   row of x --float--> words              [tile][stretch][row of the tile][part][kStride]
//                       scales, offsets, zeros   [tile][block][row of the tile]    of quantized
//                       rows sums               [tile][stretch of groups][row of the tile][kStride]
//
// Tiles are about equally high, so that no small one is left over. Included by cpu files only.
#pragma once

#include "linear/words.h"

namespace warpformer::cpu::WF_ISA {

constexpr bool quantizes(Kind kind) { return kind == Kind::tokens || kind == Kind::blocks; }

/// Words of a row of n elements, 0 past the end.
template <class Word>
int64_t words_of(Format format, int64_t n) {
  return padded_depth(format, n) / kPerWord<Word>;
}

/// x ~ scale (q - zero), and the sum of q.
struct Quantized {
  float scale, zero, sum;
};

/// x[0, n) -> q; n is padded to whole registers. Tokens cover the range of x with 0 in it, blocks
/// are symmetric. Of NaN or infinity scale is NaN or infinity.
template <Kind kKind>
inline Quantized quantize(const float* x, int64_t n, int8_t* q) {
  constexpr bool kHasZero = kKind == Kind::tokens;
  // As integers, floats without sign are in order, with NaN above all others.
  Ints high = set(int32_t{0}), low = high;
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    const Ints bits = bits_of(load(x + i));
    high = max(high, kHasZero ? bits : bits & set(INT32_MAX));
    if (kHasZero) low = max(low, bits ^ set(INT32_MIN));
  }
  const float top = __builtin_bit_cast(float, max_lane(high));
  const float bottom = __builtin_bit_cast(float, max_lane(low));
  // Of halves, whose sum is finite.
  const float scale = kHasZero ? (0.5f * top + 0.5f * bottom) / 127.5f : top / 127.0f;
  if (!(scale > 0x1p-120f && scale < INFINITY)) {
    memset(q, 0, n);
    return {scale, 0.0f, 0.0f};
  }
  const float factor = 1.0f / scale, zero = kHasZero ? rintf(bottom * factor) - 128.0f : 0.0f;
  Vec total = set(0.0f);
  for (int64_t i = 0; i < n; i += Vec::kWidth) {
    const Vec v = min(round(load(x + i) * set(factor)) + set(zero), set(127.0f));
    store_bytes(q + i, v);
    total = total + v;  // exact: integers below 2^24
  }
  return {scale, zero, sum(total)};
}

template <class Word, int kParts, Kind kKind>
class Tiles {
 public:
  static constexpr int kRows = kKind == Kind::blocks ? (kTileRows + 1) / 2 : kTileRows;

  /// Of rows with `depth` elements in `words` words; sums are needed of `groups` groups of `group`
  /// elements.
  Tiles(int64_t depth, int64_t words, int64_t group, int64_t groups)
      : depth_(depth),
        length_(words * kPerWord<Word>),
        group_(group),
        groups_(groups),
        stretches_(stretches(words)),
        blocks_(kKind == Kind::tokens   ? 1
                : kKind == Kind::blocks ? (depth + kBlock - 1) / kBlock
                                        : 0) {}

  /// Floats that so many rows take, and that pack() works with.
  int64_t size(int64_t rows) const {
    return rows * (stretches_ * kParts * kStride + 3 * blocks_ +
                   (groups_ ? stretches(groups_) * kStride : 0));
  }
  int64_t buffer_size() const { return (depth_ + 2 * kBlock) / kPanel * kPanel * 2; }

  /// Makes tiles of the next `rows` rows, at `memory`.
  void begin(int64_t rows, float* memory) {
    count_ = (rows + kRows - 1) / kRows;
    low_ = rows / count_;
    higher_ = rows % count_;
    words_ = memory;
    scales_ = words_ + rows * stretches_ * kParts * kStride;
    offsets_ = reinterpret_cast<int32_t*>(scales_ + rows * blocks_);
    zeros_ = offsets_ + rows * blocks_;
    sums_ = scales_ + 3 * rows * blocks_;
  }

  int64_t count() const { return count_; }
  // Without a division, which takes as long as a part of a tile.
  int64_t first(int64_t tile) const { return low_ * tile + at_most(tile, higher_); }
  int height(int64_t tile) const { return static_cast<int>(low_ + (tile < higher_)); }

  const Word* words(int64_t tile, int64_t word) const {
    return reinterpret_cast<const Word*>(at(tile, word / kDepth, 0) + word % kDepth);
  }
  const float* sums(int64_t tile, int64_t group) const {
    return sums_ + (first(tile) * stretches(groups_) + group / kDepth * height(tile)) * kStride;
  }
  /// Of all rows of a tile, from a block on.
  const float* scales(int64_t tile, int64_t block) const {
    return scales_ + first(tile) * blocks_ + block * height(tile);
  }
  /// What the offset of the weight adds to a sum, negated; and the zero point.
  const int32_t* offsets(int64_t tile, int64_t block) const {
    return offsets_ + first(tile) * blocks_ + block * height(tile);
  }
  const int32_t* zeros(int64_t tile, int64_t block) const {
    return zeros_ + first(tile) * blocks_ + block * height(tile);
  }

  /// Row `row` of x -> row i of a tile. `buffer` has buffer_size() floats.
  void pack(const Rows& x, int64_t row, int64_t tile, int64_t i, float* buffer) {
    if (__is_same(Word, Pair) && kParts == 1) {
      for (int64_t s = 0; s < stretches_; ++s)
        pack_span(x, row, s, reinterpret_cast<bf16*>(at(tile, s, i)));
    } else if (__is_same(Word, float)) {
      for (int64_t s = 0; s < stretches_; ++s) pack_span(x, row, s, at(tile, s, i));
    }
    const bool whole = kKind == Kind::tokens && depth_ % kBlock == 0;
    const float* values = buffer;
    if (whole) {
      values = row_in(x, row, buffer);
    } else if (groups_ || quantizes(kKind) || kParts == 2) {
      read_span(x, row, 0, depth_, buffer);
      for (int64_t k = depth_; k < depth_ + kBlock; ++k) buffer[k] = 0.0f;
    }
    if constexpr (kParts == 2)
      for (int64_t s = 0; s < stretches_; ++s) split(buffer, s, at(tile, s, i));
    if constexpr (quantizes(kKind)) {
      pack_bytes(tile, i, values, buffer);
    } else {
      for (int64_t g = 0; g < groups_; ++g)
        *sum_at(tile, i, g) =
            sum_of_span(buffer + g * group_, at_most(group_, depth_ - g * group_));
    }
  }

 private:
  float* at(int64_t tile, int64_t stretch, int64_t i) const {
    return words_ + (first(tile) * stretches_ + stretch * height(tile) + i) * kParts * kStride;
  }
  float* sum_at(int64_t tile, int64_t i, int64_t group) const {
    return const_cast<float*>(sums(tile, group)) + i * kStride + group % kDepth;
  }

  static float sum_of_span(const float* x, int64_t n) {
    Sum total;
    for_lanes(n, [&](int64_t i, auto k) { total.add(load(x + i, k)); });
    return total.total();
  }

  /// A stretch as floats, or as bf16.
  template <class T>
  void pack_span(const Rows& x, int64_t row, int64_t stretch, T* to) const {
    constexpr int64_t kElements = kDepth * kPerWord<Word>;
    const int64_t begin = stretch * kElements, n = at_most(kElements, depth_ - begin);
    read_span(x, row, begin, n, to);
    for (int64_t k = n; k < at_most(kElements, length_ - begin); ++k) to[k] = {};
  }

  /// high + low = x up to 2^-17 of it.
  void split(const float* x, int64_t stretch, float* to) const {
#if defined(__AVX512BF16__)
    const int64_t begin = stretch * kDepth * 2, n = at_most(kDepth * 2, length_ - begin);
    bf16 *high = reinterpret_cast<bf16*>(to), *low = reinterpret_cast<bf16*>(to + kStride);
    for (int64_t k = 0; k < n; k += Vec::kWidth) {
      const Vec v = load(x + begin + k);
      const __m256i h = (__m256i)_mm512_cvtneps_pbh(v.v);
      const Vec rest = v - widen(h);
      const Vec finite = where_less(abs(rest), set(INFINITY), rest, set(0.0f));
      _mm256_storeu_si256((__m256i*)(high + k), h);
      _mm256_storeu_si256((__m256i*)(low + k), (__m256i)_mm512_cvtneps_pbh(finite.v));
    }
#else
    (void)x, (void)stretch, (void)to;
#endif
  }

  void pack_bytes(int64_t tile, int64_t i, const float* values, float* buffer) {
    const int64_t step = kKind == Kind::tokens ? (depth_ + kBlock - 1) / kBlock * kBlock : kBlock;
    int8_t* bytes = reinterpret_cast<int8_t*>(buffer + depth_ + kBlock);
    for (int64_t b = 0; b < blocks_; ++b) {
      Quantized row = quantize<kKind>(values + b * step, step, bytes + b * step);
      if constexpr (kKind == Kind::tokens) {
        memset(bytes + depth_, 0, step - depth_);
        row.sum -= row.zero * static_cast<float>(step - depth_);
      }
      const int64_t at = first(tile) * blocks_ + b * height(tile) + i;
      scales_[at] = row.scale;
      constexpr int32_t kOffset = kKind == Kind::tokens ? kByteOffset : kCodeOffset;
      offsets_[at] = -kOffset * static_cast<int32_t>(row.sum);
      zeros_[at] = static_cast<int32_t>(row.zero);
      buffer[b] = row.scale * row.sum;  // what was there has been read
    }
    for (int64_t g = 0; g < groups_; ++g) {
      const int64_t first = g * group_ / kBlock;
      float total = 0.0f;
      for (int64_t b = first; b < at_most(blocks_, first + (group_ + kBlock - 1) / kBlock); ++b)
        total += buffer[b];
      *sum_at(tile, i, g) = total;
    }
    for (int64_t s = 0; s < stretches_; ++s) {
      const int64_t begin = s * kDepth * kPerWord<Word>;
      const int64_t n = at_most(kDepth * kPerWord<Word>, length_ - begin);
      store_words(bytes + begin, n, reinterpret_cast<Word*>(at(tile, s, i)));
    }
  }
  static void store_words(const int8_t* q, int64_t n, Quad* to) { memcpy(to, q, n > 0 ? n : 0); }
  static void store_words(const int8_t* q, int64_t n, Shorts* to) {
    for (int64_t k = 0; k < n; k += 4, to += 2) {
      to[0] = {q[k], q[k + 2]};
      to[1] = {q[k + 1], q[k + 3]};
    }
  }
  static void store_words(const int8_t*, int64_t, float*) {}
  static void store_words(const int8_t*, int64_t, Pair*) {}

  const int64_t depth_, length_, group_, groups_, stretches_, blocks_;
  int64_t count_ = 1, low_ = 0, higher_ = 0;  // tiles; rows of each, and those that have one more
  float *words_ = nullptr, *scales_ = nullptr, *sums_ = nullptr;
  int32_t *offsets_ = nullptr, *zeros_ = nullptr;
};

}  // namespace warpformer::cpu::WF_ISA

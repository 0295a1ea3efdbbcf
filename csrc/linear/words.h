// From a panel of a packed weight to words of core/gemm.h:
//
//   panel  --widen, look up, split into bytes-->  words [n][16]        (L1, or the panel itself)
//
// Included by cpu files only.
#pragma once

#include "linear/op.h"

namespace warpformer::cpu::WF_ISA {

/// Elements along the depth that a word holds.
template <class Word>
constexpr int64_t kPerWord = 1;
template <>
inline constexpr int64_t kPerWord<Pair> = 2;
template <>
inline constexpr int64_t kPerWord<Shorts> = 2;
template <>
inline constexpr int64_t kPerWord<Quad> = 4;

/// What the ISA multiplies bytes by; and what it adds to one of the weight, which in a Quad has no
/// sign.
#if defined(__AVX512VNNI__)
using DynamicWord = Quad;
constexpr int32_t kByteOffset = 128, kCodeOffset = 8;
#else
using DynamicWord = Shorts;
constexpr int32_t kByteOffset = 0, kCodeOffset = 0;
#endif

/// 4-bit NormalFloat: the quantiles of a normal distribution ("QLoRA", appendix E).
constexpr float kNormalFloat[16] = {
    -1.0f,           -0.69619280099f, -0.52507305145f, -0.39491748809f,
    -0.28444138169f, -0.18477343023f, -0.09105003625f, 0.0f,
    0.07958029955f,  0.16093020141f,  0.24611230195f,  0.33791524171f,
    0.44070982933f,  0.56261700391f,  0.72295683622f,  1.0f};

/// Bits by which code k % 8 of a word is shifted.
WF_INLINE int code_shift(Format format, int64_t k) {
  const int at = static_cast<int>(k % 8);
  return format == Format::int4_dynamic ? at % 4 * 8 + at / 4 * 4 : at % 2 * 16 + at / 2 * 4;
}

/// Lines of a panel that are fetched ahead while it is unpacked; the hardware stops at every page.
constexpr int64_t kAhead = 1024;  // bytes
WF_INLINE void fetch_ahead(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kAhead);
}

template <class T>
void widen(const T* values, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += Vec::kWidth) store(to + i, load(values + i));
}

/// Rows of pairs -> two rows of floats each.
inline void widen_pairs(const bf16* pairs, int64_t words, float* to) {
  for (int64_t i = 0; i < words; ++i)
    for (int64_t j = 0; j < kPanel; j += Vec::kWidth) {
      const Ints both = load(reinterpret_cast<const int32_t*>(pairs) + i * kPanel + j);
      const Ints odd = both & set(static_cast<int32_t>(0xFFFF0000));
      store(to + 2 * i * kPanel + j, bits_as_float(shift_left<16>(both)));
      store(to + (2 * i + 1) * kPanel + j, bits_as_float(odd));
    }
}
inline void widen_pairs(const int8_t* pairs, int64_t words, float* to) {
  for (int64_t i = 0; i < words; ++i)
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t k = 0; k < 2; ++k)
        to[(2 * i + k) * kPanel + j] = pairs[(i * kPanel + j) * 2 + k];
}
inline void widen_quads(const uint8_t* quads, int64_t words, float* to) {
  for (int64_t i = 0; i < words; ++i)
    for (int64_t j = 0; j < kPanel; ++j)
      for (int64_t k = 0; k < 4; ++k)
        to[(4 * i + k) * kPanel + j] = static_cast<float>(quads[(i * kPanel + j) * 4 + k] - 128);
}

/// The 16 values of a code, for vectors of floats.
struct Codebook {
#if defined(__AVX512F__)
  Vec table;
  explicit Codebook(const float* values) : table(load(values)) {}
  template <int kShift>
  WF_INLINE Vec look_up(Ints codes) const {  // of the lowest 4 bits after the shift
    return {_mm512_permutexvar_ps(shift_right<kShift>(codes).v, table.v)};
  }
#elif defined(__AVX2__)
  Vec low, high;
  explicit Codebook(const float* values) : low(load(values)), high(load(values + 8)) {}
  template <int kShift>
  WF_INLINE Vec look_up(Ints codes) const {
    const __m256i index = shift_right<kShift>(codes).v;
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low.v, index),
                             _mm256_permutevar8x32_ps(high.v, index),
                             _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)))};
  }
#else
  const float* values;
  explicit Codebook(const float* values) : values(values) {}
  template <int kShift>
  WF_INLINE Vec look_up(Ints codes) const {
    const Ints i = shift_right<kShift>(codes) & set(15);
    return {Float4{values[i.v[0]], values[i.v[1]], values[i.v[2]], values[i.v[3]]}};
  }
#endif
};

/// Words of 8 codes -> 8 rows of floats each, in the order of `kShifts`.
template <int... kShifts>
void look_up_codes(const int32_t* words, int64_t n, const float* values, float* to) {
  const Codebook book(values);
  for (int64_t i = 0; i < n; ++i, words += kPanel, to += 8 * kPanel) {
    fetch_ahead(words);
    for (int64_t j = 0; j < kPanel; j += Vec::kWidth) {
      const Ints codes = load(words + j);
      float* row = to + j;
      ((store(row, book.look_up<kShifts>(codes)), row += kPanel), ...);
    }
  }
}

constexpr float kCentred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

/// Elements [first, first + n) of the depth as floats [n][16], before scales; both are multiples of
/// 8, and n goes to the end of the padded depth at most.
inline void unpack(const Weight& w, const uint8_t* panel, int64_t first, int64_t n, float* to,
                   float) {
  const auto* floats = reinterpret_cast<const float*>(panel) + first * kPanel;
  const auto* halves = reinterpret_cast<const f16*>(panel) + first * kPanel;
  const auto* pairs = reinterpret_cast<const bf16*>(panel) + first * kPanel;
  const auto* codes = reinterpret_cast<const int32_t*>(panel) + first / 8 * kPanel;
  switch (w.format) {
    case Format::f32:
      return widen(floats, n * kPanel, to);
    case Format::f16:
      return widen(halves, n * kPanel, to);
    case Format::bf16:
      return widen_pairs(pairs, (n + 1) / 2, to);
    case Format::int8:
      return widen_pairs(reinterpret_cast<const int8_t*>(panel) + first * kPanel, (n + 1) / 2, to);
    case Format::int8_dynamic:
      return widen_quads(panel + first * kPanel, (n + 3) / 4, to);
    case Format::int4:
      return look_up_codes<0, 16, 4, 20, 8, 24, 12, 28>(codes, (n + 7) / 8, kCentred, to);
    case Format::nf4:
      return look_up_codes<0, 16, 4, 20, 8, 24, 12, 28>(codes, (n + 7) / 8, kNormalFloat, to);
    case Format::int4_dynamic:
      return look_up_codes<0, 8, 16, 24, 4, 12, 20, 28>(codes, (n + 7) / 8, kCentred, to);
  }
}

#if defined(__AVX512BF16__)
/// The same as Pairs: of int8 and int4.
inline void unpack(const Weight& w, const uint8_t* panel, int64_t first, int64_t n, float* to,
                   Pair) {
  if (w.format == Format::int8) {
    const auto* pairs = reinterpret_cast<const int8_t*>(panel) + first * kPanel;
    for (int64_t i = 0; i < (n + 1) / 2; ++i, pairs += 2 * kPanel, to += kPanel) {
      fetch_ahead(pairs);
      const Vec low = load(pairs), high = load(pairs + kPanel);
      _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v));
    }
    return;
  }
  // vpermw looks at 5 bits of an index, of which the fifth is the next code's: the table is there
  // twice.
  alignas(64) bf16 values[32];
  for (int i = 0; i < 32; ++i) values[i] = from_float<bf16>(kCentred[i % 16]);
  const __m512i table = _mm512_load_si512(values);
  const auto* codes = reinterpret_cast<const int32_t*>(panel) + first / 8 * kPanel;
  for (int64_t i = 0; i < (n + 7) / 8; ++i, codes += kPanel, to += 4 * kPanel) {
    fetch_ahead(codes);
    const __m512i word = load(codes).v;
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(word, table));
    _mm512_storeu_si512(to + kPanel, _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 4), table));
    _mm512_storeu_si512(to + 2 * kPanel,
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 8), table));
    _mm512_storeu_si512(to + 3 * kPanel,
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(word, 12), table));
  }
}
#endif

WF_INLINE void store_ints(float* to, Ints i) { store(reinterpret_cast<int32_t*>(to), i); }

/// The same for products of bytes: of int8_dynamic and int4_dynamic. Shorts take the bytes of a
/// quad in the order 0 2 1 3.
inline void unpack(const Weight& w, const uint8_t* panel, int64_t first, int64_t n, float* to,
                   Shorts) {
  const Ints byte = set(0x00FF00FF), centre = set(0x00080008), nibbles = set(0x0F0F0F0F);
  for (int64_t i = 0; w.format == Format::int8_dynamic && i < (n + 3) / 4; ++i, to += 2 * kPanel)
    for (int64_t j = 0; j < kPanel; j += Vec::kWidth) {
      const auto* quads = reinterpret_cast<const int32_t*>(panel + (first + 4 * i) * kPanel);
      const Ints bytes = load(quads + j) ^ set(static_cast<int32_t>(0x80808080));
      store_ints(to + j, shift_right_halves<8>(shift_left_halves<8>(bytes)));
      store_ints(to + kPanel + j, shift_right_halves<8>(bytes));
    }
  for (int64_t i = 0; w.format == Format::int4_dynamic && i < (n + 7) / 8; ++i, to += 4 * kPanel)
    for (int64_t j = 0; j < kPanel; j += Vec::kWidth) {
      const auto* codes = reinterpret_cast<const int32_t*>(panel) + (first / 8 + i) * kPanel;
      const Ints word = load(codes + j);
      const Ints low = word & nibbles, high = shift_right<4>(word) & nibbles;
      store_ints(to + j, subtract_halves(low & byte, centre));
      store_ints(to + kPanel + j, subtract_halves(shift_right<8>(low) & byte, centre));
      store_ints(to + 2 * kPanel + j, subtract_halves(high & byte, centre));
      store_ints(to + 3 * kPanel + j, subtract_halves(shift_right<8>(high) & byte, centre));
    }
}
/// Of int4_dynamic alone: the other one is stored as quads.
inline void unpack(const Weight&, const uint8_t* panel, int64_t first, int64_t n, float* to, Quad) {
  const auto* codes = reinterpret_cast<const int32_t*>(panel) + first / 8 * kPanel;
  const Ints nibbles = set(0x0F0F0F0F);
  for (int64_t i = 0; i < (n + 7) / 8; ++i, codes += kPanel, to += 2 * kPanel) {
    fetch_ahead(codes);
    for (int64_t j = 0; j < kPanel; j += Vec::kWidth) {
      const Ints word = load(codes + j);
      store_ints(to + j, word & nibbles);
      store_ints(to + kPanel + j, shift_right<4>(word) & nibbles);
    }
  }
}

/// Whether a panel already consists of such words.
template <class Word>
bool is_stored(Format format) {
  return __is_same(Word, float)  ? format == Format::f32
         : __is_same(Word, Pair) ? format == Format::bf16
         : __is_same(Word, Quad) ? format == Format::int8_dynamic
                                 : false;
}

/// Scales of groups [first, first + n) of a panel, as floats [n][16].
inline void unpack_scales(const Weight& w, const uint8_t* panel, int64_t first, int64_t n,
                          float* to) {
  widen(reinterpret_cast<const f16*>(panel + w.scales) + first * kPanel, n * kPanel, to);
}
/// scale (8 - zero) of the same: what a sum of x is multiplied by, as codes are centred at 8.
inline void unpack_zeros(const Weight& w, const uint8_t* panel, int64_t first, int64_t n,
                         float* to) {
  if (w.groups) {
    unpack_scales(w, panel, first, n, to);
  } else {
    for (int64_t j = 0; j < kPanel; ++j) to[j] = 1.0f;
  }
  const uint8_t* zeros = panel + w.zeros + first * kPanel;
  for (int64_t i = 0; i < n * kPanel; ++i) to[i] *= static_cast<float>(8 - zeros[i]);
}

}  // namespace warpformer::cpu::WF_ISA

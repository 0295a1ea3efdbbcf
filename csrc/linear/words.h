// From the values of packed panels to words of core/gemm.h: each struct here is a B of gemm_tile
// over panels of one layout, one fetch of which gives kWords words along k.
//
//   values  --fetch-->  a register  --shift, look up, split into bytes-->  kWords words
//
// Few rows multiply them as they come; for many, they are unpacked into L1 first.
// Included by cpu files only.
#pragma once

#include "linear/op.h"

namespace warpformer::cpu::WF_ISA {

/// What the ISA multiplies the bytes of tokens and of blocks by; and what it adds to one of the
/// weight, which in a Quad has no sign.
#if defined(__AVX512VNNI__)
using TokenWord = Quad;
constexpr int32_t kByteOffset = 128;
#else
using TokenWord = Shorts;
constexpr int32_t kByteOffset = 0;
#endif
#if defined(__AVX2__)
using BlockWord = Quad;
constexpr int32_t kCodeOffset = 8;
#else
using BlockWord = Shorts;
constexpr int32_t kCodeOffset = 0;
#endif

/// 4-bit NormalFloat: the quantiles of a normal distribution ("QLoRA", appendix E).
alignas(64) constexpr float kNormalFloat[16] = {
    -1.0f,           -0.69619280099f, -0.52507305145f, -0.39491748809f,
    -0.28444138169f, -0.18477343023f, -0.09105003625f, 0.0f,
    0.07958029955f,  0.16093020141f,  0.24611230195f,  0.33791524171f,
    0.44070982933f,  0.56261700391f,  0.72295683622f,  1.0f};

/// What goes into a sum of products before it is complete: nothing, the scale of a group, or those
/// of quantized rows (tokens) or blocks of them.
enum class Kind { plain, grouped, tokens, blocks };

/// Bits by which code k % 8 of a word is shifted.
constexpr int code_shift(Format format, int64_t k) {
  const int at = static_cast<int>(k % 8);
  return format == Format::int4_dynamic ? at % 4 * 8 + at / 4 * 4 : at % 2 * 16 + at / 2 * 4;
}

constexpr int64_t kScalesLine = 64;  // bytes of the scales of two groups of a panel

/// Where in a panel the values of element k begin, behind the scales of its two groups.
inline int64_t values_at(const Weight& w, int64_t k) {
  const int64_t lines = w.groups ? k / (2 * w.group) + 1 : 0;
  return k * kPanel * bits_of(w.format) / 8 + lines * kScalesLine;
}
/// The scales of group g of a panel that has groups.
inline const f16* scales_of(const Weight& w, const uint8_t* panel, int64_t g) {
  const uint8_t* line = panel + values_at(w, g / 2 * 2 * w.group) - kScalesLine;
  return reinterpret_cast<const f16*>(line) + g % 2 * kPanel;
}

/// Bytes by which memory is fetched ahead: beside their products, the loads of several panels would
/// not keep it busy. Two groups of int4_dynamic with their scales, or four: then values fetch all
/// values, and scales all scales.
constexpr int64_t kAhead = 576, kFarAhead = 1152;

/// Brings a line into L2, which waits for more lines at a time than L1 does.
WF_INLINE void fetch_line(const void* at) { __builtin_prefetch(at, 0, 2); }

/// Panels `panel` bytes apart whose fetches of `kBytes` bytes for each of 16 columns give kWords
/// words.
template <int kBytes, int kWordsOfFetch>
struct Values {
  static constexpr int kWords = kWordsOfFetch;
  const uint8_t* data;
  int64_t panel;

  WF_INLINE const uint8_t* place(int64_t p, int64_t k, int v) const {
    return data + p * panel + k / kWords * (kPanel * kBytes) + v * (Vec::kWidth * kBytes);
  }
  template <class T>
  WF_INLINE const T* at(int64_t p, int64_t k, int v) const {
    return reinterpret_cast<const T*>(place(p, k, v));
  }
  /// Few panels at a time wait for products more than for memory: theirs come into L1 alone.
  template <int kPanels>
  WF_INLINE void prefetch(int64_t p, int64_t k) const {
    const uint8_t* line = place(p, k, 0);
    kPanels > 2 ? fetch_line(line + kFarAhead) : __builtin_prefetch(line + kAhead, 0, 0);
  }
  WF_INLINE void skip(int64_t panels) { data += panels * panel; }
  WF_INLINE void skip_scales(int64_t lines) { data += lines * kScalesLine; }
};

/// Words as they are.
struct Words : Values<4, 1> {
  WF_INLINE Vec fetch(int64_t p, int64_t k, int v) const { return load(at<float>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Vec fetched) const {
    return fetched;
  }
};

struct HalfFloats : Values<2, 1> {
  WF_INLINE Vec fetch(int64_t p, int64_t k, int v) const { return load(at<f16>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Vec fetched) const {
    return fetched;
  }
};

/// Pairs of bf16 -> floats.
struct BrainFloats : Values<4, 2> {
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const { return load(at<int32_t>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Ints fetched) const {
    return bits_as_float(kWord ? fetched & set(static_cast<int32_t>(0xFFFF0000))
                               : shift_left<16>(fetched));
  }
};

/// Neighbours of one byte each -> floats: kWords of them, which int8_dynamic has without sign.
template <int kNeighbours>
struct ByteFloats : Values<kNeighbours, kNeighbours> {
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const {
    if constexpr (kNeighbours == 2) return load(this->template at<int16_t>(p, k, v));
    return load(this->template at<int32_t>(p, k, v)) ^ set(static_cast<int32_t>(0x80808080));
  }
  template <int kWord>
  WF_INLINE Vec word(Ints bytes) const {
    return to_float(shift_right_signed<24>(shift_left<24 - 8 * kWord>(bytes)));
  }
};

/// 8 codes -> floats out of a table of 16.
template <Format kFormat>
struct CodeFloats : Values<4, 8> {
  const float* values;
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const { return load(at<int32_t>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Ints codes) const {
    const Ints index = shift_right<code_shift(kFormat, kWord)>(codes);
#if defined(__AVX512F__)
    return {_mm512_permutexvar_ps(index.v, load(values).v)};  // of the lowest 4 bits
#elif defined(__AVX2__)
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(load(values).v, index.v),
                             _mm256_permutevar8x32_ps(load(values + 8).v, index.v),
                             _mm256_castsi256_ps(_mm256_slli_epi32(index.v, 28)))};
#else
    const Ints i = index & set(15);
    return {Float4{values[i.v[0]], values[i.v[1]], values[i.v[2]], values[i.v[3]]}};
#endif
  }
};
alignas(64) constexpr float kCentred[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

#if defined(__AVX512BF16__)
/// Two bytes -> Pairs.
struct BytePairs : Values<2, 1> {
  WF_INLINE Vec fetch(int64_t p, int64_t k, int v) const {
    const int8_t* bytes = at<int8_t>(p, k, v);
    return {(__m512)_mm512_cvtne2ps_pbh(load(bytes + kPanel).v, load(bytes).v)};
  }
  template <int kWord>
  WF_INLINE Vec word(Vec fetched) const {
    return fetched;
  }
};

/// -8 to 7 in bf16, twice: vpermw looks at 5 bits of an index, of which the fifth is the next
/// code's.
alignas(64) constexpr uint16_t kCentredPairs[32] = {
    0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000,
    0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040,
    0xC000, 0xBF80, 0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0};

/// kNormalFloat, likewise.
alignas(64) constexpr uint16_t kNormalFloatPairs[32] = {
    0xBF80, 0xBF32, 0xBF06, 0xBECA, 0xBE92, 0xBE3D, 0xBDBA, 0x0000, 0x3DA3, 0x3E25, 0x3E7C,
    0x3EAD, 0x3EE2, 0x3F10, 0x3F39, 0x3F80, 0xBF80, 0xBF32, 0xBF06, 0xBECA, 0xBE92, 0xBE3D,
    0xBDBA, 0x0000, 0x3DA3, 0x3E25, 0x3E7C, 0x3EAD, 0x3EE2, 0x3F10, 0x3F39, 0x3F80};

/// 8 codes -> Pairs out of a table of 16, twice.
struct CodePairs : Values<4, 4> {
  const uint16_t* values;
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const { return load(at<int32_t>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Ints codes) const {
    return {_mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(codes.v, 4 * kWord),
                                                         _mm512_load_si512(values)))};
  }
};
#endif

/// 8 codes -> Quads of bytes, with 8 added.
struct CodeQuads : Values<4, 2> {
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const { return load(at<int32_t>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Ints codes) const {
    return bits_as_float((kWord ? shift_right<4>(codes) : codes) & set(0x0F0F0F0F));
  }
};

/// Four bytes, or 8 codes, -> Shorts, which take each four in the order 0 2 1 3.
struct ByteShorts : Values<4, 2> {
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const {
    return load(at<int32_t>(p, k, v)) ^ set(static_cast<int32_t>(0x80808080));
  }
  template <int kWord>
  WF_INLINE Vec word(Ints bytes) const {
    return bits_as_float(shift_right_halves<8>(kWord ? bytes : shift_left_halves<8>(bytes)));
  }
};
struct CodeShorts : Values<4, 4> {
  WF_INLINE Ints fetch(int64_t p, int64_t k, int v) const { return load(at<int32_t>(p, k, v)); }
  template <int kWord>
  WF_INLINE Vec word(Ints codes) const {
    constexpr int kShift = kWord / 2 * 4 + kWord % 2 * 8;
    const Ints code = (kShift ? shift_right<kShift>(codes) : codes) & set(0x000F000F);
    return bits_as_float(subtract_halves(code, set(0x00080008)));
  }
};

/// f(B) with the B of a format for a word, from word `first` of the panels at `panel` on. Sums by
/// groups are those of codes and of int8, sums by blocks those of codes, sums by tokens of bytes.
template <Kind kKind, class F>
void with_values(const Weight& w, const uint8_t* panel, int64_t first, float, const F& f) {
  const uint8_t* data = panel + values_at(w, first);
  if (w.format == Format::int4_dynamic)
    return f(CodeFloats<Format::int4_dynamic>{{data, w.size}, kCentred});
  if (is_4_bit(w.format))
    return f(CodeFloats<Format::int4>{{data, w.size},
                                      w.format == Format::nf4 ? kNormalFloat : kCentred});
  if (w.format == Format::int8) return f(ByteFloats<2>{{data, w.size}});
  if constexpr (kKind == Kind::plain) {
    if (w.format == Format::f16) return f(HalfFloats{{data, w.size}});
    if (w.format == Format::bf16) return f(BrainFloats{{data, w.size}});
    if (w.format == Format::int8_dynamic) return f(ByteFloats<4>{{data, w.size}});
    f(Words{{data, w.size}});
  }
}
#if defined(__AVX512BF16__)
template <Kind kKind, class F>
void with_values(const Weight& w, const uint8_t* panel, int64_t first, Pair, const F& f) {
  const uint8_t* data = panel + values_at(w, first * kPerWord<Pair>);
  if (is_4_bit(w.format))
    return f(
        CodePairs{{data, w.size}, w.format == Format::nf4 ? kNormalFloatPairs : kCentredPairs});
  if (w.format == Format::int8) return f(BytePairs{{data, w.size}});
  if constexpr (kKind == Kind::plain) f(Words{{data, w.size}});
}
#endif
template <Kind kKind, class F>
void with_values(const Weight& w, const uint8_t* panel, int64_t first, Quad, const F& f) {
  const uint8_t* data = panel + values_at(w, first * kPerWord<Quad>);
  if constexpr (kKind == Kind::blocks) {
    f(CodeQuads{{data, w.size}});
  } else {
    f(Words{{data, w.size}});
  }
}
template <Kind kKind, class F>
void with_values(const Weight& w, const uint8_t* panel, int64_t first, Shorts, const F& f) {
  const uint8_t* data = panel + values_at(w, first * kPerWord<Shorts>);
  if constexpr (kKind == Kind::blocks) {
    f(CodeShorts{{data, w.size}});
  } else {
    f(ByteShorts{{data, w.size}});
  }
}

/// Words [begin, end) of panel p, with no scales between, up to a whole fetch -> [words][16].
template <class B>
void unpack(const B& b, int64_t p, int64_t begin, int64_t end, float* to) {
  constexpr int kPerPanel = kPanel / Vec::kWidth;
  for (int64_t k = begin; k < end; k += B::kWords, to += B::kWords * kPanel) {
    b.template prefetch<1>(p, k);
    for (int v = 0; v < kPerPanel; ++v) {
      const auto fetched = b.fetch(p, k, v);
      unrolled<B::kWords>([&](auto word) __attribute__((always_inline)) {
        store(to + word.value * kPanel + v * Vec::kWidth, b.template word<word.value>(fetched));
      });
    }
  }
}

/// Scales of group g of a panel, times (8 - zero): what a sum of x is multiplied by, as codes are
/// centred at 8. Without groups, the scale is in the factors.
inline void unpack_zeros(const Weight& w, const uint8_t* panel, int64_t g, float* to) {
  const f16* scales = w.groups ? scales_of(w, panel, g) : nullptr;
  const uint8_t* zeros = panel + w.zeros + g * kPanel;
  for (int64_t j = 0; j < kPanel; j += Vec::kWidth)
    store(to + j, scales ? load(scales + j) : set(1.0f));
  for (int64_t j = 0; j < kPanel; ++j) to[j] *= static_cast<float>(8 - zeros[j]);
}

}  // namespace warpformer::cpu::WF_ISA

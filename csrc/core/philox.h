// Philox4x32-10: random words as a function of a counter and a key. Counter n of seed s gives four
// words of 32 bits, whoever asks and in whatever order.
//
// Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
#pragma once

#include <stdint.h>

namespace warpformer {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxKeyStep0 = 0x9E3779B9u, kPhiloxKeyStep1 = 0xBB67AE85u;

/// What a dropout of probability p draws: word w keeps where w >= threshold.
struct Draw {
  const int64_t* seed;
  uint64_t threshold;  // p 2^32
  float scale;         // 1 / (1 - p), of what is kept
};

}  // namespace warpformer

#if defined(WF_ISA)
#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

/// A register of words, and one of 64-bit lanes, of which the low halves count.
typedef uint32_t Words __attribute__((vector_size(4 * Vec::kWidth)));
typedef uint64_t Lanes __attribute__((vector_size(4 * Vec::kWidth)));
constexpr int kPhiloxCounters = Vec::kWidth / 2;  // of one step: two registers of words

// Lane i works on counter kOrder[i], so that the words of the even lanes come first in memory.
#if defined(__AVX512F__)
constexpr Lanes kOrder = {0, 4, 1, 5, 2, 6, 3, 7};
WF_INLINE Lanes multiply(Lanes a, uint32_t b) {
  return (Lanes)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
}
WF_INLINE Lanes even(Lanes a, Lanes b) {
  return (Lanes)_mm512_unpacklo_epi64((__m512i)a, (__m512i)b);
}
WF_INLINE Lanes odd(Lanes a, Lanes b) {
  return (Lanes)_mm512_unpackhi_epi64((__m512i)a, (__m512i)b);
}
#elif defined(__AVX2__)
constexpr Lanes kOrder = {0, 2, 1, 3};
WF_INLINE Lanes multiply(Lanes a, uint32_t b) {
  return (Lanes)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
}
WF_INLINE Lanes even(Lanes a, Lanes b) {
  return (Lanes)_mm256_unpacklo_epi64((__m256i)a, (__m256i)b);
}
WF_INLINE Lanes odd(Lanes a, Lanes b) {
  return (Lanes)_mm256_unpackhi_epi64((__m256i)a, (__m256i)b);
}
#else
constexpr Lanes kOrder = {0, 1};
WF_INLINE Lanes multiply(Lanes a, uint32_t b) { return (a & UINT32_MAX) * b; }
WF_INLINE Lanes even(Lanes a, Lanes b) { return Lanes{a[0], b[0]}; }
WF_INLINE Lanes odd(Lanes a, Lanes b) { return Lanes{a[1], b[1]}; }
#endif

/// first, second = the words of counters n, n + 1, ... n + kPhiloxCounters - 1, in this order;
/// `high` is the upper half of each counter.
WF_INLINE void philox(uint64_t seed, uint64_t n, uint64_t high, Words& first, Words& second) {
  const Lanes counter = kOrder + n;
  Lanes c0 = counter, c1 = counter >> 32, c2 = Lanes{} + (high & UINT32_MAX),
        c3 = Lanes{} + (high >> 32);
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Lanes p0 = multiply(c0, kPhiloxMultiplier0), p1 = multiply(c2, kPhiloxMultiplier1);
    c0 = p1 >> 32 ^ c1 ^ uint64_t{k0};
    c2 = p0 >> 32 ^ c3 ^ uint64_t{k1};
    c1 = p1;
    c3 = p0;
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  const Lanes low = (c0 & UINT32_MAX) | c1 << 32, rest = (c2 & UINT32_MAX) | c3 << 32;
  first = (Words)even(low, rest);
  second = (Words)odd(low, rest);
}

/// factors[i] = scale or 0 by word i from `counter` on, for at least n of them: whole steps of 2
/// registers.
inline void draw(const Draw& d, uint64_t counter, uint64_t high, int64_t n, float* factors) {
  if (d.threshold == 0 || d.threshold > UINT32_MAX) {  // all are kept, or none
    const Vec factor = set(d.threshold ? 0.0f : d.scale);
    for (int64_t i = 0; i < n; i += Vec::kWidth) store(factors + i, factor);
    return;
  }
  const Words scale = (Words)set(d.scale).v;
  const auto threshold = static_cast<uint32_t>(d.threshold);
  const auto seed = static_cast<uint64_t>(*d.seed);
  for (int64_t i = 0; i < n; i += 2 * Vec::kWidth, counter += kPhiloxCounters) {
    Words words[2];
    philox(seed, counter, high, words[0], words[1]);
    for (Words& w : words) w = (Words)(w >= threshold) & scale;
    memcpy(factors + i, words, sizeof words);
  }
}

}  // namespace warpformer::cpu::WF_ISA
#endif

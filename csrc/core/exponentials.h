// What softmax and cross-entropy share: a row of scores, and the sum of its exponentials.
#pragma once

#include "core/rows.h"

namespace warpformer::cpu::WF_ISA {

/// A maximum in interleaved chains, as Sum has them; -inf of nothing. NaN may be lost: it shows in
/// the sum.
struct Max {
  Vec chain[4] = {set(-INFINITY), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
  WF_INLINE void add(Vec v) {
    const Vec first = max(chain[0], v);
    chain[0] = chain[1];
    chain[1] = chain[2];
    chain[2] = chain[3];
    chain[3] = first;
  }
  WF_INLINE float total() const {
    return max_lane(max(max(chain[0], chain[1]), max(chain[2], chain[3])));
  }
};

/// The largest of scale * z.
inline float largest(const float* z, int64_t n, float scale = 1.0f) {
  Max high;
  for_lanes(n,
            [&](int64_t i, auto k) { high.add(pad(load(z + i, k) * set(scale), k, -INFINITY)); });
  return high.total();
}

/// Row `next` of `rows` is fetched while a kernel computes: it names the share that element i of n
/// brings along. The hardware's own prefetching ends with every page.
struct Prefetch {
  const char* data = nullptr;
  int64_t size = 0;
  Prefetch(const Rows& rows, int64_t next) {
    if (rows.step != 1 || next >= rows.count) return;
    size = rows.dtype == DType::f32 ? 4 : 2;
    data = static_cast<const char*>(rows.data) + row_offset(rows, next) * size;
  }
  WF_INLINE void fetch(int64_t i) const { __builtin_prefetch(data + i * size); }
};

constexpr int64_t kSumBlock = 2048;

/// The sum over [0, n) of term(i, lanes), which is 0 past the end: in blocks, because a long chain
/// of additions rounds more.
template <class F>
WF_INLINE float sum_of(int64_t n, const F& term) {
  float total = 0;
  for (int64_t first = 0; first < n; first += kSumBlock) {
    Sum block;
    for_lanes(n - first < kSumBlock ? n - first : kSumBlock,
              [&](int64_t i, auto k) { block.add(term(first + i, k)); });
    total += block.total();
  }
  return total;
}

/// The same for rows in the lanes of a register: the sum of term(i) over [0, n), with the bits that
/// sum_of gives each of them.
template <class F>
WF_INLINE Vec column_sum_of(int64_t n, const F& term) {
  constexpr int64_t kLanes = Vec::kWidth, kChains = 4 * kLanes;
  Vec total = set(0.0f);
  for (int64_t first = 0; first < n; first += kSumBlock) {
    Vec chain[kChains];
    for (Vec& sum : chain) sum = set(0.0f);
    const int64_t end = n - first < kSumBlock ? n : first + kSumBlock;
    for (int64_t i = first; i < end; ++i)
      chain[(i - first) % kChains] = chain[(i - first) % kChains] + term(i);
    for (int64_t j = 0; j < kLanes; ++j)  // as Sum
      chain[j] = (chain[j] + chain[kLanes + j]) + (chain[2 * kLanes + j] + chain[3 * kLanes + j]);
    for (int64_t half = kLanes / 2; half; half /= 2)  // as sum(Vec)
      for (int64_t j = 0; j < half; ++j) chain[j] = chain[j] + chain[j + half];
    total = total + chain[0];
  }
  return total;
}

/// e[i] = exp(scale z[i] - shift), in place if e == z; returns the sum.
inline float exponentials(const float* z, int64_t n, float scale, float shift, const Prefetch& next,
                          float* e) {
  return sum_of(n, [&](int64_t i, auto k) {
    next.fetch(i);
    const Vec v = exp_negative(fma(load(z + i, k), set(scale), set(-shift)));
    store(e + i, v, k);
    return keep(v, k);
  });
}
/// The sum alone.
inline float exponential_sum(const float* z, int64_t n, float scale, float shift,
                             const Prefetch& next) {
  return sum_of(n, [&](int64_t i, auto k) {
    next.fetch(i);
    return keep(exp_negative(fma(load(z + i, k), set(scale), set(-shift))), k);
  });
}

/// What is subtracted before exponentials are taken: no NaN where all of z is -inf.
inline float finite(float top) { return top == -INFINITY ? 0.0f : top; }
/// The sum of exponentials, at least that of the largest; 1 where nothing is kept.
inline float kept_sum(float sum) { return sum == 0.0f ? 1.0f : sum; }

/// a / d for many a, by two products in place of a division.
struct Divisor {
  Vec high, low;
  explicit Divisor(Vec d) : high(set(1.0f) / d) {
    low = fma(set(0.0f) - high, d, set(1.0f)) * high;  // what rounding took from the inverse
  }
  WF_INLINE Vec divide(Vec a) const { return fma(a, high, a * low); }
};

/// Writes value(i, lanes) to the contiguous row `out`; past the caches if `streamed`.
template <class T, class F>
WF_INLINE void write_row(T* out, int64_t n, bool streamed, const F& value) {
  if (streamed && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0) {
    for_aligned_lanes(out, n, [&](int64_t i, auto k) { stream(out + i, value(i, k), k); });
  } else {
    for_lanes(n, [&](int64_t i, auto k) { store(out + i, value(i, k), k); });
  }
}
/// The same for row r of `rows`, whatever its dtype and step.
template <class F>
WF_INLINE void write_row(const Rows& rows, int64_t r, bool streamed, const F& value) {
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    T* out = static_cast<T*>(rows.data) + row_offset(rows, r);
    if (rows.step == 1) {
      write_row(out, rows.n, streamed, value);
      return;
    }
    for_lanes(rows.n, [&](int64_t i, auto k) {
      float lane[Vec::kWidth];
      store(lane, value(i, k));
      const int64_t n = rows.n - i < Vec::kWidth ? rows.n - i : Vec::kWidth;
      for (int64_t j = 0; j < n; ++j) out[(i + j) * rows.step] = from_float<T>(lane[j]);
    });
  });
}

}  // namespace warpformer::cpu::WF_ISA

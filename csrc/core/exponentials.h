// What softmax and cross-entropy share: a row of scores, and the sum of its exponentials.
#pragma once

#include "core/rows.h"

namespace warpformer::cpu::WF_ISA {

/// A maximum in interleaved chains; -inf of nothing. NaN may be lost: it shows in the sum.
struct Max {
  Vec chain[4] = {set(-INFINITY), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
  int next = 0;
  WF_INLINE void add(Vec v) {
    chain[next] = max(chain[next], v);
    next = (next + 1) % 4;
  }
  WF_INLINE float total() const {
    return max_lane(max(max(chain[0], chain[1]), max(chain[2], chain[3])));
  }
};

/// for_lanes with four registers a round, which chains need to stay in registers.
template <class F>
WF_INLINE void for_rounds(int64_t n, const F& f) {
  int64_t i = 0;
  for (; i + 4 * Vec::kWidth <= n; i += 4 * Vec::kWidth)
    for (int j = 0; j < 4; ++j) f(i + j * Vec::kWidth, Full{});
  for_lanes(n - i, [&](int64_t j, auto k) { f(i + j, k); });
}

inline float max_of(const float* z, int64_t n) {
  Max high;
  for_rounds(n, [&](int64_t i, auto k) { high.add(load_or(z + i, k, -INFINITY)); });
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

/// The sum over [0, n) of term(i, lanes), which is 0 past the end: in blocks, because a long chain of
/// additions rounds more.
template <class F>
WF_INLINE float sum_of(int64_t n, const F& term) {
  constexpr int64_t kBlock = 2048;
  float total = 0;
  for (int64_t first = 0; first < n; first += kBlock) {
    Sum block;
    for_rounds(n - first < kBlock ? n - first : kBlock,
               [&](int64_t i, auto k) { block.add(term(first + i, k)); });
    total += block.total();
  }
  return total;
}

/// e[i] = exp(z[i] - shift), in place if e == z; returns the sum.
inline float exponentials(const float* z, int64_t n, float shift, const Prefetch& next, float* e) {
  return sum_of(n, [&](int64_t i, auto k) {
    next.fetch(i);
    const Vec v = exp_negative(load_or(z + i, k, -INFINITY) - set(shift));
    store(e + i, v, k);
    return v;
  });
}
/// The sum alone.
inline float exponential_sum(const float* z, int64_t n, float shift, const Prefetch& next) {
  return sum_of(n, [&](int64_t i, auto k) {
    next.fetch(i);
    return exp_negative(load_or(z + i, k, -INFINITY) - set(shift));
  });
}

/// a / d for many a, by two products in place of a division.
struct Divisor {
  Vec high, low;
  explicit Divisor(float d) {
    const float inverse = 1.0f / d;
    high = set(inverse);
    low = set(__builtin_fmaf(-inverse, d, 1.0f) * inverse);  // what rounding took from the inverse
  }
  WF_INLINE Vec divide(Vec a) const { return fma(a, high, a * low); }
};

/// Writes value(i, lanes) to the contiguous row `out`; past the caches if `streamed`.
template <class T, class F>
WF_INLINE void write_row(T* out, int64_t n, bool streamed, const F& value) {
  if (streamed) {
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

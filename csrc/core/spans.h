// Elementwise kernels see Rows as spans: up to kSpan neighbouring columns of one row. Spans without
// steps of one dtype are read and written where they lie; others pass through buffers of floats.
#pragma once

#include "core/parallel.h"
#include "core/rows.h"

namespace warpformer::cpu::WF_ISA {

constexpr int64_t kSpan = 2048, kSpanGrain = 16384;  // columns; elements worth a thread

/// f(thread, item, begin, n) for each span of columns of each item: a row, or several.
template <class F>
void for_spans(int64_t items, int64_t rows_of_item, int64_t columns, int threads, const F& f) {
  const int64_t spans = (columns + kSpan - 1) / kSpan;
  const int64_t size = rows_of_item * (columns < kSpan ? columns : kSpan);
  const int64_t grain = 1 + kSpanGrain / size;
  parallel_for(items * spans, grain, threads, [&](int t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % spans * kSpan, left = columns - begin;
      f(t, i / spans, begin, left < kSpan ? left : kSpan);
    }
  });
}

/// Whether spans of all that are given can be read and written where they lie.
template <class... Others>
bool in_place(const Rows& first, const Others&... others) {
  const auto fits = [&](const Rows& r) {
    return !r.data || (r.dtype == first.dtype && r.step == 1);
  };
  return (fits(first) && ... && fits(others));
}

/// Where a span lies; null where there are no rows.
template <class T>
T* span_of(const Rows& rows, int64_t r, int64_t begin) {
  return rows.data ? static_cast<T*>(rows.data) + row_offset(rows, r) + begin : nullptr;
}

/// A span as floats in `buffer`; null where there are no rows.
inline const float* span_in(const Rows& rows, int64_t r, int64_t begin, int64_t n, float* buffer) {
  if (!rows.data) return nullptr;
  read_span(rows, r, begin, n, buffer);
  return buffer;
}

}  // namespace warpformer::cpu::WF_ISA

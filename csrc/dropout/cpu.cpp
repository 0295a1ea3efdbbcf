// For each span of elements (core/spans.h): its words, as a factor of 1 / (1 - p) or 0 each, in a
// buffer that stays in L1; then the elements times those.
//
//   element    |  i  | i+1 | i+2 | i+3 | i+4 ...        a span may begin within a counter
//   counter    |-- i/4 -------->|-- i/4 + 1 -->
#include "core/philox.h"
#include "core/scratch.h"
#include "core/spans.h"
#include "dropout/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kFactors = kSpan + 4 * Vec::kWidth;  // of a span, in whole steps of the generator

template <class T>
void apply(const T* x, const T* residual, const float* factors, int64_t n, T* out) {
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec factor = load(factors + i, k);
    const Vec kept = where_less(set(0.0f), factor, load(x + i, k) * factor, set(0.0f));
    store(out + i, residual ? load(residual + i, k) + kept : kept, k);
  });
}

}  // namespace

void dropout(const DropoutParams& p, int threads) {
  constexpr int64_t kBuffers = kFactors + 2 * kSpan;
  float* scratch = scratch_floats(kBuffers * threads);
  const bool direct = in_place(p.x, p.residual, p.out);
  for_spans(p.x.count, 1, p.x.n, threads, [&](int t, int64_t r, int64_t begin, int64_t n) {
    float* buffer = scratch + kBuffers * t;
    float* factors = buffer + 2 * kSpan;
    const int64_t element = r * p.x.n + begin, within = element % 4;
    draw({p.seed, p.threshold, p.scale}, element / 4, 0, within + n, factors);
    factors += within;
    if (direct) {
      by_float(p.x.dtype, [&](auto type) {
        using T = decltype(type);
        apply(span_of<T>(p.x, r, begin), span_of<T>(p.residual, r, begin), factors, n,
              span_of<T>(p.out, r, begin));
      });
      return;
    }
    const float* x = span_in(p.x, r, begin, n, buffer);
    apply(x, span_in(p.residual, r, begin, n, buffer + kSpan), factors, n, buffer);
    write_span(buffer, p.out, r, begin, n);
  });
}

}  // namespace warpformer::cpu::WF_ISA

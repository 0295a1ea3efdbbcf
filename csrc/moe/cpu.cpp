// sort_by_expert, a counting sort, in `offsets` alone, by one thread: a place costs it a few
// nanoseconds, and experts thousands of times as much.
//   ids --count--> offsets --sum of those before--> where rows begin --++, place by place--> end
//
// spread_rows: a thread copies rows. sum_rows: it adds a span of columns of a token, in floats
//   rows[places[n, j]] --times weights[n, j], j after j--> total --> out[n]
#include <string.h>

#include "core/spans.h"
#include "moe/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// f(place, expert) for all places, in ascending order.
template <class F>
void for_places(const Rows& ids, const F& f) {
  const auto each = [&](auto* data) {
    for (int64_t i = 0; i < ids.count; ++i) f(i, data[row_offset(ids, i)]);
  };
  if (ids.dtype == DType::i64) {
    each(static_cast<const int64_t*>(ids.data));
  } else {
    each(static_cast<const int32_t*>(ids.data));
  }
}

/// Bits, whatever they mean.
template <class T>
void copy_row(const Rows& from, int64_t r, const Rows& to, int64_t s) {
  const T* source = static_cast<const T*>(from.data) + row_offset(from, r);
  T* target = static_cast<T*>(to.data) + row_offset(to, s);
  if (from.step == 1 && to.step == 1) {
    memcpy(target, source, from.n * sizeof(T));
  } else {
    for (int64_t i = 0; i < from.n; ++i) target[i * to.step] = source[i * from.step];
  }
}

/// total += weight times columns [first, first + n) of row r.
void add_product(const Rows& rows, int64_t r, int64_t first, int64_t n, float weight,
                 float* total) {
  const auto add = [&](const auto* x) {
    const Vec w = set(weight);
    for_lanes(n, [&](int64_t i, auto k) {
      // The product is rounded: the compiler would make an fma of * and +.
      const Vec product = fma(load(x + i, k), w, set(0.0f));
      store(total + i, load(total + i, k) + product, k);
    });
  };
  if (rows.step != 1) {
    float term[kSpan];
    read_span(rows, r, first, n, term);
    return add(term);
  }
  by_float(rows.dtype, [&](auto type) {
    add(static_cast<const decltype(type)*>(rows.data) + row_offset(rows, r) + first);
  });
}

float weight_of(const SumRowsParams& p, int64_t n, int64_t j) {
  float weight = 1.0f;
  if (!p.weights) return weight;
  by_float(p.dtype, [&](auto type) {
    const auto* weights = static_cast<const decltype(type)*>(p.weights);
    weight = to_float(weights[n * p.weight_stride[0] + j * p.weight_stride[1]]);
  });
  return weight;
}

}  // namespace

void sort_by_expert(const SortByExpertParams& p, int) {
  for (int e = 0; e < p.experts; ++e) p.offsets[e] = 0;
  for_places(p.ids, [&](int64_t, int64_t expert) { ++p.offsets[expert]; });
  int32_t before = 0;
  for (int e = 0; e < p.experts; ++e) {
    const int32_t count = p.offsets[e];
    p.offsets[e] = before;
    before += count;
  }
  for_places(p.ids, [&](int64_t place, int64_t expert) {
    const int32_t row = p.offsets[expert]++;
    p.order[row] = place;
    p.places[place] = row;
  });
}

void spread_rows(const SpreadRowsParams& p, int threads) {
  const int64_t grain = 1 + kSpanGrain / p.out.n;
  parallel_for(p.out.count, grain, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = p.order[i] / p.k;
      if (p.in.dtype == DType::f32) {
        copy_row<float>(p.in, token, p.out, i);
      } else {
        copy_row<bf16>(p.in, token, p.out, i);
      }
    }
  });
}

void sum_rows(const SumRowsParams& p, int threads) {
  const auto sum = [&](int, int64_t token, int64_t first, int64_t n) {
    float total[kSpan] = {};
    for (int64_t j = 0; j < p.k; ++j)
      add_product(p.rows, p.places[token * p.k + j], first, n, weight_of(p, token, j), total);
    write_span(total, p.out, token, first, n);
  };
  for_spans(p.out.count, p.k + 1, p.out.n, threads, sum);
}

}  // namespace warpformer::cpu::WF_ISA

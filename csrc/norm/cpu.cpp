// A row stays in the first-level cache from its first pass to its last. Elements become floats
// once; rows of contiguous floats are read where they are:
//
//   x row (+ residual row) --> z --mean, variance--> --normalize, scale, shift--> out row
//                               \--> sum row
//
// backward, in ranges of rows that each have their own sums for dweight and dbias:
//
//   grad row, z row --means of g and g y--> dz row
//                   \--> += sums of the range;  afterwards the ranges in order --> dweight, dbias
//
// The next rows are fetched meanwhile, because the hardware's own prefetching ends with every page;
// forward is too short for that to pay. Results that no cache will hold are streamed.
#include "core/cache.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "norm/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// Writes the elements of a row, past the caches where that is wanted and the address allows it.
template <class T>
struct Writer {
  T* row;
  bool streams;
  Writer(T* row, bool streams)
      : row(row),
        streams(streams && reinterpret_cast<uintptr_t>(row) % (Vec::kWidth * sizeof(T)) == 0) {}
  WF_INLINE void operator()(int64_t i, Vec v, Full) const {
    if (streams) {
      stream(row + i, v);
    } else {
      store(row + i, v);
    }
  }
  WF_INLINE void operator()(int64_t i, Vec v, Tail k) const { store(row + i, v, k); }
};

WF_INLINE Vec rounded(Vec v, const float*) { return v; }
template <class T>
WF_INLINE Vec rounded(Vec v, const T*) {
  T lanes[Vec::kWidth];
  store(lanes, v);
  return load(lanes);
}

/// The rows of buffers of a thread: z, then a row for each operand that is not contiguous.
constexpr int kBuffers = 4;

/// Sums are kept in chains of at most 64 additions of floats, which are added up as doubles.
constexpr int64_t kSpan = 4 * 64 * Vec::kWidth;

/// The sum of what add(i, lanes, sum) adds to `sum`.
template <class F>
WF_INLINE double add_up(int64_t n, const F& add) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    Sum sum;
    for_lanes(n - begin < kSpan ? n - begin : kSpan,
              [&](int64_t i, auto k) { add(begin + i, k, sum); });
    total += sum.total();
  }
  return total;
}
struct Two {
  double first = 0, second = 0;
};
/// The same of two sums.
template <class F>
WF_INLINE Two add_up_two(int64_t n, const F& add) {
  Two totals;
  for (int64_t begin = 0; begin < n; begin += kSpan) {
    Sum first, second;
    for_lanes(n - begin < kSpan ? n - begin : kSpan,
              [&](int64_t i, auto k) { add(begin + i, k, first, second); });
    totals.first += first.total();
    totals.second += second.total();
  }
  return totals;
}

WF_INLINE Vec itself(Vec v) { return v; }
WF_INLINE Vec squared(Vec v) { return v * v; }

/// The row x as floats; total = the sum of their terms.
template <Vec (*term)(Vec)>
const float* as_floats(const float* x, int64_t n, float*, double& total) {
  total = add_up(n, [&](int64_t i, auto k, Sum& sum) { sum.add(term(load(x + i, k))); });
  return x;
}
template <Vec (*term)(Vec), class T>
const float* as_floats(const T* x, int64_t n, float* z, double& total) {
  total = add_up(n, [&](int64_t i, auto k, Sum& sum) {
    const Vec v = load(x + i, k);
    sum.add(term(v));
    store(z + i, v, k);
  });
  return z;
}

/// z = x + residual, rounded to T, also written to out; total = the sum of its terms.
template <Vec (*term)(Vec), class T>
void add_rows(const T* x, const T* residual, int64_t n, float* z, const Writer<T>& out,
              double& total) {
  total = add_up(n, [&](int64_t i, auto k, Sum& sum) {
    const Vec v = rounded(load(x + i, k) + load(residual + i, k), x);
    sum.add(term(v));
    store(z + i, v, k);
    if (out.row) out(i, v, k);
  });
}

/// Row r of x + residual as floats, also written to sum; total = the sum of their terms.
template <Vec (*term)(Vec), class T>
const float* sum_row(const NormParams& p, int64_t r, bool streams, float* buffers, double& total) {
  const int64_t n = p.x.n;
  const T* x = row_in(p.x, r, reinterpret_cast<T*>(buffers + n));
  if (!p.residual.data) return as_floats<term>(x, n, buffers, total);
  const T* residual = row_in(p.residual, r, reinterpret_cast<T*>(buffers + 2 * n));
  T* sum = p.sum.data ? row_out(p.sum, r, reinterpret_cast<T*>(buffers + 3 * n)) : nullptr;
  add_rows<term>(x, residual, n, buffers, Writer<T>(sum, streams), total);
  if (sum) finish_row(p.sum, r, sum);
  return buffers;
}

struct Statistics {
  float mean, rstd;
};
float rstd_of(double variance, float eps) {
  return static_cast<float>(1.0 / sqrt(variance + static_cast<double>(eps)));
}

Statistics of_layer(const float* z, int64_t n, double total, float eps) {
  const auto rough = static_cast<float>(total / static_cast<double>(n));
  const Two sums = add_up_two(n, [&](int64_t i, auto k, Sum& deviations, Sum& squares) {
    const Vec d = load_or(z + i, k, rough) - set(rough);
    deviations.add(d);
    squares.add(d * d);
  });
  // What rounding left of the mean shows in the deviations, and is taken out of both.
  const double off = sums.first / static_cast<double>(n);
  const double variance = sums.second / static_cast<double>(n) - off * off;
  return {static_cast<float>(rough + off), rstd_of(variance > 0 ? variance : 0, eps)};
}

/// The row that `rows` has, as floats; all `otherwise` where it is not given.
const float* parameter(const Rows& rows, float otherwise, int64_t n, float* buffer) {
  if (rows.data) return row_in(rows, 0, buffer);
  for_lanes(n, [&](int64_t i, auto k) { store(buffer + i, set(otherwise), k); });
  return buffer;
}

template <class T>
void normalize_row(const NormParams& p, int64_t r, const float* weight, const float* bias,
                   bool streams, float* buffers) {
  const int64_t n = p.x.n;
  double total;
  const float* z;
  Statistics s;
  if (p.centered) {
    z = sum_row<itself, T>(p, r, streams, buffers, total);
    s = of_layer(z, n, total, p.eps);
  } else {
    z = sum_row<squared, T>(p, r, streams, buffers, total);
    s = {0.0f, rstd_of(total / static_cast<double>(n), p.eps)};
  }
  if (p.mean) p.mean[r] = s.mean;
  if (p.rstd) p.rstd[r] = s.rstd;
  by_float(p.out.dtype, [&](auto type) {
    using Out = decltype(type);
    Out* out = row_out(p.out, r, reinterpret_cast<Out*>(buffers + 2 * n));
    const Writer<Out> write(out, streams);
    for_lanes(n, [&](int64_t i, auto k) {
      const Vec y = (load(z + i, k) - set(s.mean)) * set(s.rstd);
      write(i, fma(y, load(weight + i, k), load(bias + i, k)), k);
    });
    finish_row(p.out, r, out);
  });
}

}  // namespace

void norm(const NormParams& p, int threads) {
  const int64_t n = p.x.n;
  float* scratch = scratch_floats((2 + kBuffers * threads) * n);
  const float* weight = parameter(p.weight, 1.0f, n, scratch);
  const float* bias = parameter(p.bias, 0.0f, n, scratch + n);
  const bool streams = is_past_cache(bytes(p.x) + bytes(p.residual) + bytes(p.sum) + bytes(p.out));
  const bool same = !p.residual.data || p.residual.dtype == p.x.dtype;
  parallel_for(p.x.count, 1 + 16384 / n, threads, [&](int t, int64_t begin, int64_t end) {
    float* buffers = scratch + (2 + kBuffers * t) * n;
    by_float(same ? p.x.dtype : DType::f32, [&](auto type) {
      for (int64_t r = begin; r < end; ++r)
        normalize_row<decltype(type)>(p, r, weight, bias, streams, buffers);
    });
    if (streams) finish_streaming();
  });
}

namespace {

/// Fetches row r, where there is one, a register's elements at a time.
struct Prefetch {
  const char* row;
  int64_t item;  // bytes
  Prefetch(const Rows& rows, int64_t r) : item(rows.dtype == DType::f32 ? 4 : 2) {
    const int64_t there = r < rows.count ? r : rows.count - 1;
    row = static_cast<const char*>(rows.data) + row_offset(rows, there) * item;
  }
  WF_INLINE void operator()(int64_t i) const { __builtin_prefetch(row + i * item); }
};

/// Rows [begin, end) of dz; adds to dweight and dbias [C], where given.
template <class T>
void backward_rows(const NormBackwardParams& p, int64_t begin, int64_t end, const float* weight,
                   float* dweight, float* dbias, bool streams, float* buffers) {
  const int64_t n = p.z.n;
  const auto buffer = [&](int i) { return reinterpret_cast<T*>(buffers + i * n); };
  for (int64_t r = begin; r < end; ++r) {
    const T* grad = row_in(p.grad, r, buffer(0));
    const T* z = row_in(p.z, r, buffer(1));
    const T* grad_sum = p.grad_sum.data ? row_in(p.grad_sum, r, buffer(2)) : nullptr;
    const Vec mean = set(p.centered ? p.mean[r] : 0.0f), rstd = set(p.rstd[r]);
    Vec mean_g = set(0.0f), mean_gy = mean_g;
    T* dz = nullptr;
    if (p.dz.data) {
      const Two sums = add_up_two(n, [&](int64_t i, auto k, Sum& values, Sum& products) {
        const Vec g = load(grad + i, k) * load(weight + i, k);
        values.add(g);
        products.add(g * (load(z + i, k) - mean));
      });
      if (p.centered) mean_g = set(static_cast<float>(sums.first / static_cast<double>(n)));
      mean_gy = set(static_cast<float>(sums.second / static_cast<double>(n) * p.rstd[r]));
      dz = row_out(p.dz, r, buffer(3));
    }
    const Writer<T> write(dz, streams);
    const Prefetch next_grad(p.grad, r + 1), next_z(p.z, r + 1);
    for_lanes(n, [&](int64_t i, auto k) {
      next_grad(i);
      next_z(i);
      const Vec g = load(grad + i, k), y = (load(z + i, k) - mean) * rstd;
      if (dz) {
        Vec d = (g * load(weight + i, k) - mean_g - y * mean_gy) * rstd;
        if (grad_sum) d = d + load(grad_sum + i, k);
        write(i, d, k);
      }
      if (dweight) store(dweight + i, fma(g, y, load(dweight + i, k)), k);
      if (dbias) store(dbias + i, load(dbias + i, k) + g, k);
    });
    if (dz) finish_row(p.dz, r, dz);
  }
}

/// sums[0..n) = the parts, rows of n, added up in their order.
void add_parts(const float* parts, int64_t count, int64_t n, int threads, float* sums) {
  parallel_for(n, 1 + 16384 / count, threads, [&](int, int64_t begin, int64_t end) {
    for_lanes(end - begin, [&](int64_t i, auto k) {
      Sum total;
      for (int64_t part = 0; part < count; ++part) total.add(load(parts + part * n + begin + i, k));
      store(sums + begin + i, total.lanes(), k);
    });
  });
}

}  // namespace

void norm_backward(const NormBackwardParams& p, int threads) {
  const int64_t n = p.z.n, kinds = p.centered ? 2 : 1;
  float* scratch = scratch_floats((1 + kBuffers * threads) * n);
  const float* weight = parameter(p.weight, 1.0f, n, scratch);
  const bool streams = is_past_cache(bytes(p.grad) + bytes(p.grad_sum) + bytes(p.z) + bytes(p.dz));
  const bool same = p.grad.dtype == p.z.dtype && (!p.dz.data || p.dz.dtype == p.z.dtype) &&
                    (!p.grad_sum.data || p.grad_sum.dtype == p.z.dtype);
  const int64_t rows = p.z.count, grain = 1 + 16384 * p.parts / (1 + rows * n);
  parallel_for(p.parts, grain, threads, [&](int t, int64_t first, int64_t last) {
    float* buffers = scratch + (1 + kBuffers * t) * n;
    for (int64_t part = first; part < last; ++part) {
      float* dweight = p.partials ? p.partials + part * kinds * n : nullptr;
      float* dbias = dweight && p.centered ? dweight + n : nullptr;
      if (dweight) memset(dweight, 0, kinds * n * sizeof(float));
      by_float(same ? p.z.dtype : DType::f32, [&](auto type) {
        backward_rows<decltype(type)>(p, rows * part / p.parts, rows * (part + 1) / p.parts, weight,
                                      dweight, dbias, streams, buffers);
      });
    }
    if (streams) finish_streaming();
  });
  if (!p.partials) return;
  float* sums = scratch_floats(kinds * n);
  add_parts(p.partials, p.parts, kinds * n, threads, sums);
  if (p.dweight.data) write_span(sums, p.dweight, 0, 0, n);
  if (p.dbias.data) write_span(sums + n, p.dbias, 0, 0, n);
}

}  // namespace warpformer::cpu::WF_ISA

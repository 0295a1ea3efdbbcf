// Work is cut into tiles: spans of columns (core/spans.h) of one row, or of a part's rows where a
// bias gradient is summed. Biases become floats once per call.
//
//                   columns
//            | span | span | span |
//   part 0   |  x, up, grad --> dx, dup        16 rows --> chain, chains --> partial[0]
//   part 1   |  ...                                                          partial[1]
//                                              sum over the parts, in double --> dbias
#include "activation/op.h"
#include "core/activation_functions.h"
#include "core/scratch.h"
#include "core/spans.h"

namespace warpformer::cpu::WF_ISA {
namespace {

struct Biases {
  const float *bias, *up_bias;  // null where not given
  Biases at(int64_t column) const {
    return {bias ? bias + column : nullptr, up_bias ? up_bias + column : nullptr};
  }
};

/// The biases as floats, in `buffer` where they are not floats already.
Biases read_biases(const Rows& bias, const Rows& up_bias, float* buffer) {
  return {bias.data ? row_in(bias, 0, buffer) : nullptr,
          up_bias.data ? row_in(up_bias, 0, buffer + bias.n) : nullptr};
}

template <class T, class K>
WF_INLINE Vec load_biased(const T* x, const float* bias, int64_t i, K k) {
  const Vec z = load(x + i, k);
  return bias ? z + load(bias + i, k) : z;
}

template <class Act, class T>
void forward_span(const T* x, const T* up, Biases b, int64_t n, T* out) {
  for_lanes(n, [&](int64_t i, auto k) {
    const Vec a = Act::value(load_biased(x, b.bias, i, k));
    store(out + i, up ? a * load_biased(up, b.up_bias, i, k) : a, k);
  });
}

/// Adds the gradients to `sum` and `up_sum` too, where these are not null.
template <class Act, class T>
void backward_span(const T* grad, const T* x, const T* up, Biases b, int64_t n, T* dx, T* dup,
                   float* sum, float* up_sum) {
  for_lanes(n, [&](int64_t i, auto k) {
    const ValueAndSlope act = Act::both(load_biased(x, b.bias, i, k));
    const Vec g = load(grad + i, k);
    const Vec d = (up ? g * load_biased(up, b.up_bias, i, k) : g) * act.slope;
    if (dx) store(dx + i, d, k);
    if (sum) store(sum + i, load(sum + i, k) + d, k);
    if (!up) return;
    const Vec e = g * act.value;
    if (dup) store(dup + i, e, k);
    if (up_sum) store(up_sum + i, load(up_sum + i, k) + e, k);
  });
}

template <class Act>
void forward(const ActivationParams& p, Biases b, int64_t r, int64_t begin, int64_t n, bool direct,
             float* buffer) {
  if (direct) {
    by_float(p.x.dtype, [&](auto type) {
      using T = decltype(type);
      forward_span<Act>(span_of<T>(p.x, r, begin), span_of<T>(p.up, r, begin), b.at(begin), n,
                        span_of<T>(p.out, r, begin));
    });
    return;
  }
  const float* x = span_in(p.x, r, begin, n, buffer);
  const float* up = span_in(p.up, r, begin, n, buffer + kSpan);
  forward_span<Act>(x, up, b.at(begin), n, buffer);
  write_span(buffer, p.out, r, begin, n);
}

template <class Act>
void backward(const ActivationBackwardParams& p, Biases b, int64_t r, int64_t begin, int64_t n,
              bool direct, float* sum, float* up_sum, float* buffer) {
  if (direct) {
    by_float(p.x.dtype, [&](auto type) {
      using T = decltype(type);
      backward_span<Act>(span_of<T>(p.grad, r, begin), span_of<T>(p.x, r, begin),
                         span_of<T>(p.up, r, begin), b.at(begin), n, span_of<T>(p.dx, r, begin),
                         span_of<T>(p.dup, r, begin), sum, up_sum);
    });
    return;
  }
  float *dx = buffer + 2 * kSpan, *dup = buffer + 3 * kSpan;
  const float* grad = span_in(p.grad, r, begin, n, buffer);
  const float* x = span_in(p.x, r, begin, n, buffer + kSpan);
  const float* up = span_in(p.up, r, begin, n, dup);  // each lane is read before it is written
  backward_span<Act>(grad, x, up, b.at(begin), n, dx, dup, sum, up_sum);
  if (p.dx.data) write_span(dx, p.dx, r, begin, n);
  if (p.dup.data) write_span(dup, p.dup, r, begin, n);
}

/// total += chain; chain = 0
void end_chain(float* chain, float* total, int64_t n) {
  for_lanes(n, [&](int64_t i, auto k) {
    store(total + i, load(total + i, k) + load(chain + i, k), k);
    store(chain + i, set(0.0f), k);
  });
}

void clear(float* values, int64_t n) {
  for_lanes(n, [&](int64_t i, auto k) { store(values + i, set(0.0f), k); });
}

/// The rows of one part in one span of columns: their gradients, and the sums of those.
template <class Act>
void backward_part(const ActivationBackwardParams& p, Biases b, int64_t part, int64_t begin,
                   int64_t n, bool direct, float* buffer) {
  float* partial = p.partial + 2 * part * p.x.n + begin;
  float* up_partial = partial + p.x.n;
  float *sum = buffer, *up_sum = buffer + kSpan;
  clear(partial, n);
  clear(up_partial, n);
  clear(buffer, 2 * kSpan);
  const int64_t end = p.x.count * (part + 1) / p.parts;
  for (int64_t r = p.x.count * part / p.parts, chained = 0; r < end; ++r) {
    backward<Act>(p, b, r, begin, n, direct, sum, up_sum, buffer + 2 * kSpan);
    if (++chained % kChainRows && r + 1 < end) continue;
    end_chain(sum, partial, n);
    end_chain(up_sum, up_partial, n);
  }
}

/// out = the sum of the parts from `first` on, over columns [begin, begin + n).
void add_parts(const Rows& out, const float* first, int64_t parts, int64_t begin, int64_t n,
               float* buffer) {
  constexpr int kColumns = 16;  // a cache line
  for (int64_t c = 0; c < n; c += kColumns) {
    const int64_t columns = n - c < kColumns ? n - c : kColumns;
    double total[kColumns] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < columns; ++i) total[i] += first[2 * part * out.n + begin + c + i];
    for (int64_t i = 0; i < columns; ++i) buffer[c + i] = static_cast<float>(total[i]);
  }
  write_span(buffer, out, 0, begin, n);
}

}  // namespace

void activation(const ActivationParams& p, int threads) {
  const bool direct = in_place(p.x, p.up, p.out);
  float* scratch = scratch_floats(p.bias.n + p.up_bias.n + 2 * kSpan * threads);
  const Biases b = read_biases(p.bias, p.up_bias, scratch);
  float* buffers = scratch + p.bias.n + p.up_bias.n;
  by_activation(p.activation, p.out.dtype != DType::f32, [&](auto act) {
    for_spans(p.x.count, 1, p.x.n, threads, [&](int t, int64_t r, int64_t begin, int64_t n) {
      forward<decltype(act)>(p, b, r, begin, n, direct, buffers + 2 * kSpan * t);
    });
  });
}

void activation_backward(const ActivationBackwardParams& p, int threads) {
  const bool direct = in_place(p.x, p.grad, p.up, p.dx, p.dup);
  constexpr int64_t kBuffers = 6 * kSpan;
  float* scratch = scratch_floats(p.bias.n + p.up_bias.n + kBuffers * threads);
  const Biases b = read_biases(p.bias, p.up_bias, scratch);
  float* buffers = scratch + p.bias.n + p.up_bias.n;
  by_activation(p.activation, false, [&](auto act) {
    using Act = decltype(act);
    if (p.parts == 0) {
      for_spans(p.x.count, 1, p.x.n, threads, [&](int t, int64_t r, int64_t begin, int64_t n) {
        backward<Act>(p, b, r, begin, n, direct, nullptr, nullptr, buffers + kBuffers * t);
      });
      return;
    }
    const int64_t part_rows = 1 + p.x.count / p.parts;
    for_spans(p.parts, part_rows, p.x.n, threads, [&](int t, int64_t i, int64_t begin, int64_t n) {
      backward_part<Act>(p, b, i, begin, n, direct, buffers + kBuffers * t);
    });
  });
  if (p.parts == 0) return;
  for_spans(1, p.parts, p.x.n, threads, [&](int t, int64_t, int64_t begin, int64_t n) {
    float* buffer = buffers + kBuffers * t;
    if (p.dbias.data) add_parts(p.dbias, p.partial, p.parts, begin, n, buffer);
    if (p.dup_bias.data) add_parts(p.dup_bias, p.partial + p.x.n, p.parts, begin, n, buffer);
  });
}

}  // namespace warpformer::cpu::WF_ISA

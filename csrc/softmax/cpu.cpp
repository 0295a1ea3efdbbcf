// Each row is read once, turned into exponentials in the first-level cache, and written once, while
// the next row is on its way:
//
//   x row --scale, mask--> z --max; exp, sum--> e --/ sum--> out row
//   out, grad row --sum out grad--> --> dx row                              (backward)
//
// Where the elements of a row are far apart but rows are neighbours, 64 of them are read as a tile
// of columns and go through the same steps, a register of rows at a time.
#include "core/cache.h"
#include "core/exponentials.h"
#include "core/scratch.h"
#include "softmax/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr float kLowest = -__FLT_MAX__;
constexpr int64_t kGrain = 16384;  // elements that are worth a thread

/// scale x + bias, but -inf where the bias is, even if x is NaN.
WF_INLINE Vec biased(Vec x, Vec scale, Vec bias) {
  return where_less(bias, set(kLowest), bias, fma(x, scale, bias));
}

/// out[0..n) = what a row of a boolean mask adds.
void read_keep(const bool* keep, int64_t step, int64_t n, float* out) {
  if (step == 1) {
    for (int64_t i = 0; i < n; ++i) out[i] = keep[i] ? 0.0f : -INFINITY;
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = keep[i * step] ? 0.0f : -INFINITY;
  }
}

/// What the first n elements of row r of the mask add: that row itself, or a copy in `buffer`.
const float* bias_row(const Rows& mask, int64_t r, int64_t n, float* buffer) {
  if (mask.dtype == DType::f32 && mask.step == 1) return row_in(mask, r, buffer);
  if (mask.dtype == DType::boolean) {
    read_keep(static_cast<const bool*>(mask.data) + row_offset(mask, r), mask.step, n, buffer);
  } else {
    read_span(mask, r, 0, n, buffer);
  }
  return buffer;
}

/// The scores of a row are scale * z: the row itself where it is contiguous floats, to which
/// nothing is added, else written to a buffer.
struct Scores {
  const float* z;
  float scale, top;  // the largest score
};

Scores row_scores(const SoftmaxParams& p, int64_t r, int64_t n, float* buffer) {
  if (p.x.dtype == DType::f32 && p.x.step == 1 && !p.has_mask) {
    const float* x = row_in(p.x, r, buffer);
    return {x, p.scale, largest(x, n, p.scale)};
  }
  Max high;
  if (p.has_mask) {
    const float* bias = bias_row(p.mask, r, n, buffer + p.x.n);
    read_span(p.x, r, 0, n, buffer);
    for_lanes(n, [&](int64_t i, auto k) {
      const Vec z = biased(load(buffer + i, k), set(p.scale), load(bias + i, k));
      store(buffer + i, z, k);
      high.add(pad(z, k, -INFINITY));
    });
    return {buffer, 1.0f, high.total()};
  }
  if (p.x.step != 1) {
    read_span(p.x, r, 0, n, buffer);
    return {buffer, p.scale, largest(buffer, n, p.scale)};
  }
  by_float(p.x.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(p.x.data) + row_offset(p.x, r);
    for_lanes(n, [&](int64_t i, auto k) {
      const Vec z = load(x + i, k);
      store(buffer + i, z, k);
      high.add(pad(z * set(p.scale), k, -INFINITY));
    });
  });
  return {buffer, p.scale, high.total()};
}

void softmax_row(const SoftmaxParams& p, int64_t r, bool streamed, float* buffer) {
  const int64_t n = p.x.n, seen = p.queries && r % p.queries < n ? r % p.queries + 1 : n;
  const auto [z, scale, top] = row_scores(p, r, seen, buffer);
  const float shift = finite(top);
  const Prefetch next(p.x, r + 1);
  if (p.log) {
    const Vec log_sum = set(logf(kept_sum(exponential_sum(z, seen, scale, shift, next))));
    for_lanes(seen, [&, z = z, scale = scale](int64_t i, auto k) {
      store(buffer + i, fma(load(z + i, k), set(scale), set(-shift)) - log_sum, k);
    });
    for (int64_t i = seen; i < n; ++i) buffer[i] = -INFINITY;
    write_row(p.out, r, streamed, [&](int64_t i, auto k) { return load(buffer + i, k); });
  } else {
    const Divisor sum(set(kept_sum(exponentials(z, seen, scale, shift, next, buffer))));
    for (int64_t i = seen; i < n; ++i) buffer[i] = 0.0f;
    write_row(p.out, r, streamed,
              [&](int64_t i, auto k) { return sum.divide(load(buffer + i, k)); });
  }
}

/// What the mask adds to a tile.
void read_bias_tile(const Rows& mask, int64_t r, int64_t width, float* tile) {
  if (mask.dtype != DType::boolean) {
    read_tile(mask, r, width, tile);
    return;
  }
  const bool* keep = static_cast<const bool*>(mask.data) + row_offset(mask, r);
  for (int64_t i = 0; i < mask.n; ++i)
    read_keep(keep + i * mask.step, row_step(mask), width, tile + i * kTile);
}

/// The rows of a tile in the lanes of one register, n elements each, to softmax in place.
void softmax_columns(float* z, int64_t n, float factor, bool log) {
  const Vec scale = set(factor);
  Vec top = set(-INFINITY);
  for (int64_t i = 0; i < n; ++i) top = max(top, load(z + i * kTile) * scale);
  const Vec shift = set(0.0f) - where_less(top, set(kLowest), set(0.0f), top);
  const Vec kept = column_sum_of(n, [&](int64_t i) {
    const Vec v = fma(load(z + i * kTile), scale, shift), e = exp_negative(v);
    store(z + i * kTile, log ? v : e);
    return e;
  });
  // 1 where nothing is kept. NaN stays: it is the second operand.
  const Vec sum = where_less(set(0.0f), kept, kept, max(set(1.0f), kept));
  if (log) {
    float lanes[Vec::kWidth];
    store(lanes, sum);
    for (float& lane : lanes) lane = logf(lane);
    const Vec log_sum = load(lanes);
    for (int64_t i = 0; i < n; ++i) store(z + i * kTile, load(z + i * kTile) - log_sum);
  } else {
    const Divisor divisor(sum);
    for (int64_t i = 0; i < n; ++i) store(z + i * kTile, divisor.divide(load(z + i * kTile)));
  }
}

void softmax_tile(const SoftmaxParams& p, int64_t r, int64_t width, float* z) {
  const int64_t n = p.x.n;
  read_tile(p.x, r, width, z);
  if (p.has_mask) {
    float* bias = z + n * kTile;
    read_bias_tile(p.mask, r, width, bias);
    for_lanes(n * kTile, [&](int64_t i, auto) {
      store(z + i, biased(load(z + i), set(p.scale), load(bias + i)));
    });
  }
  for (int64_t j = 0; j < width; j += Vec::kWidth)
    softmax_columns(z + j, n, p.has_mask ? 1.0f : p.scale, p.log);
  write_tile(z, p.out, r, width);
}

}  // namespace

void softmax(const SoftmaxParams& p, int threads) {
  const int64_t n = p.x.n;
  if (is_columns(p.x) && p.run > 1 && !p.queries) {
    const int64_t size = (1 + p.has_mask) * n * kTile;
    float* scratch = scratch_floats(size * threads);
    for_tiles(
        p.x.count, p.run, 1 + kGrain / (n * kTile), threads,
        [&](int t, int64_t r, int64_t width) { softmax_tile(p, r, width, scratch + size * t); });
    return;
  }
  float* scratch = scratch_floats(2 * n * threads);
  const bool streamed = is_past_cache(bytes(p.x) + bytes(p.out));
  parallel_for(p.x.count, 1 + kGrain / n, threads, [&](int t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) softmax_row(p, r, streamed, scratch + 2 * n * t);
    if (streamed) finish_streaming();
  });
}

namespace {

/// The gradient where an element was kept, else 0, which `out` (log: its exponential) is there,
/// too.
WF_INLINE Vec kept_gradient(Vec grad, Vec out, bool log) {
  if (log) return where_less(set(-INFINITY), out, grad, set(0.0f));
  return where_less(set(0.0f), out, grad, out);  // out may be NaN, and stays it
}
/// What is summed over a row, of kept gradients.
WF_INLINE Vec row_term(Vec grad, Vec out, bool log) { return log ? grad : out * grad; }
/// The gradient of z.
WF_INLINE Vec score_gradient(Vec grad, Vec out, Vec sum, bool log) {
  return log ? grad - exp_negative(out) * sum : out * (grad - sum);
}

/// Row r, given by contiguous elements of `grad` and `out`; its dz is added to `total`, if there is
/// one.
template <class T>
void backward_row(const SoftmaxBackwardParams& p, int64_t r, const T* grad, const T* out,
                  bool streamed, float* total) {
  const int64_t n = p.out.n;
  const Prefetch next_grad(p.grad, r + 1), next_out(p.out, r + 1);
  auto gradient = [&](int64_t i, auto k, Vec o) {
    return kept_gradient(load(grad + i, k), o, p.log);
  };
  const float total_term = sum_of(n, [&](int64_t i, auto k) {
    next_grad.fetch(i);
    next_out.fetch(i);
    const Vec o = load(out + i, k);
    return row_term(gradient(i, k, o), o, p.log);
  });
  const Vec sum = set(total_term), scale = set(p.scale);
  auto dz = [&](int64_t i, auto k) {
    const Vec o = load(out + i, k);
    return score_gradient(gradient(i, k, o), o, sum, p.log);
  };
  if (total)
    for_lanes(n, [&](int64_t i, auto k) { store(total + i, load(total + i, k) + dz(i, k), k); });
  if (p.has_dx) write_row(p.dx, r, streamed, [&](int64_t i, auto k) { return dz(i, k) * scale; });
}

void backward_row(const SoftmaxBackwardParams& p, int64_t r, bool streamed, float* total,
                  float* buffer) {
  if (p.grad.dtype == p.out.dtype && p.grad.step == 1 && p.out.step == 1) {
    by_float(p.out.dtype, [&](auto type) {
      using T = decltype(type);
      const T* grad = static_cast<const T*>(p.grad.data) + row_offset(p.grad, r);
      const T* out = static_cast<const T*>(p.out.data) + row_offset(p.out, r);
      backward_row(p, r, grad, out, streamed, total);
    });
  } else {
    const float* grad = row_in(p.grad, r, buffer);
    backward_row(p, r, grad, row_in(p.out, r, buffer + p.out.n), streamed, total);
  }
}

/// The rows of a tile in the lanes of one register: `grad` becomes dx.
void backward_columns(float* grad, const float* out, int64_t n, float scale, bool log) {
  auto gradient = [&](int64_t i, Vec o) { return kept_gradient(load(grad + i), o, log); };
  const Vec sum = column_sum_of(n, [&](int64_t i) {
    const Vec o = load(out + i * kTile);
    return row_term(gradient(i * kTile, o), o, log);
  });
  for (int64_t i = 0; i < n * kTile; i += kTile) {
    const Vec o = load(out + i);
    store(grad + i, score_gradient(gradient(i, o), o, sum, log) * set(scale));
  }
}

/// dmask[m], and dx of all its rows; parts are added in their order.
void mask_backward(const SoftmaxBackwardParams& p, int threads) {
  const int64_t n = p.out.n, each = p.out.count / p.masks;
  float* sums = static_cast<float*>(p.part.data);
  const bool streamed = p.has_dx && is_past_cache(3 * bytes(p.dx));
  float* scratch = scratch_floats(2 * n * threads);
  parallel_for(p.masks * p.parts, 1, threads, [&](int t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m = i / p.parts, part = i % p.parts;
      float* total = sums + (part * p.masks + m) * n;
      for (int64_t j = 0; j < n; ++j) total[j] = 0.0f;
      for (int64_t j = each * part / p.parts; j < each * (part + 1) / p.parts; ++j)
        backward_row(p, m * each + j, streamed, total, scratch + 2 * n * t);
    }
    if (streamed) finish_streaming();
  });
  parallel_for(p.masks, 1 + kGrain / (n * p.parts), threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t m = begin; m < end; ++m) {
      write_row(p.dmask, m, false, [&](int64_t i, auto k) {
        Vec total = load(sums + m * n + i, k);
        for (int64_t part = 1; part < p.parts; ++part)
          total = total + load(sums + (part * p.masks + m) * n + i, k);
        return total;
      });
    }
  });
}

}  // namespace

void softmax_backward(const SoftmaxBackwardParams& p, int threads) {
  const int64_t n = p.out.n;
  if (p.masks) return mask_backward(p, threads);
  if (is_columns(p.out) && p.run > 1) {
    const int64_t size = 2 * n * kTile;
    float* scratch = scratch_floats(size * threads);
    for_tiles(p.out.count, p.run, 1 + kGrain / (n * kTile), threads,
              [&](int t, int64_t r, int64_t width) {
                float *grad = scratch + size * t, *out = grad + n * kTile;
                read_tile(p.grad, r, width, grad);
                read_tile(p.out, r, width, out);
                for (int64_t j = 0; j < width; j += Vec::kWidth)
                  backward_columns(grad + j, out + j, n, p.scale, p.log);
                write_tile(grad, p.dx, r, width);
              });
    return;
  }
  float* scratch = scratch_floats(2 * n * threads);
  const bool streamed = is_past_cache(3 * bytes(p.dx));
  parallel_for(p.out.count, 1 + kGrain / n, threads, [&](int t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      backward_row(p, r, streamed, nullptr, scratch + 2 * n * t);
    if (streamed) finish_streaming();
  });
}

}  // namespace warpformer::cpu::WF_ISA

// A row of logits is read once, and its gradient written once, while the row's exponentials are in
// the cache:
//
//   x row --max; exp, sum--> e --> loss
//                            e --c e - b w--> dx row, less what the target takes
//
// Where the elements of a row are far apart but rows are neighbours, as of [B, V, T], 16 of them
// are copied to rows of a buffer and their gradients back.
#include "core/cache.h"
#include "core/exponentials.h"
#include "core/scratch.h"
#include "cross_entropy/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int kRows = 16;  // copied together

/// The weights as floats, 1 where there are none; what all of them, and those of the targets, add
/// to.
struct Weights {
  const float* w = nullptr;
  double total, of_targets = 0;

  Weights(const CrossEntropyParams& p, float* buffer) {
    total = static_cast<double>(p.x.n);
    if (p.has_weight) {
      w = row_in(p.weight, 0, buffer);
      total = 0;
      for (int64_t i = 0; i < p.x.n; ++i) total += w[i];
    }
    for (int64_t r = 0; r < p.x.count; ++r)
      if (target(p, r) != p.ignored) of_targets += of(target(p, r));
  }
  float of(int64_t y) const { return w ? w[y] : 1.0f; }
  static int64_t target(const CrossEntropyParams& p, int64_t r) {
    return static_cast<const int64_t*>(p.target)[r];
  }
};

/// sum of w (top - x)
float weighted_distance(const float* x, const float* w, float top, int64_t n) {
  return sum_of(n, [&](int64_t i, auto k) {
    const Vec distance = set(top) - load(x + i, k);
    return keep(w ? load(w + i, k) * distance : distance, k);
  });
}

/// The gradient of a row is coefficient * e - smooth * w and, at the target, `taken` less. Exact
/// factors, because what rounds them shifts all of the gradient.
struct Factors {
  double coefficient, smooth, taken;
  float at_target(const float* e, const Weights& weights, int64_t y) const {
    return static_cast<float>(coefficient * e[y] - smooth * weights.of(y) - taken);
  }
};

/// A row's loss; where gradients are wanted, also e and gradient(factors). `e` may be x.
template <class F>
double row_loss(const CrossEntropyParams& p, const Weights& weights, const float* x, int64_t y,
                const Prefetch& next, float* e, const F& gradient) {
  const int64_t n = p.x.n;
  const double weight = weights.of(y), smooth = p.smoothing / n, kept = weight * (1 - p.smoothing);
  const float top = largest(x, n), at_target = top - x[y];
  const float distance = smooth > 0 ? weighted_distance(x, weights.w, top, n) : 0.0f;
  const float sum =
      p.has_dx ? exponentials(x, n, 1.0f, top, next, e) : exponential_sum(x, n, 1.0f, top, next);
  const double log_sum = log(static_cast<double>(sum)), lse = top + log_sum;
  if (p.has_dx) {
    const double scale = p.mean ? 1 / weights.of_targets : 1.0;
    const double all = kept + 2 * weight * p.z_loss * lse + smooth * weights.total;
    gradient(Factors{scale * all / sum, scale * smooth, scale * kept});
  }
  double loss = kept * (at_target + log_sum) + weight * p.z_loss * lse * lse;
  if (smooth > 0) loss += smooth * (weights.total * log_sum + distance);
  return loss;
}

/// The gradient at elements [i, i + lanes) but for what the target takes.
template <class Lanes>
WF_INLINE Vec gradient_at(const float* e, const float* w, int64_t i, Lanes k, const Factors& f) {
  const Vec smooth = set(static_cast<float>(f.smooth));
  const Vec shift = w ? smooth * load(w + i, k) : smooth;
  return load(e + i, k) * set(static_cast<float>(f.coefficient)) - shift;
}

void zero_row(const Rows& rows, int64_t r, bool streamed) {
  write_row(rows, r, streamed, [](int64_t, auto) { return set(0.0f); });
}

/// Rows [begin, end), one by one.
void run_rows(const CrossEntropyParams& p, const Weights& weights, int64_t begin, int64_t end,
              bool streamed, float* buffer) {
  const int64_t n = p.x.n;
  float *copy = buffer, *e = buffer + n;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t y = Weights::target(p, r);
    p.row_loss[r] = 0;
    if (y == p.ignored) {
      if (p.has_dx) zero_row(p.dx, r, streamed);
      continue;
    }
    auto write = [&](const Factors& f) {
      const float at_target = f.at_target(e, weights, y);
      write_row(p.dx, r, streamed,
                [&](int64_t i, auto k) { return gradient_at(e, weights.w, i, k, f); });
      write_span(&at_target, p.dx, r, y, 1);
    };
    const float* x = row_in(p.x, r, copy);
    p.row_loss[r] = row_loss(p, weights, x, y, Prefetch(p.x, r + 1), e, write);
  }
}

/// rows[j * n + i] = element i of row r + j, and back.
void gather(const Rows& from, int64_t r, int64_t count, float* rows) {
  by_float(from.dtype, [&](auto type) {
    const auto* src = static_cast<const decltype(type)*>(from.data) + row_offset(from, r);
    for (int64_t i = 0; i < from.n; ++i, src += from.step) {
      float lanes[kRows];
      for_lanes(count, [&](int64_t j, auto k) { store(lanes + j, load(src + j, k)); });
      for (int64_t j = 0; j < count; ++j) rows[j * from.n + i] = lanes[j];
    }
  });
}
void scatter(const float* rows, const Rows& to, int64_t r, int64_t count) {
  const int64_t across = row_step(to);
  by_float(to.dtype, [&](auto type) {
    using T = decltype(type);
    T* dst = static_cast<T*>(to.data) + row_offset(to, r);
    for (int64_t i = 0; i < to.n; ++i, dst += to.step) {
      float lanes[kRows] = {};
      for (int64_t j = 0; j < count; ++j) lanes[j] = rows[j * to.n + i];
      if (across == 1) {
        for_lanes(count, [&](int64_t j, auto k) { store(dst + j, load(lanes + j), k); });
      } else {
        for (int64_t j = 0; j < count; ++j) dst[j * across] = from_float<T>(lanes[j]);
      }
    }
  });
}

/// Rows [r, r + count) of one run.
void run_columns(const CrossEntropyParams& p, const Weights& weights, int64_t r, int64_t count,
                 float* buffer) {
  const int64_t n = p.x.n;
  gather(p.x, r, count, buffer);
  for (int64_t j = 0; j < count; ++j) {
    const int64_t y = Weights::target(p, r + j);
    float* e = buffer + j * n;
    p.row_loss[r + j] = 0;
    if (y == p.ignored) {
      for (int64_t i = 0; i < n; ++i) e[i] = 0.0f;
      continue;
    }
    auto write = [&](const Factors& f) {
      const float at_target = f.at_target(e, weights, y);
      for_lanes(n, [&](int64_t i, auto k) { store(e + i, gradient_at(e, weights.w, i, k, f), k); });
      e[y] = at_target;
    };
    p.row_loss[r + j] = row_loss(p, weights, e, y, Prefetch(p.x, p.x.count), e, write);
  }
  if (p.has_dx) scatter(buffer, p.dx, r, count);
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, int threads) {
  const int64_t n = p.x.n, count = p.x.count;
  const bool columns = is_columns(p.x) && p.run > 1;
  const int64_t size = (columns ? kRows : 2) * n;
  float* scratch = scratch_floats(size * threads + n);
  const Weights weights(p, scratch + size * threads);
  if (columns) {
    const int64_t tiles = (p.run + kRows - 1) / kRows;
    parallel_for(count / p.run * tiles, 1, threads, [&](int t, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % tiles * kRows, rest = p.run - first;
        run_columns(p, weights, i / tiles * p.run + first, rest < kRows ? rest : kRows,
                    scratch + size * t);
      }
    });
  } else {
    const bool streamed = p.has_dx && is_past_cache(2 * bytes(p.dx));
    parallel_for(count, 1 + 16384 / (n + 1), threads, [&](int t, int64_t begin, int64_t end) {
      run_rows(p, weights, begin, end, streamed, scratch + size * t);
      if (streamed) finish_streaming();
    });
  }
  for (int64_t r = 0; r < count && !p.reduced; ++r) {
    const float loss = static_cast<float>(p.row_loss[r]);
    write_span(&loss, p.loss, r, 0, 1);
  }
  if (!p.reduced) return;
  double total = 0;
  for (int64_t r = 0; r < count; ++r) total += p.row_loss[r];
  const float loss = static_cast<float>(p.mean ? total / weights.of_targets : total);
  write_span(&loss, p.loss, 0, 0, 1);
}

void cross_entropy_backward(const CrossEntropyBackwardParams& p, int threads) {
  const int64_t n = p.dx.n;
  const bool in_place = p.dx.data == p.out.data,
             streamed = !in_place && is_past_cache(2 * bytes(p.out));
  float* scratch = scratch_floats(n * threads);
  parallel_for(p.dx.count, 1 + 16384 / n, threads, [&](int t, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float scale;
      read_span(p.grad, p.grad.count == 1 ? 0 : r, 0, 1, &scale);
      if (in_place && scale == 1.0f) continue;
      const float* row = row_in(p.dx, r, scratch + n * t);
      write_row(p.out, r, streamed,
                [&](int64_t i, auto k) { return load(row + i, k) * set(scale); });
    }
    if (streamed) finish_streaming();
  });
}

}  // namespace warpformer::cpu::WF_ISA

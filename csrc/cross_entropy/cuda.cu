// A block first adds the weights of all targets, for the mean. Then a team of threads
// (core/cuda/rows.cuh) owns a row; rows of at most 16384 elements that 16-byte accesses can walk
// stay in its registers, others are read again for the gradient (from the second-level cache):
//
//   targets --sum of w[y]--> scale
//   x row --max and sum of exponentials, rescaled where the maximum grows--> row loss
//         --exp--> c e - b w--> dx row, less what the target takes
//   row losses --sum--> loss
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "cross_entropy/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kChunks = 4;
constexpr int kSumThreads = 1024;
constexpr float kInfinity = __builtin_inff();

DEVICE int64_t target_of(const CrossEntropyParams& p, int64_t r) {
  return p.wide ? load(static_cast<const int64_t*>(p.target) + r)
                : load(static_cast<const int32_t*>(p.target) + r);
}
DEVICE float element(const Rows& rows, int64_t r, int64_t i) {
  float value = 0;
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    value = to_float(load(static_cast<const T*>(rows.data) + row_offset(rows, r) + i * rows.step));
  });
  return value;
}
DEVICE void set_element(const Rows& rows, int64_t r, int64_t i, float value) {
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    store(static_cast<T*>(rows.data) + row_offset(rows, r) + i * rows.step, from_float<T>(value));
  });
}
DEVICE float weight_of(const CrossEntropyParams& p, int64_t y) {
  return p.has_weight ? element(p.weight, 0, y) : 1.0f;
}

/// The sum of term(i) over [0, n), by a block of kSumThreads; every thread gets it.
template <class F>
DEVICE double block_sum_of(int64_t n, F term) {
  const Shared<double> sums = shared_memory<double>();
  double sum = 0;
  for (int64_t i = thread_index(); i < n; i += kSumThreads) sum += term(i);
  sums.store(thread_index(), sum);
  sync_block();
  for (int half = kSumThreads / 2; half; half /= 2) {
    if (thread_index() < half)
      sums.store(thread_index(), sums.load(thread_index()) + sums.load(thread_index() + half));
    sync_block();
  }
  return sums.load(0);
}

KERNEL(kSumThreads) cross_entropy_scale_kernel(CrossEntropyParams p) {
  double total = 1;
  if (p.mean) {
    total = block_sum_of(p.x.count, [&](int64_t r) {
      const int64_t y = target_of(p, r);
      return y == p.ignored || y < 0 || y >= p.x.n ? 0.0f : weight_of(p, y);
    });
  }
  if (thread_index() == 0) store(p.scale, 1 / total);
}

KERNEL(kSumThreads) cross_entropy_sum_kernel(CrossEntropyParams p) {
  const double total = block_sum_of(p.x.count, [&](int64_t r) { return load(p.row_loss + r); });
  if (thread_index() == 0) set_element(p.loss, 0, 0, static_cast<float>(total * load(p.scale)));
}

/// The largest of some elements, and the sum of their exponentials relative to it.
struct Exponentials {
  float top = -kInfinity, sum = 0;

  /// Adds those elements of a chunk that lie before the end of their row.
  DEVICE void add(const float (&x)[kChunk], int64_t left) {
    float high = top;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) high = max(high, j < left ? x[j] : -kInfinity);
    if (high > top) {
      sum *= exp(top - high);
      top = high;
    }
    const float shift = top == -kInfinity ? 0.0f : top;
    float chunk = 0;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) chunk += j < left ? exp(x[j] - shift) : 0.0f;
    sum += chunk;
  }
  /// Of the whole team.
  DEVICE void combine(const Team& team, Shared<float> scratch) {
    const float high = team_max(top, team.size, scratch);
    // The sum of -inf alone is that of no element, or of elements that make NaN of it.
    sum = team_sum(top == high ? sum : sum * exp(top - high), team.size, scratch);
    top = high;
  }
};

template <class Row>
KERNEL(kMaxTeam)
cross_entropy_kernel(CrossEntropyParams p, int size) {
  constexpr int count = Row::count;
  const Team team(size);
  const Shared<float> scratch = shared_memory<float>();
  const int64_t n = p.x.n, step = Row::step(n, team), r = team.row;
  const bool there = r < p.x.count;
  const int64_t y = there ? target_of(p, r) : p.ignored;
  const bool ignored = y == p.ignored, valid = !ignored && y >= 0 && y < n;
  const int64_t end = valid ? n : 0;  // elements that are read
  Chunks<count> x;
  fill(x, 0.0f);

  Exponentials all;
  for (int64_t first = 0; first < end; first += step) {
    Row::fetch(p.x, r, first, team).values(x);
#pragma unroll
    for (int c = 0; c < count; ++c)
      all.add(x[c], n - first - int64_t{kChunk} * (team.index + c * team.size));
  }
  all.combine(team, scratch);

  // sum w and sum w (top - x), where all classes have a share of the target
  float weights = 0, distance = 0;
  if (p.smoothing > 0) {
    for (int64_t first = 0; first < end; first += step) {
      if (n > step) Row::fetch(p.x, r, first, team).values(x);
      Chunks<count> w;
      fill(w, 1.0f);
      if (p.has_weight) load_row(p.weight, 0, first, team, 0.0f, w);
      each_element<count>(first, end, team, [&](int c, int j, bool inside) {
        weights += inside ? w[c][j] : 0.0f;
        distance += inside ? w[c][j] * (all.top - x[c][j]) : 0.0f;
      });
    }
    weights = team_sum(weights, team.size, scratch);
    distance = team_sum(distance, team.size, scratch);
  }
  const double scale = p.has_dx ? load(p.scale) : 0.0;
  const double weight = valid ? weight_of(p, y) : 0.0f, smooth = p.smoothing / n;
  const double kept = weight * (1 - p.smoothing);
  const float at_target = valid ? element(p.x, r, y) : 0.0f;
  const float log_sum = log(all.sum), lse = all.top + log_sum;

  if (there && team.index == 0) {
    double loss = kept * (all.top - at_target + log_sum) + weight * p.z_loss * lse * lse;
    if (p.smoothing > 0) loss += smooth * (weights * log_sum + distance);
    if (!valid) loss = ignored ? 0.0f : __builtin_nanf("");
    if (p.reduced) {
      store(p.row_loss + r, loss);
    } else {
      set_element(p.loss, r, 0, static_cast<float>(loss));
    }
  }
  if (!p.has_dx) return;

  const double coefficient =
      valid ? scale * (kept + 2 * weight * p.z_loss * lse + smooth * weights) / all.sum : 0.0;
  const float factor = static_cast<float>(coefficient), shift = static_cast<float>(scale * smooth);
  const float outside = ignored ? 0.0f : __builtin_nanf("");
  const float of_target = static_cast<float>(coefficient * exp(at_target - all.top) -
                                             scale * smooth * weight - scale * kept);
  for (int64_t first = 0; first < n; first += step) {
    if (valid && n > step) Row::fetch(p.x, r, first, team).values(x);
    Chunks<count> w;
    fill(w, 1.0f);
    if (p.smoothing > 0 && p.has_weight) load_row(p.weight, 0, first, team, 0.0f, w);
    each_element<count>(first, n, team, [&](int c, int j, bool inside) {
      const int64_t i = first + int64_t{kChunk} * (team.index + c * team.size) + j;
      const float value = exp(x[c][j] - all.top) * factor - shift * w[c][j];
      x[c][j] = !valid || !inside ? outside : i == y ? of_target : value;
    });
    Row::store(p.dx, r, first, team, x);
  }
}

KERNEL(kMaxTeam) cross_entropy_backward_kernel(CrossEntropyBackwardParams p, int size) {
  const Team team(size);
  if (team.row >= p.dx.count) return;
  const float factor = element(p.grad, p.grad.count == 1 ? 0 : team.row, 0);
  if (p.dx.data == p.out.data && factor == 1.0f) return;
  for (int64_t first = 0; first < p.dx.n; first += WalkedRow::step(p.dx.n, team)) {
    Chunks<1> values;
    load_row(p.dx, team.row, first, team, 0.0f, values);
    each_element<1>(0, 0, team, [&](int c, int j, bool) { values[c][j] *= factor; });
    store_row(p.out, team.row, first, team, values);
  }
}

}  // namespace

void cross_entropy(const CrossEntropyParams& p, Stream stream) {
  constexpr int kSumScratch = kSumThreads * sizeof(double);
  const int size = team_size<kChunks>(p.x.n);
  const Rows dx = p.has_dx ? p.dx : Rows{};
  const auto kernel = !are_vectors(p.x.dtype, {&p.x, &dx}) ? cross_entropy_kernel<WalkedRow>
                      : p.x.dtype == DType::f32  ? cross_entropy_kernel<VectorRow<float, kChunks>>
                      : p.x.dtype == DType::bf16 ? cross_entropy_kernel<VectorRow<bf16, kChunks>>
                                                 : cross_entropy_kernel<VectorRow<f16, kChunks>>;
  LAUNCH(cross_entropy_scale_kernel, 1, kSumThreads, kSumScratch, stream, p);
  LAUNCH(kernel, team_blocks(p.x.count, size), team_threads(size), kTeamScratch, stream, p, size);
  if (p.reduced) LAUNCH(cross_entropy_sum_kernel, 1, kSumThreads, kSumScratch, stream, p);
}

void cross_entropy_backward(const CrossEntropyBackwardParams& p, Stream stream) {
  const int size = team_size<1>(p.dx.n);
  LAUNCH(cross_entropy_backward_kernel, team_blocks(p.dx.count, size), team_threads(size), 0,
         stream, p, size);
}

}  // namespace warpformer::cuda

// A team of threads (core/cuda/rows.cuh) owns a row. Rows of at most 8192 elements that 16-byte
// accesses can walk stay in its registers, and are read once; others are walked in steps, and read
// again by each pass:
//
//   x row --scale, mask--> z --max; exp, sum--> e --/ sum--> out row
//   out, grad row --sum out grad--> --> dx row                              (backward)
//
// Where the elements of a row are far apart but rows are neighbours, a block owns 32 of them, a
// lane each, so that a warp reads whole lines:
//
//             lane 0   1  ..  31           warp w sums what threads w, w + 8, .. of a team would,
//   element 0  | row r  r+1 .. r+31 |      in their order: the layout changes no bit
//   element 1  |                    |
//
// The gradient of a mask is summed by a team for each part of the rows that share a row of it, and
// the parts by a second kernel.
#include "core/cuda/exponentials.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "softmax/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kColumnWarps = 8;

/// a / d for many a, by two products in place of a division.
struct Divisor {
  float high, low;
  DEVICE explicit Divisor(float d) : high(1.0f / d), low(fma(-high, d, 1.0f) * high) {}
  DEVICE float divide(float a) const { return fma(a, high, a * low); }
};

/// scale x + bias, but -inf where the bias is, even if x is NaN.
DEVICE float biased(float x, float scale, float bias) {
  return bias == -kInfinity ? bias : fma(x, scale, bias);
}
DEVICE float bias_of(bool keep) { return keep ? 0.0f : -kInfinity; }

/// What the mask adds to the elements of a chunk before `end`.
DEVICE void load_bias(const Rows& mask, int64_t r, int64_t first, int64_t end, const Team& team,
                      Chunks<1>& bias) {
  if (mask.dtype != DType::boolean) {
    load_row(mask, r, first, team, -kInfinity, bias, Cache::normal, end);
    return;
  }
  const bool* keep = static_cast<const bool*>(mask.data) + (end ? row_offset(mask, r) : 0);
  each_element<1>(first, end, team, [&](int, int j, bool inside) {
    const int64_t i = first + int64_t{kChunk} * team.index + j;
    bias[0][j] = bias_of(inside && load(keep + i * mask.step));
  });
}

/// z = the scores of a step before `end`; where there is no mask, still to be scaled.
template <class Row>
DEVICE void load_scores(const SoftmaxParams& p, int64_t first, int64_t end, const Team& team,
                        Chunks<Row::count>& z) {
  Row::fetch(p.x, team.row, first, team, end).values(z);
  if (!p.has_mask) return;
#pragma unroll
  for (int c = 0; c < Row::count; ++c) {
    Chunks<1> bias;
    load_bias(p.mask, team.row, first + int64_t{kChunk} * c * team.size, end, team, bias);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) z[c][j] = biased(z[c][j], p.scale, bias[0][j]);
  }
}

template <class Row>
KERNEL(kMaxTeam)
softmax_kernel(SoftmaxParams p, int size) {
  constexpr int count = Row::count;
  const Team team(size);
  const Shared<float> scratch = shared_memory<float>();
  const int64_t n = p.x.n, step = Row::step(n, team);
  const bool again = n > step;
  int64_t seen = team.row < p.x.count ? n : 0;
  if (p.queries && team.row % p.queries < seen) seen = team.row % p.queries + 1;
  const float scale = p.has_mask ? 1.0f : p.scale;
  Chunks<count> z;

  float top = -kInfinity;
  for (int64_t first = 0; first < n; first += step) {
    load_scores<Row>(p, first, seen, team, z);
    each_element<count>(first, seen, team, [&](int c, int j, bool inside) {
      top = max(top, inside ? z[c][j] * scale : -kInfinity);
    });
  }
  const float shift = finite(team_max(top, team.size, scratch));

  float sum = 0;
  for (int64_t first = 0; first < n; first += step) {
    if (again) load_scores<Row>(p, first, seen, team, z);
    sum += step_sum<count>(first, seen, team, [&](int c, int j, bool inside) {
      z[c][j] = inside ? fma(z[c][j], scale, -shift) : -kInfinity;
      const float e = exp(z[c][j]);
      if (!p.log) z[c][j] = e;
      return e;
    });
  }
  sum = kept_sum(team_sum(sum, team.size, scratch));

  const Divisor divisor(sum);
  const float log_sum = log(sum);
  for (int64_t first = 0; first < n; first += step) {
    if (again) {
      load_scores<Row>(p, first, seen, team, z);
      each_element<count>(first, seen, team, [&](int c, int j, bool inside) {
        z[c][j] = inside ? fma(z[c][j], scale, -shift) : -kInfinity;
        if (!p.log) z[c][j] = exp(z[c][j]);
      });
    }
    each_element<count>(0, 0, team, [&](int c, int j, bool) {
      z[c][j] = p.log ? z[c][j] - log_sum : divisor.divide(z[c][j]);
    });
    Row::store(p.out, team.row, first, team, z);
  }
}

// ---- Columns

/// f(i, value) for every element i of the rows that this warp shares: `size` is that of a team.
template <class F>
DEVICE void each_in_column(int64_t n, F f) {
  for (int64_t i = warp_index(); i < n; i += kColumnWarps) f(i);
}

/// The sum of term(i) over a column, as a team of `size` threads adds it; `sums` has 32 floats for
/// each of them.
template <int kCount, class F>
DEVICE float column_sum(int64_t n, int size, Shared<float> sums, F term) {
  const int lane = lane_index();
  for (int t = warp_index(); t < size; t += kColumnWarps) {
    float sum = 0;
    for (int64_t first = 0; first < n; first += int64_t{kChunk} * kCount * size) {
      float chunks[kCount];
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        const int64_t i = first + int64_t{kChunk} * (t + c * size);
        float terms[kChunk];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) terms[j] = i + j < n ? term(i + j) : 0.0f;
        chunks[c] = tree_sum(terms);
      }
      sum += tree_sum(chunks);
    }
    sums.store(t * kWarp + lane, sum);
  }
  sync_block();
  // Within the warps of the team, then among them.
  for (int group = 1, width = size < kWarp ? size : kWarp; group < size || group == 1;) {
    for (int half = width / 2; half; half /= 2) {
      for (int t = warp_index(); t < size / group; t += kColumnWarps)
        if (t % width < half)
          sums.store(t * group * kWarp + lane, sums.load(t * group * kWarp + lane) +
                                                   sums.load((t + half) * group * kWarp + lane));
      sync_block();
    }
    if (group > 1 || size <= kWarp) break;
    group = kWarp;
    width = size / kWarp;
  }
  const float sum = sums.load(lane);
  sync_block();
  return sum;
}
DEVICE float column_max(float x, Shared<float> scratch) {
  scratch.store(thread_index(), x);
  sync_block();
  for (int w = 0; w < kColumnWarps; ++w) x = max(x, scratch.load(w * kWarp + lane_index()));
  sync_block();
  return x;
}

/// Row r, or row 0 in the place of one past the last.
template <class T>
DEVICE T* row_of(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + row_offset(rows, r < rows.count ? r : 0);
}
/// f(pointer to the row's elements, which it may read or write); T as by_float gives it.
template <class F>
DEVICE void with_row(const Rows& rows, int64_t r, F f) {
  by_float(rows.dtype, [&](auto type) { f(row_of<decltype(type)>(rows, r)); });
}

KERNEL(kColumnWarps* kWarp) softmax_columns_kernel(SoftmaxParams p, int size) {
  const Shared<float> scratch = shared_memory<float>();
  const int64_t r = block_index() * kWarp + lane_index(), n = p.x.n;
  const bool there = r < p.x.count;
  const float scale = p.has_mask ? 1.0f : p.scale;
  with_row(p.x, r, [&](auto* x) {
    const auto bias = [&](int64_t i) {
      float value = 0;
      if (p.mask.dtype == DType::boolean) {
        value = bias_of(load(row_of<const bool>(p.mask, r) + i * p.mask.step));
      } else {
        with_row(p.mask, r, [&](auto* mask) { value = to_float(load(mask + i * p.mask.step)); });
      }
      return value;
    };
    const auto score = [&](int64_t i) {
      const float value = to_float(load(x + i * p.x.step));
      return p.has_mask ? biased(value, p.scale, bias(i)) : value;
    };
    float top = -kInfinity;
    each_in_column(n, [&](int64_t i) { top = max(top, score(i) * scale); });
    const float shift = finite(column_max(top, scratch));
    const auto shifted = [&](int64_t i) { return fma(score(i), scale, -shift); };
    const float sum = kept_sum(
        column_sum<kScoreChunks>(n, size, scratch, [&](int64_t i) { return exp(shifted(i)); }));
    if (!there) return;
    const Divisor divisor(sum);
    const float log_sum = log(sum);
    with_row(p.out, r, [&](auto* out) {
      each_in_column(n, [&](int64_t i) {
        const float value = p.log ? shifted(i) - log_sum : divisor.divide(exp(shifted(i)));
        store(out + i * p.out.step, from_float<std::remove_pointer_t<decltype(out)>>(value));
      });
    });
  });
}

// ---- Backward

/// The gradient where an element was kept, else 0, which `out` (log: its exponential) is there,
/// too.
DEVICE float kept_gradient(float grad, float out, bool log) {
  if (log) return out > -kInfinity ? grad : 0.0f;
  return out > 0.0f ? grad : out;  // out may be NaN, and stays it
}
/// What is summed over a row, of kept gradients.
DEVICE float row_term(float grad, float out, bool log) { return log ? grad : out * grad; }
/// The gradient of z.
DEVICE float score_gradient(float grad, float out, float sum, bool log) {
  return log ? grad - exp(out) * sum : out * (grad - sum);
}

/// g = the kept gradients of a step of row r, y = its results.
template <class Row>
DEVICE void load_pair(const SoftmaxBackwardParams& p, int64_t r, int64_t first, const Team& team,
                      Chunks<Row::count>& g, Chunks<Row::count>& y) {
  const auto grad = Row::fetch(p.grad, r, first, team);
  const auto out = Row::fetch(p.out, r, first, team);
  grad.values(g);
  out.values(y);
  const int64_t n = r < p.out.count ? p.out.n : 0;
  each_element<Row::count>(first, n, team, [&](int c, int j, bool inside) {
    if (!inside) y[c][j] = p.log ? -kInfinity : 0.0f;
    g[c][j] = kept_gradient(g[c][j], y[c][j], p.log);
  });
}

/// dz of a whole row, step by step: use(first, dz).
template <class Row, class F>
DEVICE void backward_row(const SoftmaxBackwardParams& p, int64_t r, const Team& team,
                         Shared<float> scratch, F use) {
  constexpr int count = Row::count;
  const int64_t n = p.out.n, step = Row::step(n, team);
  Chunks<count> g, y;
  float sum = 0;
  for (int64_t first = 0; first < n; first += step) {
    load_pair<Row>(p, r, first, team, g, y);
    sum += step_sum<count>(0, 0, team,
                           [&](int c, int j, bool) { return row_term(g[c][j], y[c][j], p.log); });
  }
  sum = team_sum(sum, team.size, scratch);
  for (int64_t first = 0; first < n; first += step) {
    if (n > step) load_pair<Row>(p, r, first, team, g, y);
    each_element<count>(0, 0, team, [&](int c, int j, bool) {
      g[c][j] = score_gradient(g[c][j], y[c][j], sum, p.log);
    });
    use(first, g);
  }
}

template <class Row>
DEVICE void store_scaled(const SoftmaxBackwardParams& p, int64_t r, int64_t first, const Team& team,
                         Chunks<Row::count>& dz) {
  each_element<Row::count>(0, 0, team, [&](int c, int j, bool) { dz[c][j] *= p.scale; });
  Row::store(p.dx, r, first, team, dz);
}

template <class Row>
KERNEL(kMaxTeam, 1)
softmax_backward_kernel(SoftmaxBackwardParams p, int size) {
  const Team team(size);
  backward_row<Row>(p, team.row, team, shared_memory<float>(), [&](int64_t first, auto& dz) {
    store_scaled<Row>(p, team.row, first, team, dz);
  });
}

KERNEL(kColumnWarps* kWarp, 2) softmax_backward_columns_kernel(SoftmaxBackwardParams p, int size) {
  const int64_t r = block_index() * kWarp + lane_index(), n = p.out.n;
  with_row(p.grad, r, [&](auto* grad) {
    with_row(p.out, r, [&](auto* out) {
      const auto result = [&](int64_t i) { return to_float(load(out + i * p.out.step)); };
      const auto gradient = [&](int64_t i, float y) {
        return kept_gradient(to_float(load(grad + i * p.grad.step)), y, p.log);
      };
      const float sum = column_sum<kScoreChunks>(n, size, shared_memory<float>(), [&](int64_t i) {
        const float y = result(i);
        return row_term(gradient(i, y), y, p.log);
      });
      if (r >= p.out.count) return;
      with_row(p.dx, r, [&](auto* dx) {
        each_in_column(n, [&](int64_t i) {
          const float y = result(i), dz = score_gradient(gradient(i, y), y, sum, p.log);
          store(dx + i * p.dx.step, from_float<std::remove_pointer_t<decltype(dx)>>(dz * p.scale));
        });
      });
    });
  });
}

/// A team for each part of each mask row: its sum, and dx of its rows.
KERNEL(kMaxTeam) softmax_mask_backward_kernel(SoftmaxBackwardParams p, int size) {
  const Team team(size);
  const Shared<float> scratch = shared_memory<float>();
  const int64_t m = team.row % p.masks, part = team.row / p.masks;
  const int64_t each = p.out.count / p.masks;
  const int64_t begin = each * part / p.parts, end = each * (part + 1) / p.parts;
  // Teams of one warp take as many rounds, some of them with a row past the last.
  const int64_t rounds = (each + p.parts - 1) / p.parts;
  for (int64_t i = 0; i < rounds; ++i) {
    const bool there = part < p.parts && begin + i < end;
    const int64_t r = there ? m * each + begin + i : p.out.count;
    backward_row<WalkedRow>(p, r, team, scratch, [&](int64_t first, Chunks<1>& dz) {
      if (there) {
        Chunks<1> total;
        fill(total, 0.0f);
        if (i > 0) load_row(p.part, team.row, first, team, 0.0f, total);
        each_element<1>(0, 0, team, [&](int c, int j, bool) { total[c][j] += dz[c][j]; });
        store_row(p.part, team.row, first, team, total);
      }
      if (p.has_dx) store_scaled<WalkedRow>(p, r, first, team, dz);
    });
  }
}

KERNEL(kMaxTeam) softmax_mask_sum_kernel(SoftmaxBackwardParams p, int size) {
  const Team team(size);
  for (int64_t first = 0; first < p.dmask.n; first += WalkedRow::step(p.dmask.n, team)) {
    Chunks<1> total, part;
    load_row(p.part, team.row, first, team, 0.0f, total);
    for (int64_t i = 1; i < p.parts; ++i) {
      load_row(p.part, i * p.masks + team.row, first, team, 0.0f, part);
      each_element<1>(0, 0, team, [&](int c, int j, bool) { total[c][j] += part[c][j]; });
    }
    store_row(p.dmask, team.row, first, team, total);
  }
}

/// Whether a block had better own columns: elements of a row are far apart, rows are neighbours.
bool are_columns(const Rows& rows) {
  return rows.step != 1 && rows.ndim && rows.stride[rows.ndim - 1] == 1 && rows.count > 1;
}
int64_t column_blocks(const Rows& rows) { return (rows.count + kWarp - 1) / kWarp; }
int column_scratch(int size) { return (size > kColumnWarps ? size : kColumnWarps) * kTeamScratch; }

}  // namespace

void softmax(const SoftmaxParams& p, Stream stream) {
  const int size = team_size<kScoreChunks>(p.x.n);
  if (are_columns(p.x) && !p.queries) {
    LAUNCH(softmax_columns_kernel, column_blocks(p.x), kColumnWarps * kWarp, column_scratch(size),
           stream, p, size);
    return;
  }
  const auto kernel = !are_vectors(p.x.dtype, {&p.x, &p.out})
                          ? softmax_kernel<WalkedRows<kScoreChunks>>
                      : p.x.dtype == DType::f32  ? softmax_kernel<VectorRow<float, kScoreChunks>>
                      : p.x.dtype == DType::bf16 ? softmax_kernel<VectorRow<bf16, kScoreChunks>>
                                                 : softmax_kernel<VectorRow<f16, kScoreChunks>>;
  LAUNCH(kernel, team_blocks(p.x.count, size), team_threads(size), kTeamScratch, stream, p, size);
}

void softmax_backward(const SoftmaxBackwardParams& p, Stream stream) {
  const int size = team_size<kScoreChunks>(p.out.n), threads = team_threads(size);
  if (p.masks) {
    LAUNCH(softmax_mask_backward_kernel, team_blocks(p.masks * p.parts, size), threads,
           kTeamScratch, stream, p, size);
    LAUNCH(softmax_mask_sum_kernel, team_blocks(p.masks, size), threads, 0, stream, p, size);
    return;
  }
  if (are_columns(p.out)) {
    LAUNCH(softmax_backward_columns_kernel, column_blocks(p.out), kColumnWarps * kWarp,
           column_scratch(size), stream, p, size);
    return;
  }
  const DType dtype = p.out.dtype;
  const auto kernel =
      !are_vectors(dtype, {&p.grad, &p.out, &p.dx})
          ? softmax_backward_kernel<WalkedRows<kScoreChunks>>
      : dtype == DType::f32  ? softmax_backward_kernel<VectorRow<float, kScoreChunks>>
      : dtype == DType::bf16 ? softmax_backward_kernel<VectorRow<bf16, kScoreChunks>>
                             : softmax_backward_kernel<VectorRow<f16, kScoreChunks>>;
  LAUNCH(kernel, team_blocks(p.out.count, size), threads, kTeamScratch, stream, p, size);
}

}  // namespace warpformer::cuda

// A team of threads (core/cuda/rows.cuh) owns a row. Rows of at most 8192 elements that 16-byte
// accesses can walk stay in its registers, and are read once:
//
//   x row (+ residual row) --> z --mean, variance--> --normalize, scale, shift--> out row
//                               \--> sum row
//
// backward, where every block walks a range of rows of its own:
//
//   grad row, z row --means of g and g y--> dz row
//                   \--> += the columns of this thread, at the end --> partials[range]
//
// and a second kernel adds the partials in their order: 32 columns a block, a warp for every 32nd
// range. Other rows are walked in steps and read again by every pass; backward leaves the columns
// to a kernel of their own. Both ways add in the same order, so the layout changes no bit.
#include "core/cuda/launch.cuh"
#include "core/cuda/math.cuh"
#include "core/cuda/rows.cuh"
#include "norm/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kChunks = 2;  // of a held row, in a thread
constexpr int kSumThreads = 1024, kSumWarps = kSumThreads / kWarp;

template <class T>
using Held = HeldRow<T, kChunks>;
using Walked = WalkedRow;

/// A parameter, `otherwise` where it is not given.
template <class Row>
DEVICE void load_parameter(const Rows& rows, int64_t first, const Team& team, float otherwise,
                           Chunks<Row::count>& values) {
  if (rows.data) {
    Row::parameter(rows, first, team, values);
  } else {
    fill(values, otherwise);
  }
}

/// z = x + residual, rounded to the dtype of both, 0 past the end of the row.
template <class Row>
DEVICE void load_sum(const NormParams& p, int64_t first, const Team& team, Chunks<Row::count>& z) {
  const auto x = Row::fetch(p.x, team.row, first, team);
  if (!p.residual.data) {
    x.values(z);
    return;
  }
  const auto residual = Row::fetch(p.residual, team.row, first, team);
  Chunks<Row::count> added;
  x.values(z);
  residual.values(added);
  by_float(p.residual.dtype == p.x.dtype ? p.x.dtype : DType::f32, [&](auto type) {
    using T = decltype(type);
    each_element<Row::count>(0, 0, team, [&](int c, int j, bool) {
      z[c][j] = to_float(from_float<T>(z[c][j] + added[c][j]));
    });
  });
}

template <class Row>
KERNEL(kMaxTeam)
norm_kernel(NormParams p, int size) {
  constexpr int count = Row::count;
  const Team team(size);
  const Shared<float> scratch = shared_memory<float>();
  const int64_t n = p.x.n, step = Row::step(n, team);
  const float elements = static_cast<float>(n);
  Chunks<count> z;

  float total = 0;
  for (int64_t first = 0; first < n; first += step) {
    load_sum<Row>(p, first, team, z);
    if (p.sum.data) Row::store(p.sum, team.row, first, team, z);
    each_element<count>(first, n, team, [&](int c, int j, bool) {
      total += p.centered ? z[c][j] : z[c][j] * z[c][j];
    });
  }
  total = team_sum(total, team.size, scratch) / elements;
  const auto load_again = [&](int64_t first) {
    if constexpr (Row::again) {
      // Where the sum is asked for it is there, and may be the residual itself.
      if (p.sum.data) {
        Row::fetch(p.sum, team.row, first, team).values(z);
      } else {
        load_sum<Row>(p, first, team, z);
      }
    }
  };

  float mean = 0, variance = total;
  if (p.centered) {
    float off = 0, squares = 0;
    for (int64_t first = 0; first < n; first += step) {
      load_again(first);
      each_element<count>(first, n, team, [&](int c, int j, bool inside) {
        const float d = inside ? z[c][j] - total : 0.0f;
        off += d;
        squares += d * d;
      });
    }
    // What rounding left of the mean shows in the deviations, and is taken out of both.
    off = team_sum(off, team.size, scratch) / elements;
    squares = team_sum(squares, team.size, scratch) / elements;
    mean = total + off;
    variance = max(squares - off * off, 0.0f);
  }
  const float rstd = rsqrt(variance + p.eps);
  if (team.index == 0 && team.row < p.x.count) {
    if (p.mean) store(p.mean + team.row, mean);
    if (p.rstd) store(p.rstd + team.row, rstd);
  }

  for (int64_t first = 0; first < n; first += step) {
    load_again(first);
    Chunks<count> weight, bias;
    load_parameter<Row>(p.weight, first, team, 1.0f, weight);
    load_parameter<Row>(p.bias, first, team, 0.0f, bias);
    each_element<count>(first, n, team, [&](int c, int j, bool) {
      z[c][j] = fma((z[c][j] - mean) * rstd, weight[c][j], bias[c][j]);
    });
    Row::store(p.out, team.row, first, team, z);
  }
}

/// Adds the values of a block's teams, which hold the same columns, up in those of team 0.
template <int kCount>
DEVICE void add_teams(Chunks<kCount>& values, int own, int teams, Shared<float> scratch) {
  constexpr int kValues = kCount * kChunk;
  for (int half = teams / 2; half; half /= 2) {
    const Shared<float> place =
        scratch + thread_index() % (block_threads() / teams * half) * kValues;
    if (own >= half && own < 2 * half) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) place.store(i, values[i / kChunk][i % kChunk]);
    }
    sync_block();
    if (own < half) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i / kChunk][i % kChunk] += place.load(i);
    }
    sync_block();
  }
}

/// g = grad, y = z normalized; 0 past the end of row r, and in all of a row past the last.
template <class Row>
DEVICE void load_pair(const NormBackwardParams& p, int64_t r, int64_t first, const Team& team,
                      Chunks<Row::count>& g, Chunks<Row::count>& y) {
  const auto grad = Row::fetch(p.grad, r, first, team);
  const auto z = Row::fetch(p.z, r, first, team);
  const bool there = r < p.z.count;
  const float mean = p.centered && there ? load(p.mean + r) : 0.0f;
  const float rstd = there ? load(p.rstd + r) : 0.0f;
  grad.values(g);
  z.values(y);
  each_element<Row::count>(first, p.z.n, team, [&](int c, int j, bool inside) {
    y[c][j] = inside ? (y[c][j] - mean) * rstd : 0.0f;
  });
}
template <class Row>
DEVICE void multiply_by_weight(const NormBackwardParams& p, int64_t first, const Team& team,
                               Chunks<Row::count>& g) {
  if (!p.weight.data) return;
  Chunks<Row::count> weight;
  Row::parameter(p.weight, first, team, weight);
  each_element<Row::count>(0, 0, team, [&](int c, int j, bool) { g[c][j] *= weight[c][j]; });
}

/// Adds a row to the sums of its columns.
template <int kCount>
DEVICE void add_to_columns(const Chunks<kCount>& g, const Chunks<kCount>& y,
                           Chunks<kCount>& dweight, Chunks<kCount>& dbias) {
#pragma unroll
  for (int c = 0; c < kCount; ++c)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      dweight[c][j] = fma(g[c][j], y[c][j], dweight[c][j]);
      dbias[c][j] += g[c][j];
    }
}

/// partials: a row for each range and kind of sum; none where another kernel sums the columns.
template <class Row>
KERNEL(kMaxTeam)
norm_backward_kernel(NormBackwardParams p, int size, Rows partials) {
  constexpr int count = Row::count;
  const Team team(size);
  const Shared<float> scratch = shared_memory<float>();
  const int teams = block_threads() / team.size, own = thread_index() / team.size;
  const int64_t n = p.z.n, step = Row::step(n, team), rows = p.z.count;
  const int64_t begin = rows * block_index() / grid_blocks();
  const int64_t end = rows * (block_index() + 1) / grid_blocks();
  const float elements = static_cast<float>(n);
  Chunks<count> dweight, dbias;
  fill(dweight, 0.0f);
  fill(dbias, 0.0f);

  for (int64_t round = begin; round < end; round += teams) {
    const int64_t r = round + own < end ? round + own : rows;
    Chunks<count> g, y;
    float mean_g = 0, mean_gy = 0;
    for (int64_t first = 0; first < n; first += step) {
      load_pair<Row>(p, r, first, team, g, y);
      if (partials.data) add_to_columns(g, y, dweight, dbias);
      multiply_by_weight<Row>(p, first, team, g);
      each_element<count>(0, 0, team, [&](int c, int j, bool) {
        mean_g += g[c][j];
        mean_gy += g[c][j] * y[c][j];
      });
    }
    if (!p.dz.data) continue;
    mean_g = team_sum(mean_g, team.size, scratch) / elements;
    mean_gy = team_sum(mean_gy, team.size, scratch) / elements;
    const float shift = p.centered ? mean_g : 0.0f;
    const float rstd = r < rows ? load(p.rstd + r) : 0.0f;
    for (int64_t first = 0; first < n; first += step) {
      if constexpr (Row::again) {
        load_pair<Row>(p, r, first, team, g, y);
        multiply_by_weight<Row>(p, first, team, g);
      }
      each_element<count>(0, 0, team, [&](int c, int j, bool) {
        g[c][j] = (g[c][j] - shift - y[c][j] * mean_gy) * rstd;
      });
      if (p.grad_sum.data) {
        Row::fetch(p.grad_sum, r, first, team).values(y);
        each_element<count>(0, 0, team, [&](int c, int j, bool) { g[c][j] += y[c][j]; });
      }
      Row::store(p.dz, r, first, team, g);
    }
  }
  if (!partials.data) return;
  const int64_t kinds = p.centered ? 2 : 1;
  add_teams(dweight, own, teams, scratch);
  if (p.centered) add_teams(dbias, own, teams, scratch);
  if (own > 0) return;
  store_row(partials, block_index() * kinds, 0, team, dweight);
  if (p.centered) store_row(partials, block_index() * kinds + 1, 0, team, dbias);
}

/// The sums of one step of columns over a range of rows: `size` threads of a block for the columns,
/// the teams in turns for the rows, as in norm_backward_kernel.
KERNEL(kMaxTeam) norm_columns_kernel(NormBackwardParams p, int size, Rows partials) {
  const Team team(size);
  const Shared<float> scratch = shared_memory<float>();
  const int teams = block_threads() / team.size, own = thread_index() / team.size;
  const int64_t first = block_index() * size * kChunk;
  const int64_t range = block_index_y(), rows = p.z.count;
  const int64_t begin = rows * range / grid_blocks_y(), end = rows * (range + 1) / grid_blocks_y();
  Chunks<1> dweight, dbias;
  fill(dweight, 0.0f);
  fill(dbias, 0.0f);
  for (int64_t r = begin + own; r < end; r += teams) {
    Chunks<1> g, y;
    load_pair<Walked>(p, r, first, team, g, y);
    add_to_columns(g, y, dweight, dbias);
  }
  const int64_t kinds = p.centered ? 2 : 1;
  add_teams(dweight, own, teams, scratch);
  if (p.centered) add_teams(dbias, own, teams, scratch);
  if (own > 0) return;
  store_row(partials, range * kinds, first, team, dweight);
  if (p.centered) store_row(partials, range * kinds + 1, first, team, dbias);
}

KERNEL(kSumThreads) norm_partials_kernel(NormBackwardParams p, Rows partials) {
  const int64_t kind = block_index_y(), kinds = grid_blocks_y();
  const Rows& out = kind ? p.dbias : p.dweight;
  if (!out.data) return;
  const int64_t column = block_index() * kWarp + lane_index();
  const float* from = static_cast<const float*>(partials.data) + kind * partials.n + column;
  float sum = 0;
  if (column < partials.n) {
#pragma unroll 4
    for (int64_t range = warp_index(); range < p.parts; range += kSumWarps)
      sum += load(from + range * kinds * partials.n);
  }
  const Shared<float> sums = shared_memory<float>();
  sums.store(thread_index(), sum);
  sync_block();
  if (warp_index() > 0 || column >= partials.n) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums.load(w * kWarp + lane_index());
  by_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    store(static_cast<T*>(out.data) + column * out.step, from_float<T>(sum));
  });
}

/// p.partials, a row for each range and kind of sum.
Rows partial_rows(const NormBackwardParams& p) {
  Rows rows;
  rows.data = p.partials;
  rows.n = p.z.n;
  rows.step = 1;
  rows.count = p.parts * (p.centered ? 2 : 1);
  rows.ndim = 1;
  rows.shape[0] = rows.count;
  rows.stride[0] = rows.n;
  return rows;
}

}  // namespace

void norm(const NormParams& p, Stream stream) {
  const bool held = can_hold<kChunks>(p.x.dtype, p.x.n, {&p.x, &p.residual, &p.sum, &p.out}) &&
                    is_vector(p.weight) && is_vector(p.bias);
  const auto kernel = !held                      ? norm_kernel<Walked>
                      : p.x.dtype == DType::f32  ? norm_kernel<Held<float>>
                      : p.x.dtype == DType::bf16 ? norm_kernel<Held<bf16>>
                                                 : norm_kernel<Held<f16>>;
  const int size = team_size<kChunks>(p.x.n);
  LAUNCH(kernel, team_blocks(p.x.count, size), team_threads(size), kTeamScratch, stream, p, size);
}

void norm_backward(const NormBackwardParams& p, Stream stream) {
  const int64_t n = p.z.n;
  const Rows partials = p.partials ? partial_rows(p) : Rows{};
  const bool held =
      can_hold<kChunks>(p.z.dtype, n, {&p.grad, &p.grad_sum, &p.z, &p.dz}) && is_vector(p.weight);
  const auto kernel = !held                      ? norm_backward_kernel<Walked>
                      : p.z.dtype == DType::f32  ? norm_backward_kernel<Held<float>>
                      : p.z.dtype == DType::bf16 ? norm_backward_kernel<Held<bf16>>
                                                 : norm_backward_kernel<Held<f16>>;
  const int size = team_size<kChunks>(n), threads = team_threads(size);
  // For add_teams, where there are several: half of them hand theirs to the others.
  const int shared = threads > size ? threads / 2 * kChunks * kChunk * 4 : kTeamScratch;
  const bool sums = held && p.partials;
  if (p.dz.data || sums) {
    const int64_t blocks = sums ? p.parts : team_blocks(p.z.count, size);
    LAUNCH(kernel, blocks, threads, shared, stream, p, size, sums ? partials : Rows{});
  }
  if (!p.partials) return;
  if (!held) {
    const int64_t columns = int64_t{size} * kChunk;
    const Grid grid((n + columns - 1) / columns, p.parts);
    LAUNCH(norm_columns_kernel, grid, threads, shared, stream, p, size, partials);
  }
  const Grid grid((n + kWarp - 1) / kWarp, p.centered ? 2 : 1);
  LAUNCH(norm_partials_kernel, grid, kSumThreads, kSumThreads * sizeof(float), stream, p, partials);
}

}  // namespace warpformer::cuda

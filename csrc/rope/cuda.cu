// A team takes one token and every `groups`-th of its heads: the cosines and sines of a thread's
// pairs stay in registers from head to head.
//
//                 thread 0    thread 1     ...
//   half:         x[0 .. 7]   x[8 .. 15]        and  x[R/2 .. R/2 + 7]   x[R/2 + 8 .. ]  ...
//   interleaved:  x[0 .. 7]   x[8 .. 15]
//
// Elements from R on are copied, 8 at a time. Each thread reads what it writes before it writes, so
// out may be x.
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "rope/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kThreads = 128, kHeadsOfTeam = 4;

/// values = elements [i, i + 8) of a row, 0 from `end` on.
template <class T>
DEVICE void read(const T* row, int64_t step, int64_t i, int64_t end, float (&values)[kChunk]) {
  if (i + kChunk <= end && is_vector_row(row + i, step)) {
    load_chunk(row + i, values, Cache::normal, Where::here());
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    values[j] = i + j < end ? to_float(load(row + (i + j) * step)) : 0.0f;
}

/// One head of one token.
struct Head {
  void* data;
  DType dtype;
  int64_t offset, step;
  DEVICE Head(const HeadRows& heads, int64_t token, int64_t h)
      : data(heads.tokens.data),
        dtype(heads.tokens.dtype),
        offset(row_offset(heads.tokens, token) + h * heads.stride),
        step(heads.tokens.step) {}

  DEVICE void load(int64_t i, int64_t end, float (&values)[kChunk]) const {
    by_float(dtype, [&](auto type) {
      read(static_cast<const decltype(type)*>(data) + offset, step, i, end, values);
    });
  }
  DEVICE void store(int64_t i, int64_t end, const float (&values)[kChunk]) const {
    by_float(dtype, [&](auto type) {
      using T = decltype(type);
      T* row = static_cast<T*>(data) + offset;
      if (i + kChunk <= end && is_vector_row(row + i, step)) {
        store_chunk(row + i, values, Cache::normal, Where::here());
        return;
      }
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        if (i + j < end) cuda::store(row + (i + j) * step, from_float<T>(values[j]));
    });
  }
};

DEVICE int64_t position_of(const RopeParams& p, int64_t token) {
  if (!p.positions.data) return token % p.length;
  const int64_t at = row_offset(p.positions, token);
  return p.positions.dtype == DType::i64 ? load(static_cast<const int64_t*>(p.positions.data) + at)
                                         : load(static_cast<const int32_t*>(p.positions.data) + at);
}

/// What element i + j is multiplied by, and its partner: NaN where there is no such position.
DEVICE void read_tables(const RopeParams& p, int64_t position, int64_t i, float (&c)[kChunk],
                        float (&s)[kChunk]) {
  const bool known = position >= 0 && position < p.table_rows;
  const int64_t row = known ? position * p.pairs : 0, end = known ? p.pairs : 0;
  if (p.interleaved) {
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const int64_t pair = i / 2 + j / 2;
      c[j] = pair < end ? load(p.cos + row + pair) : 0.0f;
      s[j] = pair < end ? load(p.sin + row + pair) : 0.0f;
      if (j % 2 == 0) s[j] = -s[j];
    }
  } else {
    read(p.cos + row, 1, i, end, c);
    read(p.sin + row, 1, i, end, s);
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    if (!known) c[j] = s[j] = __builtin_nanf("");
    if (p.conjugate) s[j] = -s[j];
  }
}

DEVICE void rotate_half(const Head& x, const Head& out, int64_t i, int64_t pairs,
                        const float (&c)[kChunk], const float (&s)[kChunk]) {
  float a[kChunk], b[kChunk];
  x.load(i, pairs, a);
  x.load(pairs + i, 2 * pairs, b);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    const float first = fma(a[j], c[j], -b[j] * s[j]);
    b[j] = fma(b[j], c[j], a[j] * s[j]);
    a[j] = first;
  }
  out.store(i, pairs, a);
  out.store(pairs + i, 2 * pairs, b);
}

DEVICE void rotate_interleaved(const Head& x, const Head& out, int64_t i, int64_t pairs,
                               const float (&c)[kChunk], const float (&s)[kChunk]) {
  float v[kChunk], rotated[kChunk];
  x.load(i, 2 * pairs, v);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) rotated[j] = fma(v[j], c[j], v[j ^ 1] * s[j]);
  out.store(i, 2 * pairs, rotated);
}

/// Blocks (x, y): tokens; groups of heads, those of the query first.
KERNEL(kThreads) rope_kernel(RopeParams p, int team_size, int64_t query_groups) {
  const Team team(team_size);
  const int64_t token = team.row;
  if (token >= p.x[0].tokens.count) return;
  const bool is_key = block_index_y() >= query_groups;
  const HeadRows &x = p.x[is_key], &out = p.out[is_key];
  const int64_t group = is_key ? block_index_y() - query_groups : block_index_y();
  const int64_t groups = is_key ? grid_blocks_y() - query_groups : query_groups;
  const int64_t position = position_of(p, token), end = p.interleaved ? 2 * p.pairs : p.pairs;
  for (int64_t i = kChunk * team.index; i < end; i += kChunk * team.size) {
    float c[kChunk], s[kChunk];
    read_tables(p, position, i, c, s);
    for (int64_t h = group; h < x.count; h += groups) {
      const Head from(x, token, h), to(out, token, h);
      if (p.interleaved) {
        rotate_interleaved(from, to, i, p.pairs, c, s);
      } else {
        rotate_half(from, to, i, p.pairs, c, s);
      }
    }
  }
  if (x.tokens.data == out.tokens.data) return;
  for (int64_t i = 2 * p.pairs + kChunk * team.index; i < x.tokens.n; i += kChunk * team.size) {
    for (int64_t h = group; h < x.count; h += groups) {
      float v[kChunk];
      Head(x, token, h).load(i, x.tokens.n, v);
      Head(out, token, h).store(i, x.tokens.n, v);
    }
  }
}

}  // namespace

void rope(const RopeParams& p, Stream stream) {
  const int64_t end = p.interleaved ? 2 * p.pairs : p.pairs;
  int team = team_size<1>(end);
  if (team > kThreads) team = kThreads;
  const auto groups = [](const HeadRows& heads) {
    return (heads.count + kHeadsOfTeam - 1) / kHeadsOfTeam;
  };
  const Grid grid(team_blocks(p.x[0].tokens.count, team), groups(p.x[0]) + groups(p.x[1]));
  LAUNCH(rope_kernel, grid, kThreads, 0, stream, p, team, groups(p.x[0]));
}

}  // namespace warpformer::cuda

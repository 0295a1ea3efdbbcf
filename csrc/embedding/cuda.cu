// A team of threads (core/cuda/rows.cuh) owns a row of out and adds one row of each table.
//
// Backward, a team owns a segment of kSegment positions of the sorted indices, and adds the rows of
// grad of each run of equal ones. What continues a run from before the segment, and what goes on
// after it, are parts of a sum that the team where the run begins makes afterwards, in their order:
//
//   index   | 3 3 7 7 7 7 | 7 7 7 7 7 7 | 7 9 9 9 9 9 |
//   segment   3 | 7 (2s+1)   7 (2s)        7 (2s) | 9         dtable[7] = the three parts of it
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "embedding/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kBlockThreads = 128;
constexpr int kBlockRows = 16;

DEVICE void add(Chunks<1>& to, const Chunks<1>& values) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) to[0][j] += values[0][j];
}

/// Threads for the columns of a row, in steps of which the grid's y counts.
int column_team(int64_t n) {
  const int size = team_size<1>(n);
  return size < kBlockThreads ? size : kBlockThreads;
}
Grid column_grid(int64_t teams, int64_t n, int size) {
  const int64_t columns = int64_t{size} * kChunk, per_block = kBlockThreads / size;
  return Grid((teams + per_block - 1) / per_block, (n + columns - 1) / columns);
}
DEVICE int64_t first_column(const Team& team) { return block_index_y() * team.size * kChunk; }

DEVICE int64_t index_of(const Rows& index, int64_t r) {
  const int64_t offset = row_offset(index, r);
  return index.dtype == DType::i64 ? load(static_cast<const int64_t*>(index.data) + offset)
                                   : load(static_cast<const int32_t*>(index.data) + offset);
}

KERNEL(kBlockThreads) embedding_sum_kernel(EmbeddingSumParams p, int size) {
  const Team team(size);
  if (team.row >= p.out.count) return;
  const int64_t first = first_column(team);
  Chunks<1> total, row;
#pragma unroll
  for (int i = 0; i < kMaxTables; ++i) {
    if (i >= p.tables) break;
    const int64_t index = index_of(p.index[i], team.row);
    // Past the end of a table: a row of NaN.
    const bool there = index >= 0 && index < p.table[i].count;
    load_row(p.table[i], there ? index : p.table[i].count, first, team, __builtin_nanf(""), row);
    each_element<1>(0, 0, team, [&](int c, int j, bool) {
      total[c][j] = i ? total[c][j] + row[c][j] : row[c][j];
    });
  }
  store_row(p.out, team.row, first, team, total);
}

/// Whether positions i and i + 1 have the same index.
DEVICE bool continues(const EmbeddingSumBackwardParams& p, int64_t i) {
  return i >= 0 && i + 1 < p.grad.count && load(p.index + i) == load(p.index + i + 1);
}

KERNEL(kBlockThreads) embedding_backward_kernel(EmbeddingSumBackwardParams p, int size) {
  const Team team(size);
  const int64_t first = first_column(team), segment = team.row;
  const int64_t begin = segment * kSegment;
  const int64_t end = begin + kSegment < p.grad.count ? begin + kSegment : p.grad.count;
  Chunks<1> total, block, row;
  fill(total, 0.0f);
  fill(block, 0.0f);
  bool from_before = continues(p, begin - 1);
  for (int64_t i = begin; i < end; ++i) {
    load_row(p.grad, load(p.order + i), first, team, 0.0f, row);
    add(block, row);
    const bool goes_on = continues(p, i), run_ends = !goes_on || i + 1 == end;
    // In blocks, because a long chain of additions rounds more.
    if (run_ends || i % kBlockRows == kBlockRows - 1) {
      add(total, block);
      fill(block, 0.0f);
    }
    if (!run_ends) continue;
    const int64_t v = load(p.index + i);
    if (from_before) {
      store_row(p.work, 2 * segment, first, team, total);
    } else if (goes_on) {
      store_row(p.work, 2 * segment + 1, first, team, total);
    } else if (v >= 0 && v < p.dtable.count && v != p.padding) {
      store_row(p.dtable, v, first, team, total);
    }
    from_before = false;
    fill(total, 0.0f);
  }
}

/// The runs that end in a later segment than they begin in.
KERNEL(kBlockThreads) embedding_parts_kernel(EmbeddingSumBackwardParams p, int size) {
  const Team team(size);
  const int64_t first = first_column(team), count = p.grad.count;
  int64_t segment = team.row, last = (segment + 1) * kSegment - 1;
  if (last >= count || !continues(p, last)) return;
  const int64_t v = load(p.index + last);
  // A run that came from before has begun in an earlier segment.
  const bool begins_here =
      load(p.index + segment * kSegment) != v || !continues(p, segment * kSegment - 1);
  if (!begins_here || v < 0 || v >= p.dtable.count || v == p.padding) return;
  Chunks<1> total, part;
  load_row(p.work, 2 * segment + 1, first, team, 0.0f, total);
  while (continues(p, last)) {
    ++segment;
    load_row(p.work, 2 * segment, first, team, 0.0f, part);
    add(total, part);
    last += kSegment;
    if (last >= count || load(p.index + last) != v) break;
  }
  store_row(p.dtable, v, first, team, total);
}

}  // namespace

void embedding_sum(const EmbeddingSumParams& p, Stream stream) {
  const int size = column_team(p.out.n);
  LAUNCH(embedding_sum_kernel, column_grid(p.out.count, p.out.n, size), kBlockThreads, 0, stream, p,
         size);
}

void embedding_sum_backward(const EmbeddingSumBackwardParams& p, Stream stream) {
  const int size = column_team(p.grad.n);
  const Grid grid = column_grid(p.work.count / 2, p.grad.n, size);
  LAUNCH(embedding_backward_kernel, grid, kBlockThreads, 0, stream, p, size);
  LAUNCH(embedding_parts_kernel, grid, kBlockThreads, 0, stream, p, size);
}

}  // namespace warpformer::cuda

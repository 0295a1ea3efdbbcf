// Elementwise kernels cut rows (core/cuda/rows.cuh) into spans: a team takes one step of
// `team * kChunks * 8` columns of one row.
//
//             columns
//   row 0   | span 0 | span 1 | ... |          unit u of work: row u / count, span u % count
//   row 1   | span 0 | ...
#pragma once

#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"

namespace warpformer::cuda {

constexpr int kSpanThreads = 128;

/// How rows of n columns are cut.
template <int kChunks>
struct Spans {
  int team;
  int64_t count;
  explicit Spans(int64_t n) : team(team_size<kChunks>(n)) {
    if (team > kSpanThreads) team = kSpanThreads;
    count = (n + step() - 1) / step();
  }
  DEVICE int64_t step() const { return int64_t{team} * kChunks * kChunk; }
  /// Blocks of kSpanThreads threads for one team a unit.
  int64_t blocks(int64_t rows) const { return team_blocks(rows * count, team); }
};

/// What this thread's team works on: `row` may be past the last.
struct Span {
  Team team;
  int64_t row, first;
  template <int kChunks>
  DEVICE explicit Span(const Spans<kChunks>& spans)
      : team(spans.team),
        row(team.row / spans.count),
        first((team.row - row * spans.count) * spans.step()) {}
};

}  // namespace warpformer::cuda

// Position biases by distance = key - query - shift, as a table [buckets, H] has them: half of the
// buckets for each direction (or all of them for keys before the query), of these half for one
// distance each, and the others for logarithmically wider ones up to max_distance. Every distance
// beyond has the last bucket, so that a row of 2 reach + 1 biases holds all of a head:
//
//   key       0 ...      own - reach   ...   own   ...   own + reach     ... S
//   index     0 0 0 0 0  0 1 2 3       ...  reach  ...   2 reach  2 reach ...
//
// Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
// Transformer".
#pragma once

#include "core/rows.h"

namespace warpformer {

/// A table [buckets, H] of biases by relative position; data is null where it is not given.
struct PositionBias {
  Rows table;
  bool bidirectional;  // half of the buckets for keys after the query
  int64_t max_distance;
};

}  // namespace warpformer

#if defined(WF_ISA)
namespace warpformer::cpu::WF_ISA {

/// How a table is looked up: of one call in which no distance is above `farthest`, shared by its
/// threads.
struct Distances {
  int64_t reach, count;  // count = 2 reach + 1 distances
  int32_t* bucket;       // of each distance
  float* bias;           // [H, count]
  static int64_t reach_of(const PositionBias& p, int64_t farthest) {
    return at_most(p.max_distance, farthest);
  }
  /// Floats of memory.
  static int64_t size(const PositionBias& p, int64_t farthest) {
    return p.table.data ? (1 + p.table.n) * (2 * reach_of(p, farthest) + 1) + p.table.n : 0;
  }
};

/// T5's bucket, in the float arithmetic of the models that were trained with it.
inline int32_t bucket_of(const PositionBias& p, int64_t distance) {
  int64_t buckets = p.table.count, first = 0;
  if (p.bidirectional) {
    buckets /= 2;
    first = distance > 0 ? buckets : 0;
    distance = distance < 0 ? -distance : distance;
  } else {
    distance = distance < 0 ? -distance : 0;
  }
  const int64_t exact = buckets / 2;
  if (distance < exact) return static_cast<int32_t>(first + distance);
  const float octaves = logf(static_cast<float>(distance) / static_cast<float>(exact)) /
                        static_cast<float>(log(static_cast<double>(p.max_distance) / exact));
  const auto wide = static_cast<int64_t>(octaves * static_cast<float>(buckets - exact));
  return static_cast<int32_t>(first + at_most(exact + wide, buckets - 1));
}

/// In `memory`, size(p, farthest) floats of it.
inline Distances distances(const PositionBias& p, int64_t farthest, float* memory) {
  Distances d{};
  if (!p.table.data) return d;
  const int64_t heads = p.table.n;
  d.reach = Distances::reach_of(p, farthest);
  d.count = 2 * d.reach + 1;
  d.bucket = reinterpret_cast<int32_t*>(memory);
  d.bias = memory + d.count;
  float* row = d.bias + heads * d.count;
  for (int64_t i = 0; i < d.count; ++i) {
    d.bucket[i] = bucket_of(p, i - d.reach);
    if (i == 0 || d.bucket[i] != d.bucket[i - 1]) read_span(p.table, d.bucket[i], 0, heads, row);
    for (int64_t h = 0; h < heads; ++h) d.bias[h * d.count + i] = row[h];
  }
  return d;
}

/// Calls f(index of the distance of column 0, begin, end) for the columns in reach of n whose first
/// one has `distance`, and before(n), after(begin) for those on either side.
template <class Before, class Within, class After>
WF_INLINE void by_reach(int64_t reach, int64_t distance, int64_t n, const Before& before,
                        const Within& within, const After& after) {
  const auto column = [&](int64_t d) {
    const int64_t j = d - distance;
    return j < 0 ? 0 : at_most(j, n);
  };
  const int64_t begin = column(-reach), end = column(reach + 1);
  before(begin);
  within(distance + reach, begin, end);
  after(end);
}

/// s[0, n) += the biases of one head, from `distance` on.
inline void add_position_bias(const float* bias, int64_t reach, int64_t distance, int64_t n,
                              float* s) {
  by_reach(
      reach, distance, n,
      [&](int64_t end) {
        for (int64_t j = 0; j < end; ++j) s[j] += bias[0];
      },
      [&](int64_t index, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) s[j] += bias[index + j];
      },
      [&](int64_t begin) {
        for (int64_t j = begin; j < n; ++j) s[j] += bias[2 * reach];
      });
}

}  // namespace warpformer::cpu::WF_ISA
#endif

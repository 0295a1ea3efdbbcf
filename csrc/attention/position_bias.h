// Position biases by distance = key - query - shift, as a table [buckets, H] has them: half of the
// buckets for each direction (or all of them for keys before the query), of these half for one
// distance each, and the others for logarithmically wider ones up to max_distance. Every distance
// beyond has the last bucket, so that a row of 2 reach + 1 biases holds all of a head:
//
//   key       0 ...      own - reach   ...   own   ...   own + reach     ... S
//   index     0 0 0 0 0  0 1 2 3       ...  reach  ...   2 reach  2 reach ...
//
// Included by cpu files only.
#pragma once

#include "attention/op.h"

namespace warpformer::cpu::WF_ISA {

/// How a table is looked up: of one call, shared by its threads.
struct Distances {
  int64_t reach, count;  // count = 2 reach + 1 distances
  int32_t* bucket;       // of each distance
  float* bias;           // [H, count]
  static int64_t reach_of(const AttentionParams& p) {
    return at_most(p.position_bias.max_distance, p.queries + p.keys);
  }
  static int64_t size(const AttentionParams& p) {
    return p.position_bias.table.data ? (1 + p.heads) * (2 * reach_of(p) + 1) + p.heads : 0;
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

/// In `memory`, size(p) floats of it.
inline Distances distances(const AttentionParams& p, float* memory) {
  Distances d{};
  if (!p.position_bias.table.data) return d;
  d.reach = Distances::reach_of(p);
  d.count = 2 * d.reach + 1;
  d.bucket = reinterpret_cast<int32_t*>(memory);
  d.bias = memory + d.count;
  float* row = d.bias + p.heads * d.count;
  for (int64_t i = 0; i < d.count; ++i) {
    d.bucket[i] = bucket_of(p.position_bias, i - d.reach);
    if (i == 0 || d.bucket[i] != d.bucket[i - 1])
      read_span(p.position_bias.table, d.bucket[i], 0, p.heads, row);
    for (int64_t h = 0; h < p.heads; ++h) d.bias[h * d.count + i] = row[h];
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

/// sums += ds[0, n) by distance: the transpose of add_position_bias.
inline void sum_by_distance(const float* ds, int64_t reach, int64_t distance, int64_t n,
                            double* sums) {
  const auto total = [&](int64_t begin, int64_t end) {
    Sum sum;
    for_lanes(end - begin, [&](int64_t j, auto k) { sum.add(load(ds + begin + j, k)); });
    return sum.total();
  };
  by_reach(
      reach, distance, n, [&](int64_t end) { sums[0] += total(0, end); },
      [&](int64_t index, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) sums[index + j] += ds[j];
      },
      [&](int64_t begin) { sums[2 * reach] += total(begin, n); });
}

}  // namespace warpformer::cpu::WF_ISA

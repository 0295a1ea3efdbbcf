// Position biases (core/position_bias.h) on a GPU: each is looked up where it is needed.
#pragma once

#include <cmath>

#include "core/cuda/rows.cuh"
#include "core/position_bias.h"

namespace warpformer::cuda {

/// The logarithm of the range that the wider buckets share, as the models' own code has it.
inline float octaves_of(const PositionBias& p) {
  const int64_t exact = p.table.count / (p.bidirectional ? 4 : 2);
  return exact > 0 ? static_cast<float>(
                         std::log(static_cast<double>(p.max_distance) / static_cast<double>(exact)))
                   : 1.0f;
}

/// T5's bucket of distance = key - query, in the float arithmetic of the models that were trained
/// with it.
DEVICE int64_t bucket_of(const PositionBias& p, float octaves, int64_t distance) {
  int64_t buckets = p.table.count, first = 0;
  if (p.bidirectional) {
    buckets /= 2;
    first = distance > 0 ? buckets : 0;
    distance = distance < 0 ? -distance : distance;
  } else {
    distance = distance < 0 ? -distance : 0;
  }
  const int64_t exact = buckets / 2;
  if (distance < exact) return first + distance;
  if (distance >= p.max_distance) return first + buckets - 1;
  const float share = log(static_cast<float>(distance) / static_cast<float>(exact)) / octaves;
  const int64_t bucket = exact + static_cast<int64_t>(share * static_cast<float>(buckets - exact));
  return first + (bucket < buckets ? bucket : buckets - 1);
}

/// What is added to a score of `head`.
DEVICE float position_bias(const PositionBias& p, float octaves, int64_t distance, int64_t head) {
  const int64_t at = row_offset(p.table, bucket_of(p, octaves, distance)) + head * p.table.step;
  float bias = 0.0f;
  by_float(p.table.dtype, [&](auto type) {
    bias = to_float(load(static_cast<const decltype(type)*>(p.table.data) + at));
  });
  return bias;
}

}  // namespace warpformer::cuda

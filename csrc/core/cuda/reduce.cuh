// Sums and maxima over a warp and over a block: one order of operations whatever the schedule, and
// the same bits in every thread.
#pragma once

#include "core/cuda/memory.cuh"

namespace warpformer::cuda {

/// By exchange with the lane 16, 8, 4, 2, 1 away: lanes add the same pairs, so they agree.
DEVICE float warp_sum(float x, WHERE) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x += shuffle_xor(x, step, where);
  return x;
}
/// NaN where an operand is NaN.
DEVICE float nan_max(float a, float b) { return a > b || a != a ? a : b; }
DEVICE float warp_max(float x, WHERE) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x = nan_max(x, shuffle_xor(x, step, where));
  return x;
}

/// `combine(warp's value)` of every warp's value; `scratch` has 32 floats, free again on return.
template <class Combine>
DEVICE float across_warps(float x, float neutral, Shared<float> scratch, Combine combine,
                          Where where) {
  if (lane_index() == 0) scratch.store(warp_index(), x, where);
  sync_block(where);
  x = lane_index() < block_threads() / kWarp ? scratch.load(lane_index(), where) : neutral;
  x = combine(x);
  sync_block(where);
  return x;
}
DEVICE float block_sum(float x, Shared<float> scratch, WHERE) {
  return across_warps(
      warp_sum(x, where), 0.0f, scratch, [=](float v) { return warp_sum(v, where); }, where);
}
DEVICE float block_max(float x, Shared<float> scratch, WHERE) {
  return across_warps(
      warp_max(x, where), -__builtin_inff(), scratch, [=](float v) { return warp_max(v, where); },
      where);
}

}  // namespace warpformer::cuda

// What ops share that sum exponentials of a row, in one order of additions.
#pragma once

#include "core/cuda/rows.cuh"

namespace warpformer::cuda {

constexpr int kScoreChunks = 2;  // that a thread of a team holds
constexpr float kInfinity = __builtin_inff();

/// What is subtracted before exponentials are taken: no NaN where all of z is -inf.
DEVICE float finite(float top) { return top == -kInfinity ? 0.0f : top; }
/// The sum of exponentials; 1 where nothing is kept.
DEVICE float kept_sum(float sum) { return sum == 0.0f ? 1.0f : sum; }

/// x[0] = the sum of all, in a tree: a long chain of additions rounds more.
template <int kCount>
DEVICE float tree_sum(float (&x)[kCount]) {
#pragma unroll
  for (int half = kCount / 2; half; half /= 2)
#pragma unroll
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  return x[0];
}
/// The sum of term(c, j, whether the element lies before element n) over a step.
template <int kCount, class F>
DEVICE float step_sum(int64_t first, int64_t n, const Team& team, F term) {
  float sums[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const int64_t left = n - first - int64_t{kChunk} * (team.index + c * team.size);
    float terms[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j) terms[j] = term(c, j, j < left);
    sums[c] = tree_sum(terms);
  }
  return tree_sum(sums);
}

}  // namespace warpformer::cuda

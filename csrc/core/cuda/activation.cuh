// The functions of core/activation_functions.h for kernels: a Vec is one float.
#pragma once

#include "core/cuda/math.cuh"

namespace warpformer::cuda::lane {  // the operations of core/simd.h

using Vec = float;
DEVICE float set(float x) { return x; }
/// The second operand where either is NaN.
DEVICE float max(float a, float b) { return a > b ? a : b; }
DEVICE float min(float a, float b) { return a < b ? a : b; }
DEVICE float where_less(float a, float b, float yes, float no) { return a < b ? yes : no; }
DEVICE float exp_rough(float x) { return exp2_approx(1.44269504f * x); }
/// The polynomial and the form of core/simd.h: tanhf is less exact.
DEVICE float tanh(float x) {
  const float a = abs(x), square = x * x;
  float p = 0.00229894f;
  p = fma(p, square, -0.00835001f);
  p = fma(p, square, 0.021771f);
  p = fma(p, square, -0.05395955f);
  p = fma(p, square, 0.13333305f);
  p = fma(p, square, -0.33333333f);
  const float large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  return a < 0.625f ? fma(p * square, x, x) : x < 0.0f ? -large : large;
}

}  // namespace warpformer::cuda::lane

#define WF_INLINE DEVICE
#include "core/activation_functions.h"
#undef WF_INLINE

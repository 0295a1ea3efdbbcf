// layer_norm: out = (z - mean z) * rstd * weight + bias, rstd = 1 / sqrt(var z + eps)
// rms_norm:   out = z * rstd * weight,                   rstd = 1 / sqrt(mean z^2 + eps)
// over the last dimension, of z = x + residual; with g = weight * grad and y = z normalized,
// backward:   dz = rstd * (g - mean g - y * mean(g * y)) + grad_sum   (rms_norm: no mean g)
//             dweight = sum of grad * y, dbias = sum of grad over the rows
//
//   x, residual, out   [..., C], any strides, f32 f16 bf16 each; the shapes are equal
//   weight, bias       [C], any stride, f32 f16 bf16 each
//   sum                z itself, like x; in the dtype of x and residual, f32 where they differ
//   mean, rstd         [rows] f32, contiguous: what backward needs
//   partials           [parts, 2 (rms_norm: 1), C] f32: sums over parts of the rows
//
// z is rounded to the dtype of `sum` before anything else is made of it, so that results are those
// of x + residual. The variance is the biased one, of the deviations from the mean.
// Sources: Ba, Kiros, Hinton, "Layer Normalization", equation 3; Zhang, Sennrich, "Root Mean Square
// Layer Normalization", equation 4; torch.nn.functional.layer_norm and rms_norm.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

// Data is null where an operand is not given or a result not asked for.
struct NormParams {
  bool centered;  // layer_norm; else rms_norm, which has neither bias nor mean
  Rows x, residual, weight, bias, sum, out;
  float *mean, *rstd;
  float eps;
};
DECLARE_KERNEL(norm, NormParams)

struct NormBackwardParams {
  bool centered;
  Rows grad, grad_sum, z, weight;
  const float *mean, *rstd;
  Rows dz, dweight, dbias;
  float* partials;
  int64_t parts;  // ranges of rows, from [parts * k / rows]; a function of the shape only
};
DECLARE_KERNEL(norm_backward, NormBackwardParams)

}  // namespace warpformer

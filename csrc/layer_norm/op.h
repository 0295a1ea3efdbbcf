// layer_norm: out = (z - mean z) / sqrt(var z + eps) * weight + bias, z = x + residual, over the
// last dimension
//
//   x, residual, out   [..., C], any strides, f32 f16 bf16 each; the shapes are equal
//   weight, bias       [C], contiguous, f32 f16 bf16
//
// The variance is the biased one, of the deviations from the mean (a second pass over the row in
// cache). Source: Ba, Kiros, Hinton, "Layer Normalization", equation 3;
// torch.nn.functional.layer_norm.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct LayerNormParams {
  Rows x, residual, weight, bias, out;  // data is null where an operand is not given
  float eps;
};
DECLARE_KERNEL(layer_norm, LayerNormParams)

}  // namespace warpformer

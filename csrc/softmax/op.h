// softmax: out = exp(z - max z) / sum exp(z - max z) along one dimension, z = scale * x + mask
//
//   x, out   any shape and strides, f32 f16 bf16 each
//   mask     none, or the shape of x (broadcast by stride 0): bool (true = keep) or additive floats
//
// A row with nothing kept (all z = -inf) gives 0. Sums are float.
// Source: "Attention Is All You Need", section 3.2.1; torch.nn.functional.softmax.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct SoftmaxParams {
  Rows x, out, mask;
  bool has_mask;
  float scale;
};
DECLARE_KERNEL(softmax, SoftmaxParams)

}  // namespace warpformer

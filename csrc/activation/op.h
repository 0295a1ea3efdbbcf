// activation: out = act(x + bias), or gated out = act(x + bias) * (up + up_bias), elementwise
//
//   act                a function of core/activation.h
//   x, up, out, grad   [..., C], any strides, f32 f16 bf16 each; the shapes are equal
//   bias, up_bias      [C] or none
//
// activation_backward, with z = x + bias, u = up + up_bias (1 without up), g the gradient of out:
//
//   dx = g u act'(z)   dup = g act(z)   dbias, dup_bias = sums of dx and dup over the rows
//
// each if asked for. The rows are cut into `parts` runs, whose sums over 16 rows at a time go to
// `partial`; those of all parts are added up in double. So the bits depend on the shape alone.
//
// Sources: Hendrycks, Gimpel, "Gaussian Error Linear Units"; Shazeer, "GLU Variants Improve
// Transformer"; So et al., "Primer" (relu2); torch.nn.functional.gelu, silu, relu.
#pragma once

#include "core/activation.h"
#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

// data is null where an operand is not given, or a gradient not asked for.
struct ActivationParams {
  Rows x, up, bias, up_bias, out;
  Activation activation;
};

struct ActivationBackwardParams {
  Rows grad, x, up, bias, up_bias;
  Rows dx, dup, dbias, dup_bias;
  float* partial;  // [parts, 2, C]: of dbias and of dup_bias
  int64_t parts;   // 0 where no bias gradient is asked for
  Activation activation;
};

constexpr int kChainRows = 16;  // rows added up before they are added to the sums of the part

DECLARE_KERNEL(activation, ActivationParams)
DECLARE_KERNEL(activation_backward, ActivationBackwardParams)

}  // namespace warpformer

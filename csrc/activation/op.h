// gelu: out = g(x + bias), elementwise
//
//   g(z) = z Phi(z), Phi the normal distribution function;  tanh form:
//   g(z) = z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
//   x, out   [..., C], any strides, f32 f16 bf16 each
//   bias     [C] or none
//
// Source: Hendrycks, Gimpel, "Gaussian Error Linear Units"; torch.nn.functional.gelu.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct GeluParams {
  Rows x, bias, out;  // bias.data is null where there is none
  bool tanh_form;
};
DECLARE_KERNEL(gelu, GeluParams)

}  // namespace warpformer

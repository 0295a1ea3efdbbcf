// dropout: out = residual + (keep ? x / (1 - p) : 0), elementwise
//
//   x, residual, out   any shape and strides, f32 f16 bf16 each; the shapes are equal
//   seed               one i64, on the device of x
//
// Element i (in row-major order of the shape, whatever the strides) is kept where word i % 4 of
// counter i / 4 of Philox under `seed` is at least p 2^32: the same mask on every device. So the
// gradient of x is the same op on the gradient of out.
//
// Source: Srivastava et al., "Dropout"; Salmon et al. (core/philox.h).
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct DropoutParams {
  Rows x, residual, out;  // data is null where there is no residual
  const int64_t* seed;
  uint64_t threshold;  // the first word that is kept: p 2^32
  float scale;         // 1 / (1 - p)
};
DECLARE_KERNEL(dropout, DropoutParams)

}  // namespace warpformer

// Products by quantized weights on Hopper: what csrc/linear/cuda.cu hands over to cuda_sm90.cu.
#pragma once

#include "linear/input.h"
#include "linear/op.h"

namespace warpformer::cuda {

/// Whether the Hopper kernel takes the call: every format but int4_dynamic. By format and K, never
/// by the number of rows, or a row would have other bits in another batch.
bool fits_sm90(const LinearParams& p);
void linear_sm90(const LinearParams& p, const Input& x, Stream stream);

}  // namespace warpformer::cuda

// Attention's forward on Hopper: what csrc/attention/cuda.cu hands over to cuda_sm90.cu.
#pragma once

#include "attention/op.h"

namespace warpformer::cuda {

/// Whether the Hopper kernel takes the call: bf16 or f16, heads of up to 128 columns, a multiple of
/// 8; windows, causal ones too, packed sequences, key padding, grouped heads, sinks, lse. A
/// sequence takes the same kernel alone, padded and packed: the same bits.
bool fits_sm90(const AttentionParams& p);
void attention_sm90(const AttentionParams& p, Stream stream);

}  // namespace warpformer::cuda

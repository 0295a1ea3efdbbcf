// x as products by quantized weights read it on CUDA: what inputs.cuh makes of it.
#pragma once

#include <cstdint>

namespace warpformer::cuda {

/// x as integers: of a token or, [block][token], of blocks of 32 of it.
struct Quantized {
  int8_t* values;       // [tokens, row]
  float* scales;        // of int4_dynamic a 16th, as its codes come 16 times as large
  int32_t* offsets;     // the zero point of a token; the sum of the values of a block
  int64_t row, tokens;  // tokens with padding
};

struct Input {
  const void* data;     // [tokens, row], in the type of mma; rows of whole 16 bytes
  int64_t row;          // elements from a token to the next
  int parts;            // tokens of a row of out, added up: 2 where x is float
  Quantized quantized;  // x of the dynamic formats
};

}  // namespace warpformer::cuda

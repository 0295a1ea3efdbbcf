// An operand of four dimensions, one of them heads: what attention and the key/value cache address.
#pragma once

#include "core/types.h"

namespace warpformer {

struct Tensor;

/// data is null where the operand is not given; strides are in elements.
struct Heads {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;  // bytes of an element
  int64_t stride[4] = {};
};

/// Of a tensor of at most four dimensions.
Heads heads(const Tensor& t);

/// Whether these are the beginnings of packed sequences: i32, from 0 to `total`, never falling.
bool is_partition(const Tensor& cu_seqlens, int64_t total);

}  // namespace warpformer

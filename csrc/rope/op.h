// rope: rotates pairs of elements of each head by the angles of its token's position
//
//   half form:         pair i is (x[i], x[i + R/2])      GPT-NeoX, Llama
//   interleaved form:  pair i is (x[2i], x[2i + 1])      GPT-J, the original
//   out pair = (a cos - b sin, b cos + a sin), cos and sin of row `position`, column i of the
//   tables
//
//   x, out     [..., T, H, D], any strides, f32 f16 bf16 each; D >= R, elements from R on are
//   copied key        a second x with its own number of heads, or none cos, sin   [P, R/2] f32,
//   contiguous positions  [..., T] i64 or i32, any strides; 0, 1, ... T - 1 if none
//
// `conjugate` rotates back: the gradient. out may be x itself. A position outside the tables gives
// NaN on CUDA, where nobody waits to be told; on the CPU it is refused.
//
// Source: Su et al., "RoFormer"; Wang, GPT-J; Black et al., "GPT-NeoX-20B".
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

/// The heads of all tokens: head h of token r is row r of `tokens`, `stride * h` elements further.
struct HeadRows {
  Rows tokens;  // data is null where there is no key
  int64_t count, stride;
};

struct RopeParams {
  HeadRows x[2], out[2];  // query and key
  const float *cos, *sin;
  Rows positions;                     // rows of one element; data is null where they are 0, 1, ...
  int64_t table_rows, pairs, length;  // P, R/2, T
  bool interleaved, conjugate;
};
DECLARE_KERNEL(rope, RopeParams)

}  // namespace warpformer

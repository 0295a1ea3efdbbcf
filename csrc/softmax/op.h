// softmax:      out = exp(z - max z) / sum exp(z - max z)    along one dimension
// log_softmax:  out = z - max z - log sum exp(z - max z)     z = scale x + mask
//
//   x, out   any shape and strides, f32 f16 bf16 each; out may be x
//   mask     none, or the shape of x (broadcast by stride 0): bool (true = keep) or additive floats
//   causal   [.., T, S]: row t keeps the elements 0..t
//
// An element that is not kept (z = -inf) gives 0, or -inf of log_softmax; so does a whole row. Sums
// are float.
//
// softmax_backward:      dz = out (grad - sum out grad)      dx = scale dz
// log_softmax_backward:  dz = grad - exp(out) sum grad
//
//   out, grad, dx   as out and x above; dx may be none. What is not kept has dz = 0, whatever its
//   grad dmask           none, or [M, S], f32 f16 bf16: dmask[m] = sum of dz over the rows [m R, (m
//   + 1) R) parts           [P, M, S] f32, where dmask is: the sums of P equal runs of those rows
//
// Source: "Attention Is All You Need", section 3.2.1; torch.nn.functional.softmax, log_softmax.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct SoftmaxParams {
  Rows x, out, mask;
  bool has_mask, log;
  float scale;
  int64_t queries;  // row r sees 1 + r % queries elements; 0: all of them
  int64_t run;      // rows that are neighbours in all of x, out and mask
};
DECLARE_KERNEL(softmax, SoftmaxParams)

struct SoftmaxBackwardParams {
  Rows grad, out, dx;
  bool has_dx, log;
  float scale;
  int64_t run;
  int64_t masks, parts;  // of dmask; 0 where there is none
  Rows part, dmask;      // part i of dmask[m] is row i * masks + m
};
DECLARE_KERNEL(softmax_backward, SoftmaxBackwardParams)

}  // namespace warpformer

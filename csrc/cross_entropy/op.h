// cross_entropy, over the classes v of a row with target y; L = log sum exp x, nll(v) = L - x[v]:
//   loss = w[y] ((1 - s) nll(y) + z L^2) + s / V sum_v w[v] nll(v)       s smoothing, z z_loss
//
//   x        [N, V], [V] or [B, V, ..], f32 f16 bf16, any strides
//   target   x without V, i64 or i32, contiguous. Where it is `ignored`, loss and gradient are 0
//   and
//            the row is not read
//   weight   w: none (1), or [V], f32 f16 bf16
//   loss     the shape of target; or [], the sum or (mean) sum loss / sum w[y] over rows not
//   ignored dx       none, or the shape of x: the gradient of loss; where not reduced, of each
//   row's own work     [N + 1], f32
//
// Nothing else of the size of x is written. A target that is neither a class nor ignored is refused
// before anything is written; on a GPU, whose memory is not read here, its row's loss and gradient
// are NaN.
//
// cross_entropy_backward: out = dx grad, where grad is [] or the shape of target; out may be dx,
// and then a grad of 1 costs nothing.
//
// Source: torch.nn.functional.cross_entropy; z-loss: Chowdhery et al., "PaLM", section 5.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

struct CrossEntropyParams {
  Rows x, dx;
  bool has_dx;
  const void* target;  // of row r of x; i64, or i32
  bool wide;           // i64
  int64_t ignored;
  Rows weight;  // one row
  bool has_weight;
  Rows loss;  // rows of one element
  bool reduced, mean;
  double smoothing, z_loss;
  double *row_loss, *scale;  // of work: a row's loss, and what multiplies the sum of all
  int64_t run;               // rows that are neighbours in x and dx
};
DECLARE_KERNEL(cross_entropy, CrossEntropyParams)

struct CrossEntropyBackwardParams {
  Rows dx, out;
  Rows grad;  // as many rows of one element, or one
};
DECLARE_KERNEL(cross_entropy_backward, CrossEntropyBackwardParams)

}  // namespace warpformer

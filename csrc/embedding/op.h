// embedding_sum: out[n] = sum over tables of table[index[n]]
//
//   tables   up to 4 of [V, C], any strides, f32 f16 bf16
//   indices  as many of the same shape [...], i32 or i64, any strides (0 where broadcast)
//   out      [..., C], f32 f16 bf16
//
// An index outside its table is refused before anything is written; on a GPU, whose memory is not
// read here, its row is NaN.
//
// embedding_sum_backward: dtable[v] = sum over n with index[n] = v of grad[n]
//
//   grad     [n, C], f32 f16 bf16, any strides
//   index    [n], i64, contiguous, sorted; order[i] is the row of grad that index[i] belongs to
//   dtable   [V, C], f32 f16 bf16: only rows that occur are written, and not row `padding`
//   work     [2 ceil(n / 64), C] f32, contiguous
//
// Rows are added in the order given, in float.
// Source: Devlin et al., "BERT", figure 2 (token + segment + position embeddings).
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

constexpr int kMaxTables = 4;

struct EmbeddingSumParams {
  int tables;
  Rows table[kMaxTables];
  Rows index[kMaxTables];  // rows of one element; on the CPU checked copies, i64 and contiguous
  Rows out;
};
DECLARE_KERNEL(embedding_sum, EmbeddingSumParams)

constexpr int64_t kSegment = 64;  // positions whose gradients one team of a GPU adds

struct EmbeddingSumBackwardParams {
  Rows grad, dtable;
  const int64_t *index, *order;
  int64_t padding;  // -1: none
  Rows work;        // of segment s: 2 s, what continues from before; 2 s + 1, what goes on after it
};
DECLARE_KERNEL(embedding_sum_backward, EmbeddingSumBackwardParams)

}  // namespace warpformer

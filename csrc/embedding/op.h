// embedding_sum: out[n] = sum over tables of table[index[n]]
//
//   tables   up to 4 of [V, C], contiguous, f32 f16 bf16
//   indices  as many of the same shape [...], i32 or i64, any strides (0 where broadcast)
//   out      [..., C], f32 f16 bf16
//
// An index outside its table is refused before anything is written.
// Source: Devlin et al., "BERT", figure 2 (token + segment + position embeddings).
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

constexpr int kMaxTables = 4;

struct EmbeddingSumParams {
  int tables;
  Rows table[kMaxTables];
  const int64_t* index[kMaxTables];  // checked, contiguous
  Rows out;
};
DECLARE_CPU_KERNEL(embedding_sum, EmbeddingSumParams)

}  // namespace warpformer

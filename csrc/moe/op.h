// The way of tokens to their experts and back. N tokens have k experts each, which makes N k
// places: (n, j) is place n k + j. Row i of what goes through the experts is that of place
// order[i], and place p has row places[p].
//
// sort_by_expert: rows in ascending order of their experts, those of one expert in that of places
//   order[i]    the place that comes i-th by (expert, place);  places[order[i]] = i
//   offsets[e]  how many places have an expert in 0..e: where the rows of expert e end
//
//   expert_ids  [N, k], i64 i32, any strides
//   order       [N k], i64, contiguous        places  [N, k], i64, contiguous
//   offsets     [E], i32, contiguous; E <= kMaxExperts, N k < 2^31
//
// An id that is none of 0..E - 1 is refused; on a GPU, whose memory is not read here, its place
// goes behind those of the last expert, past all offsets.
//
// spread_rows: out[i] = input[order[i] / k]
//
//   input  [N, C], f32 f16 bf16, any strides       order  [N k], i64, contiguous
//   out    [N k, C], the dtype of input, any strides
//
// sum_rows: out[n] = sum over j, ascending, of weights[n, j] rows[places[n, j]]; each product and
// each sum is rounded to float
//
//   rows    [N k, C], f32 f16 bf16, any strides    places  [N, k], i64, contiguous
//   weights [N, k], f32 f16 bf16, any strides; 1 if None
//   out     [N, C], the dtype of rows, any strides
//
// A place or a row that is not there is refused; on a GPU what it would give is NaN.
// Source: Shazeer et al., "Outrageously Large Neural Networks" (2017), equation 1; Gale et al.,
// "MegaBlocks" (2022), for the sort.
#pragma once

#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

constexpr int64_t kMaxExperts = 1024;

struct SortByExpertParams {
  Rows ids;  // rows of one element
  int experts;
  int64_t *order, *places;
  int32_t* offsets;
};
DECLARE_KERNEL(sort_by_expert, SortByExpertParams)

struct SpreadRowsParams {
  Rows in, out;
  const int64_t* order;
  int64_t k;
};
DECLARE_KERNEL(spread_rows, SpreadRowsParams)

struct SumRowsParams {
  Rows rows, out;
  const void* weights;  // null: 1
  DType dtype;          // of weights
  int64_t weight_stride[2];
  const int64_t* places;
  int64_t k;
};
DECLARE_KERNEL(sum_rows, SumRowsParams)

}  // namespace warpformer

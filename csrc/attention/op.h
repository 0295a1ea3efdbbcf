// scaled_dot_product_attention: out = softmax(scale q k^T + mask) v, per sequence and head
//
//   q    [B, H, T, D]     k  [B, G, S, D]     v  [B, G, S, Dv]     out  [B, H, T, Dv]
//        one dtype of f32 f16 bf16, any strides; G divides H, head h reads key/value head h / (H /
//        G)
//   packed: q [1, H, T, D] holds the sequences one after the other along T, k and v along S;
//           cu_seqlens_q, cu_seqlens_k [sequences + 1] i32 are where they begin, and the total
//   mask [B, H, T, S] by stride 0, bool (true = keep) or additive floats; not with packed sequences
//   causal: query i sees keys 0..i (aligned top-left)
//
// A row that sees no key gives 0. What a row does not see never reaches it, be it NaN.
// Scores, sums and the output are accumulated in float over blocks of 256 keys, whatever T and B
// are. Source: "Attention Is All You Need", equation 1; Milakov, Gimelshein, "Online normalizer
// calculation for softmax"; Dao et al., "FlashAttention", for the blocks.
#pragma once

#include "core/gemm.h"
#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

constexpr int64_t kBlockKeys = kDepth;  // the depth of one product P V
constexpr int64_t kBlockQueries = 16 * kMaxTileRows;

/// A [batch, head, row, column] operand; data is null where it is not given. Strides are in
/// elements.
struct Heads {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;  // bytes of an element
  int64_t stride[4] = {};
};

struct AttentionParams {
  Heads q, k, v, out, mask;
  const int32_t* cu_seqlens_q;  // null where sequences are not packed
  const int32_t* cu_seqlens_k;
  int64_t sequences, heads, kv_heads, queries, keys, width, value_width;
  float scale;
  bool causal;
};

inline int64_t padded(int64_t width) { return (width + kPanel - 1) / kPanel * kPanel; }

/// Floats of one thread: packed k, v and q blocks, a tile of scores, the output, row statistics.
inline int64_t attention_scratch(int64_t width, int64_t value_width) {
  const int64_t stretches = width ? (width + kDepth - 1) / kDepth : 1;
  return kBlockKeys * (width + padded(value_width)) + kBlockQueries * stretches * kStride +
         (kMaxTileRows + 1) * kStride + padded(width) + padded(value_width) +
         kBlockQueries * (padded(value_width) + 2);
}

DECLARE_CPU_KERNEL(attention, AttentionParams)

}  // namespace warpformer

// scaled_dot_product_attention, per sequence and head:
//
//   s[i, j] = scale q[i] k[j]                              (softcap: cap tanh(s / cap))
//             + mask[i, j] - slope |i + shift - j|          (mask additive; slope of ALiBi)
//             + position_bias[bucket(j - i - shift)]        (buckets of T5: core/position_bias.h)
//   p = softmax(s) over the keys that i sees (a sink adds exp(sink) to the sum)
//   out = (drop p) v       lse = log sum exp s
//
// drop p[i, j] = p[i, j] / (1 - probability) or 0, by word j % 4 of the counter (j / 4, i, head,
// sequence) of Philox: 32 bits each, positions within the sequence.
//
//   q    [B, H, T, D]     k  [B, G, S, D]     v  [B, G, S, Dv]     out  [B, H, T, Dv]
//        one dtype of f32 f16 bf16, any strides; G divides H, head h reads key/value head h / (H /
//        G)
//   packed: q [1, H, T, D] holds the sequences one after the other along T, k and v along S;
//           cu_seqlens_q, cu_seqlens_k [sequences + 1] i32 are where they begin, and the total
//   mask [B, H, T, S] by stride 0, bool (true = keep) or additive floats; not with packed sequences
//   slopes, sinks [H] f32          lse [B, H, T] f32          position_bias [buckets, H] floats
//   query i sees keys i + shift - left .. i + shift + right; shift is 0 (top-left) or S - T
//   (bottom-right), right is 0 for causal attention
//
// A row that sees no key gives 0, and lse -inf. What a row does not see never reaches it, be it
// NaN. Scores, sums and the output are accumulated in float over blocks of 256 keys, whatever T and
// B are. Source: "Attention Is All You Need", equation 1; Milakov, Gimelshein, "Online normalizer
// calculation for softmax"; Dao et al., "FlashAttention", for the blocks; Press et al., "Train
// Short, Test Long" (ALiBi); Xiao et al., "Efficient Streaming Language Models with Attention
// Sinks"; Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
// Transformer" (T5's position biases).
#pragma once

#include "core/gemm.h"
#include "core/heads.h"
#include "core/isa_list.h"
#include "core/philox.h"
#include "core/position_bias.h"

namespace warpformer {

struct AttentionParams {
  // [batch, head, row, column]
  Heads q, k, v, out, mask, lse;
  const int32_t* cu_seqlens_q = nullptr;  // null where sequences are not packed
  const int32_t* cu_seqlens_k = nullptr;
  const float* slopes = nullptr;
  const float* sinks = nullptr;
  PositionBias position_bias;
  float* biases = nullptr;  // [H, 2 reach + 1]: of each distance, which a GPU writes first
  int64_t reach = 0;        // no distance beyond has another bias
  Draw dropout;             // seed is null where there is none
  int64_t sequences, heads, kv_heads, queries, keys, width, value_width;
  float scale;
  float softcap;  // 0: none
  bool bottom_right;
  int64_t left, right;  // keys seen before and after the query's own
};

// Gradients: with delta = sum over Dv of dout out, less dlse,
//
//   dP = dout v^T     dS = P (dP - delta)     dq = scale dS k     dk = scale dS^T q     dv = P^T
//   dout dmask = dS             dposition_bias[bucket] = sum of dS over its distances, of all rows
//
// and with a dropout drop P in place of P in dv, drop dP in place of dP.
//
//   dq [B, H, T, D] f32, contiguous; dk, dv as k, v; dmask [B, H, T, S] as the mask, before the sum
//   over what was broadcast; dlse [B, H, T] f32; delta [B, H, T] f32, contiguous, is written
struct AttentionBackwardParams {
  AttentionParams forward;
  Heads dout, dlse, dk, dv, dmask;
  float* dq;
  float* delta;
  float* dposition_bias;  // [buckets, H], contiguous; null where it is not asked for
  float* parts;           // [blocks of 64 queries, buckets]: a GPU's sums of dposition_bias
};

DECLARE_KERNEL(attention, AttentionParams)
DECLARE_KERNEL(attention_backward, AttentionBackwardParams)

}  // namespace warpformer

// scaled_dot_product_attention, per sequence and head:
//
//   s[i, j] = scale q[i] k[j]                              (softcap: cap tanh(s / cap))
//             + mask[i, j] - slope |i + shift - j|          (mask additive; slope of ALiBi)
//   p = softmax(s) over the keys that i sees (a sink adds exp(sink) to the sum)
//   out = p v              lse = log sum exp s
//
//   q    [B, H, T, D]     k  [B, G, S, D]     v  [B, G, S, Dv]     out  [B, H, T, Dv]
//        one dtype of f32 f16 bf16, any strides; G divides H, head h reads key/value head h / (H /
//        G)
//   packed: q [1, H, T, D] holds the sequences one after the other along T, k and v along S;
//           cu_seqlens_q, cu_seqlens_k [sequences + 1] i32 are where they begin, and the total
//   mask [B, H, T, S] by stride 0, bool (true = keep) or additive floats; not with packed sequences
//   slopes, sinks [H] f32          lse [B, H, T] f32
//   query i sees keys i + shift - left .. i + shift + right; shift is 0 (top-left) or S - T
//   (bottom-right), right is 0 for causal attention
//
// A row that sees no key gives 0, and lse -inf. What a row does not see never reaches it, be it
// NaN. Scores, sums and the output are accumulated in float over blocks of 256 keys, whatever T and
// B are. Source: "Attention Is All You Need", equation 1; Milakov, Gimelshein, "Online normalizer
// calculation for softmax"; Dao et al., "FlashAttention", for the blocks; Press et al., "Train
// Short, Test Long" (ALiBi); Xiao et al., "Efficient Streaming Language Models with Attention
// Sinks".
#pragma once

#include "core/gemm.h"
#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

/// A [batch, head, row, column] operand; data is null where it is not given. Strides are in
/// elements.
struct Heads {
  char* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;  // bytes of an element
  int64_t stride[4] = {};
};

struct AttentionParams {
  Heads q, k, v, out, mask, lse;
  const int32_t* cu_seqlens_q = nullptr;  // null where sequences are not packed
  const int32_t* cu_seqlens_k = nullptr;
  const float* slopes = nullptr;
  const float* sinks = nullptr;
  int64_t sequences, heads, kv_heads, queries, keys, width, value_width;
  float scale;
  float softcap;  // 0: none
  bool bottom_right;
  int64_t left, right;  // keys seen before and after the query's own
};

// Gradients: with delta = sum over Dv of dout out, less dlse,
//
//   dP = dout v^T     dS = P (dP - delta)     dq = scale dS k     dk = scale dS^T q     dv = P^T
//   dout dmask = dS
//
//   dq [B, H, T, D] f32, contiguous; dk, dv as k, v; dmask [B, H, T, S] as the mask, before the sum
//   over what was broadcast; dlse [B, H, T] f32; delta [B, H, T] f32, contiguous, is written
struct AttentionBackwardParams {
  AttentionParams forward;
  Heads dout, dlse, dk, dv, dmask;
  float* dq;
  float* delta;
};

DECLARE_CPU_KERNEL(attention, AttentionParams)
DECLARE_CPU_KERNEL(attention_backward, AttentionBackwardParams)

}  // namespace warpformer

// A key/value cache: what generation reads at every step and appends to.
//
//   key_cache  [B, S, G, D]     value_cache [B, S, G, Dv]      one dtype of f32 f16 bf16 int8
//   or paged   [blocks, block_size, G, D]; slot j of sequence b is slot j % block_size of block
//              block_table[b, j / block_size]
//   int8: key_scales, value_scales [B, S, G] f32 or bf16 (paged [blocks, block_size, G]): one per
//   slot and head, the value is int8 * scale
//
// cached_attention, per sequence b of n = lengths[b] slots in use and per head, T queries at once:
//
//   s[t, j] = scale q[t] k[j]                     (softcap: cap tanh(s / cap))
//             - slope |t + n - T - j|              (slope of ALiBi)
//             + position_bias[bucket(j - t - n + T)]    (buckets of T5: core/position_bias.h)
//   out = softmax(s) v          lse = log sum exp s          (a sink adds exp(sink) to the sum)
//
//   q, out [B, T, H, D], [B, T, H, Dv] f32 f16 bf16, the dtype of caches that are not int8; any
//   strides; G divides H, head h reads head h / (H / G) of the cache
//   query t sees slots t + n - T - left .. t + n - T + right of [0, n)
//   lse    [B, H, T] f32, contiguous     slopes, sinks [H] f32
//   position_bias [buckets, H] floats
//
// append_to_cache_ writes key and value [B, T, G, D] into slots lengths[b] .. lengths[b] + T - 1;
// where the cache is int8 as round(x / scale), scale = max |x| / 127 of each slot and head, rounded
// to its dtype.
//
// copy_blocks_: the first `count` slots of block new_blocks[i] become those of old_blocks[i], i =
// 0, 1, ... one after the other.
//
//   cache [blocks, block_size, ...] f32 f16 bf16 int8, contiguous; old_blocks, new_blocks [n] i64,
//   contiguous
//
// Packed: the tokens of all sequences one after the other, [N, ...] in place of [B, T, ...] and lse
// [H, N]; cu_seqlens [B + 1] i32 are where each begins, and N. T is then a sequence's own.
//
// A query that sees no slot gives 0, and lse -inf. What it does not see never reaches it, be it
// NaN. Slots are split every 256 whatever B, T and the threads are: a sequence gives the same bits
// alone and in any batch. Weights of a cache in bf16 are rounded to bf16 where the ISA multiplies
// it, and on a GPU those of queries in bf16 or f16 to their type. Source: Dao et al.,
// "Flash-Decoding for long-context inference" (the splits and their merge); Kwon et al., "Efficient
// Memory Management for Large Language Model Serving with PagedAttention".
#pragma once

#include "core/heads.h"
#include "core/isa_list.h"
#include "core/position_bias.h"
#include "kv_cache/cut.h"

namespace warpformer {

struct KvCache {
  // [batch or block, token, head, column]; scales have no columns
  Heads k, v, k_scales, v_scales;        // scales without data where the cache is not int8
  const int32_t* lengths;                // [B]
  const int32_t* block_table = nullptr;  // [B, max_blocks]; null where the cache is not paged
  int64_t max_blocks, block_size;        // not paged: block_size is S
  int64_t blocks;                        // that there are; not paged: B
  int64_t batch, kv_heads, width, value_width;
};

/// The tokens of each sequence that a call brings.
struct Tokens {
  int64_t count;                        // T of every sequence; N where they are packed
  const int32_t* cu_seqlens = nullptr;  // [B + 1]; null where they are not
};

struct CachedAttentionParams {
  KvCache cache;
  Tokens tokens;
  Heads q, out;  // [batch, token, head, column]; packed: of one batch
  float* lse = nullptr;
  const float* slopes = nullptr;
  const float* sinks = nullptr;
  PositionBias position_bias;
  int64_t heads;
  float scale;
  float softcap;        // 0: none
  int64_t left, right;  // slots seen before and after the query's own
  // Of the GPU alone:
  Cut cut;
  float* work;
  float position_octaves;  // core/cuda/position_bias.cuh
};
DECLARE_KERNEL(cached_attention, CachedAttentionParams)

struct AppendParams {
  KvCache cache;
  Tokens tokens;
  Heads k, v;
};
DECLARE_KERNEL(append_to_cache_, AppendParams)

struct AppendPositionsParams {
  Tokens tokens;
  const int32_t* lengths;
  int64_t batch;
  int32_t* positions;  // of every token
};
DECLARE_KERNEL(append_positions, AppendPositionsParams)

struct CopyBlocksParams {
  char* data;
  int64_t block, bytes;  // of a block, and of those to copy
  int64_t blocks;        // that there are
  const int64_t *old_blocks, *new_blocks;
  int64_t copies;
};
DECLARE_KERNEL(copy_blocks_, CopyBlocksParams)

}  // namespace warpformer

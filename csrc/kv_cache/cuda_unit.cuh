// What the blocks of cached_attention work on (cut.h), what of it rows see, and the results of
// splits and their merge, which are the same whoever does it.
#pragma once

#include "core/cuda/exponentials.cuh"
#include "kv_cache/cuda_slots.cuh"

namespace warpformer::cuda {

constexpr int kSplit = Cut::kSplit, kRows = Cut::kRows, kColumns = Cut::kColumns;

/// Slots [begin, end) of a sequence.
struct Range {
  int64_t begin, end;
};
struct Sequence {
  Part queries;
  int64_t index, length;
  bool known;  // its length is one there can be

  DEVICE Sequence(const CachedAttentionParams& p, int64_t index)
      : queries(part_of(p.tokens, index)), index(index) {
    const int64_t given = load(p.cache.lengths + index);
    length = within(given, 0, p.cache.max_blocks * p.cache.block_size);
    known = length == given;
  }
  /// The slot of the token that query t is of.
  DEVICE int64_t own_slot(int64_t t) const { return t + length - queries.count; }
  DEVICE Range visible(const CachedAttentionParams& p, int64_t t) const {
    const int64_t own = own_slot(t), begin = larger<int64_t>(own - p.left, 0);
    const int64_t end = own >= length - 1 - p.right ? length : own + p.right + 1;
    return {begin, larger(begin, end)};
  }
};

/// The rows of a block.
struct Unit {
  Sequence sequence;
  int64_t head;  // of the cache
  int group;     // heads that share it
  int first;     // the block's first row, of the sequence's
  int rows;      // of the sequence

  DEVICE static int block_rows(const Cut& cut) { return static_cast<int>(cut.row_tiles) * kRows; }
  DEVICE static int64_t sequence_of(const CachedAttentionParams& p, int64_t item) {
    if (!p.tokens.cu_seqlens) return quotient(item, p.cut.row_blocks);
    return last_sequence(p.cache.batch, [&](int64_t b) { return first_item(p, b) <= item; });
  }
  /// Sequence b has at most first_item(b + 1) - first_item(b) blocks for each head.
  DEVICE static int64_t first_item(const CachedAttentionParams& p, int64_t b) {
    if (!p.tokens.cu_seqlens) return b * p.cut.row_blocks;
    return part_of(p.tokens, b).first * (p.heads / p.cache.kv_heads) / block_rows(p.cut) + b;
  }

  DEVICE explicit Unit(const CachedAttentionParams& p)
      : Unit(p, quotient(block_index(), p.cache.kv_heads)) {}
  DEVICE Unit(const CachedAttentionParams& p, int64_t item)
      : sequence(p, sequence_of(p, item)),
        head(block_index() - item * p.cache.kv_heads),
        group(quotient(p.heads, p.cache.kv_heads)),
        first(static_cast<int>(item - first_item(p, sequence.index)) * block_rows(p.cut)),
        rows(static_cast<int>(sequence.queries.count) * group) {}

  DEVICE int last(int row, int count) const { return smaller(row + count, rows) - 1; }
  /// From the first to the last slot that any of `count` rows from `row` on sees.
  DEVICE Range seen_by_any(const CachedAttentionParams& p, int row, int count) const {
    if (row >= rows) return {0, 0};
    return {sequence.visible(p, row / group).begin,
            sequence.visible(p, last(row, count) / group).end};
  }
  /// What all of them see.
  DEVICE Range seen_by_all(const CachedAttentionParams& p, int row, int count) const {
    if (row >= rows) return {0, 0};
    return {sequence.visible(p, last(row, count) / group).begin,
            sequence.visible(p, row / group).end};
  }
};

// ---- Results of splits

/// A sum of exp(s - high) v over some slots, and that of exp(s - high).
struct State {
  float high, total;
};

/// e^(x - high), where high is -inf only if x is.
DEVICE float weight_of(float x, float high) { return exp(x - finite(high)); }

/// Adds `part` to `sum`: outputs are sum's times `kept` plus the part's times `added`.
DEVICE void merge(State& sum, const State& part, float& kept, float& added) {
  const float high = max(sum.high, part.high);
  kept = weight_of(sum.high, high);
  added = weight_of(part.high, high);
  sum = {high, fma(part.total, added, sum.total * kept)};
}
DEVICE float merged(float sum, float part, float kept, float added) {
  return fma(part, added, sum * kept);
}

/// Ends a row: what its output is multiplied by, and its lse. A row that sees nothing has 0.
DEVICE float finish(const CachedAttentionParams& p, State state, int64_t head, float& lse) {
  lse = -kInfinity;
  if (state.total == 0.0f) return 0.0f;
  float scale = 1.0f;
  if (p.sinks) {
    const float sink = load(p.sinks + head), high = max(state.high, sink);
    scale = weight_of(state.high, high);
    state = {high, fma(state.total, scale, weight_of(sink, high))};
  }
  lse = state.high + log(state.total);
  return scale / state.total;
}

DEVICE float* lse_of(const CachedAttentionParams& p, const Part& queries, int64_t t, int64_t head) {
  return p.lse + (queries.batch * p.heads + head) * p.tokens.count + queries.first + t;
}

template <class T>
DEVICE T* out_row(const CachedAttentionParams& p, const Part& queries, int64_t t, int64_t head) {
  return reinterpret_cast<T*>(p.out.data) + queries.batch * p.out.stride[0] +
         (queries.first + t) * p.out.stride[1] + head * p.out.stride[2];
}

/// Where the result of a split is kept for a query with a head.
struct Work {
  float* o;
  State* state;
  DEVICE Work(const CachedAttentionParams& p, int64_t token, int64_t head, int64_t split) {
    const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.cache.batch);
    const int64_t at = (token * p.heads + head) * p.cut.splits + split;
    o = p.work + at * p.cut.row_floats;
    state =
        reinterpret_cast<State*>(p.work + tokens * p.heads * p.cut.splits * p.cut.row_floats) + at;
  }
};
DEVICE int64_t token_of(const CachedAttentionParams& p, const Part& queries, int64_t t) {
  return queries.batch * p.tokens.count + queries.first + t;
}

}  // namespace warpformer::cuda

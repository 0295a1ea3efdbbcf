// Where the slots of a sequence lie in the cache, and its tokens among those of a call. Included by
// cpu files only.
#pragma once

#include "kv_cache/op.h"

namespace warpformer::cpu::WF_ISA {

struct Slot {
  int64_t block, offset;
};

inline Slot slot_of(const KvCache& cache, int64_t batch, int64_t slot) {
  if (!cache.block_table) return {batch, slot};
  return {cache.block_table[batch * cache.max_blocks + slot / cache.block_size],
          slot % cache.block_size};
}

/// The tokens of a sequence: `count` from token `first` of batch `batch` on.
struct Part {
  int64_t batch, first, count;
};

inline Part part_of(const Tokens& tokens, int64_t sequence) {
  const int32_t* at = tokens.cu_seqlens;
  if (!at) return {sequence, 0, tokens.count};
  return {0, at[sequence], at[sequence + 1] - at[sequence]};
}

/// Head `head` of a slot, from there so many elements.
inline int64_t offset_of(const Heads& t, Slot slot, int64_t head) {
  return slot.block * t.stride[0] + slot.offset * t.stride[1] + head * t.stride[2];
}
template <class T>
inline T* at(const Heads& t, Slot slot, int64_t head) {
  return reinterpret_cast<T*>(t.data) + offset_of(t, slot, head);
}

/// Slots of a sequence.
struct Range {
  int64_t begin, end;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace warpformer::cpu::WF_ISA

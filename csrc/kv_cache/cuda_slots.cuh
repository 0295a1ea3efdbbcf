// Where the slots of a sequence lie in the cache, and its tokens among those of a call. Lengths,
// blocks and beginnings of sequences are the GPU's, which op.cpp has not seen: what they name that
// is not there is neither read nor written.
#pragma once

#include "core/cuda/memory.cuh"
#include "kv_cache/op.h"

namespace warpformer::cuda {

template <class T>
DEVICE T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
DEVICE T larger(T a, T b) {
  return a > b ? a : b;
}
/// a / b of numbers below 2^32: a few instructions, where 64 bits take a hundred.
DEVICE int quotient(int64_t a, int64_t b) {
  return static_cast<int>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}
DEVICE int64_t within(int64_t value, int64_t low, int64_t high) {
  return smaller(larger(value, low), high);
}

/// A block of the cache and a slot of it; block < 0: not there.
struct Slot {
  int32_t block, offset;
};

DEVICE Slot slot_of(const KvCache& cache, int64_t sequence, int64_t slot) {
  if (!cache.block_table) return {static_cast<int32_t>(sequence), static_cast<int32_t>(slot)};
  const auto at = static_cast<uint32_t>(slot), size = static_cast<uint32_t>(cache.block_size);
  const int32_t block = load(cache.block_table + sequence * cache.max_blocks + at / size);
  return {block < cache.blocks ? block : -1, static_cast<int32_t>(at % size)};
}

/// The tokens of a sequence: `count` from token `first` of batch `batch` on.
struct Part {
  int64_t batch, first, count;
};

DEVICE Part part_of(const Tokens& tokens, int64_t sequence) {
  const int32_t* at = tokens.cu_seqlens;
  if (!at) return {sequence, 0, tokens.count};
  const int64_t first = within(load(at + sequence), 0, tokens.count);
  return {0, first, within(load(at + sequence + 1), first, tokens.count) - first};
}

/// The last sequence of a call for which is_before(sequence), which holds for the first ones.
template <class F>
DEVICE int64_t last_sequence(int64_t sequences, F is_before) {
  int64_t low = 0;
  for (int64_t high = sequences; high - low > 1;) {
    const int64_t middle = (low + high) / 2;
    (is_before(middle) ? low : high) = middle;
  }
  return low;
}
/// Of which sequence a token of the call is.
DEVICE int64_t sequence_of(const Tokens& tokens, int64_t sequences, int64_t token) {
  if (!tokens.cu_seqlens) return quotient(token, tokens.count);
  return last_sequence(sequences, [&](int64_t b) { return load(tokens.cu_seqlens + b) <= token; });
}

/// Where the first head of a slot lies, from there so many elements.
DEVICE int64_t offset_of(const Heads& t, Slot slot) {
  return slot.block * t.stride[0] + slot.offset * t.stride[1];
}
template <class T>
DEVICE T* at(const Heads& t, Slot slot, int64_t head) {
  return reinterpret_cast<T*>(t.data) + offset_of(t, slot) + head * t.stride[2];
}

}  // namespace warpformer::cuda

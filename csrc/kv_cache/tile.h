// A tile: the rows of one head in a few slots, which is what the products work on at a time. And
// the fetching of what comes later, in the order in which it lies in memory, all heads of a slot
// together, whatever the order of the tiles: memory read from one end to the other gives a third
// more.
#pragma once

#include "kv_cache/slots.h"

namespace warpformer::cpu::WF_ISA {

template <class T, int64_t kSlots>
struct Tile {
  const T* rows[kSlots];  // those past the end repeat the last one
  int64_t count;
};

/// Some heads of an operand of the cache, in some slots of a sequence.
struct Span {
  const Heads* operand;
  int64_t batch, head, heads, width;
  Range slots;
};

/// Fetches spans, one after the other, in runs of what is contiguous.
class Fetcher {
 public:
  explicit Fetcher(const KvCache& cache) : cache_(cache) {}

  /// At most three spans are not yet at their end.
  void append(const Span& span) {
    if (span.slots.begin >= span.slots.end || span.width == 0) return;
    spans_[count_++] = span;
    if (count_ == 1) enter();
  }

  /// The next so many bytes, or those that are left, into L2: L1 waits for too few lines at a time
  /// to keep memory busy.
  void fetch(int64_t bytes) {
    while (bytes > 0 && (next_ < end_ || start_run())) {
      const int64_t n = smaller(bytes, end_ - next_);
      for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(next_ + i, 0, 2);
      next_ += n;
      bytes -= n;
    }
  }

 private:
  static constexpr int64_t kLine = 64;  // bytes of a line of the cache

  bool start_run() {
    if (count_ == 0) return false;
    const Span& span = spans_[0];
    const Heads& t = *span.operand;
    const int64_t block = slot_ / cache_.block_size * cache_.block_size;
    const int64_t in_block = smaller(span.slots.end, block + cache_.block_size) - slot_;
    const bool heads = span.heads == 1 || t.stride[2] == span.width;
    const bool slots = t.stride[1] == (heads ? span.heads : 1) * span.width;
    next_ = t.data + offset_of(t, slot_of(cache_, span.batch, slot_), head_) * t.size;
    end_ = next_ + (heads ? span.heads : 1) * (slots ? in_block : 1) * span.width * t.size;
    slot_ += slots ? in_block : 1;
    if (slot_ < span.slots.end) return true;
    slot_ = span.slots.begin;
    if (!heads && ++head_ < span.head + span.heads) return true;
    for (int i = 1; i < count_; ++i) spans_[i - 1] = spans_[i];
    if (--count_) enter();
    return true;
  }
  void enter() {
    head_ = spans_[0].head;
    slot_ = spans_[0].slots.begin;
  }

  const KvCache& cache_;
  Span spans_[3];
  int count_ = 0;
  int64_t head_ = 0, slot_ = 0;  // where the next run begins
  const char *next_ = nullptr, *end_ = nullptr;
};

}  // namespace warpformer::cpu::WF_ISA

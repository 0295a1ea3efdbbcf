// A tile: the rows of one head in a few slots, which is what the products work on at a time, and as
// many rows that are fetched meanwhile. Rows are fetched in the order in which they lie in memory,
// all heads of a slot together, whatever the order of the tiles: memory read from one end to the
// other gives a third more.
#pragma once

#include "core/simd.h"
#include "kv_cache/slots.h"

namespace warpformer::cpu::WF_ISA {

constexpr int64_t kLine = 64;  // bytes of a line of the cache

/// Fetches the lines that begin in kBytes bytes from `offset` of a row on. Kernels ask for rows
/// line by line as they use up others: many at once would stop them until all have come.
template <int64_t kBytes>
WF_INLINE void fetch(const void* row, int64_t offset) {
  if (kBytes < kLine && offset % kLine != 0) return;
  for (int64_t byte = 0; byte < kBytes; byte += kLine)
    __builtin_prefetch(static_cast<const char*>(row) + offset + byte);
}

template <class T, int64_t kSlots>
struct Tile {
  const T* rows[kSlots];  // those past the end repeat the last one
  const T* next[kSlots];  // to be fetched
  int64_t count;
};

/// Some heads of an operand of the cache, in some slots of a sequence.
struct Span {
  const TokenHeads* operand;
  int64_t batch, head, heads;
  Range slots;
};

/// Walks the rows of spans, one span after the other.
template <class T>
class Walk {
 public:
  explicit Walk(const Cache& cache) : cache_(cache) {}

  /// At most three spans are not yet at their end.
  void append(const Span& span) {
    if (span.slots.begin >= span.slots.end) return;
    spans_[count_++] = span;
    if (count_ == 1) enter();
  }

  /// The next row; the last one again after the end.
  const T* next() {
    if (count_ == 0) return row_;
    const Span& span = spans_[0];
    row_ = at<T>(*span.operand, place_, head_);
    const int64_t* stride = span.operand->stride;
    const bool moved = stride[2] <= stride[1] ? next_head(span) || next_slot(span)
                                              : next_slot(span) || next_head(span);
    if (!moved) {
      for (int i = 1; i < count_; ++i) spans_[i - 1] = spans_[i];
      if (--count_) enter();
    }
    return row_;
  }

 private:
  void enter() {
    head_ = spans_[0].head;
    slot_ = spans_[0].slots.begin;
    place_ = slot_of(cache_, spans_[0].batch, slot_);
  }
  /// One further; back to the first one, and false, after the last one.
  bool next_head(const Span& span) {
    if (++head_ < span.head + span.heads) return true;
    head_ = span.head;
    return false;
  }
  bool next_slot(const Span& span) {
    const bool moved = ++slot_ < span.slots.end;
    if (!moved) slot_ = span.slots.begin;
    place_ = slot_of(cache_, span.batch, slot_);
    return moved;
  }

  const Cache& cache_;
  Span spans_[3];
  int count_ = 0;
  int64_t head_ = 0, slot_ = 0;
  Slot place_{};
  const T* row_ = nullptr;
};

}  // namespace warpformer::cpu::WF_ISA

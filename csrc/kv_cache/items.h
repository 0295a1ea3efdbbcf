// How the work of cached_attention is cut: an item is a sequence, some heads of the cache, and some
// of the query rows that share each. A row is a query with one of the H / G heads that read a head
// of the cache, a line is a row with one of the item's heads. Included by cpu files only.
#pragma once

#include "kv_cache/slots.h"

namespace warpformer::cpu::WF_ISA {

constexpr int64_t kMaxLines = 64;  // of an item

/// A sequence of `length` slots, some heads of its cache, some of the query rows that share each.
struct Item {
  int64_t batch, length;
  Part queries;
  int64_t head, heads, row, rows;
  int64_t lines() const { return heads * rows; }
};

/// The slot of the token that query t is of.
inline int64_t own_slot(const Item& item, int64_t t) {
  return t + item.length - item.queries.count;
}

/// The slots that query t sees.
inline Range visible(const CachedAttentionParams& p, const Item& item, int64_t t) {
  const int64_t own = own_slot(item, t);
  const int64_t begin = larger(own - p.left, 0);
  const int64_t end = own >= item.length - 1 - p.right ? item.length : own + p.right + 1;
  return {begin, larger(begin, end)};
}

/// How the work of a call is cut into items; it changes no bit.
class Items {
 public:
  Items(const CachedAttentionParams& p, int64_t chunks, int threads)
      : p_(p), group_(p.heads / p.cache.kv_heads), most_heads_(p.cache.kv_heads) {
    // Few units are cut smaller, so that every thread gets some.
    for (;; most_heads_ = (most_heads_ + 1) / 2) {
      count_ = lines_ = 0;
      for (int64_t b = 0; b < p.cache.batch; ++b) {
        const Cut cut = cut_of(b);
        count_ += cut.count();
        lines_ = larger(lines_, cut.heads * cut.rows);
      }
      if (most_heads_ == 1 || count_ * chunks >= 4 * threads) break;
    }
  }

  int64_t count() const { return count_; }
  /// At most, of an item.
  int64_t lines() const { return lines_; }
  int64_t group() const { return group_; }

  /// Makes items known by their number, in memory of B + 1 numbers.
  void number(int64_t* memory) {
    first_ = memory;
    first_[0] = 0;
    for (int64_t b = 0; b < p_.cache.batch; ++b) first_[b + 1] = first_[b] + cut_of(b).count();
  }

  Item operator[](int64_t number) const {
    int64_t b = 0;  // the last sequence whose first item comes no later
    for (int64_t end = p_.cache.batch; end - b > 1;) {
      const int64_t middle = (b + end) / 2;
      (first_[middle] <= number ? b : end) = middle;
    }
    const Cut cut = cut_of(b);
    const int64_t i = number - first_[b], row = i % cut.row_blocks * cut.rows,
                  head = i / cut.row_blocks * cut.heads;
    const Part queries = part_of(p_.tokens, b);
    return {b,
            p_.cache.lengths[b],
            queries,
            head,
            smaller(cut.heads, p_.cache.kv_heads - head),
            row,
            smaller(cut.rows, group_ * queries.count - row)};
  }

 private:
  /// How a sequence is cut.
  struct Cut {
    int64_t rows, row_blocks, heads, head_blocks;
    int64_t count() const { return row_blocks * head_blocks; }
  };

  Cut cut_of(int64_t b) const {
    const int64_t rows_of_head = group_ * part_of(p_.tokens, b).count;
    const int64_t rows = larger(1, smaller(rows_of_head, kMaxLines));
    const int64_t heads = smaller(most_heads_, kMaxLines / rows);
    return {rows, (rows_of_head + rows - 1) / rows, heads, (p_.cache.kv_heads + heads - 1) / heads};
  }

  const CachedAttentionParams& p_;
  int64_t group_, most_heads_, count_, lines_;
  int64_t* first_ = nullptr;  // item of each sequence
};

}  // namespace warpformer::cpu::WF_ISA

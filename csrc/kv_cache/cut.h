// How the work of cached_attention is cut on a GPU. A row is a query with one of the heads that
// share a head of the cache, 16 rows are a tile. A block takes a head of the cache and up to
// `row_tiles` tiles, and of them either one split of the slots, or all, one split after the other.
//
//                          splits of 256 slots
//              | split 0 | split 1 | split 2 | ...
//   rows of a  |---------|---------|---------|
//   block      |         |         |         |       a column each a block: results of splits in
//              |---------|---------|---------|       `work`, which a second kernel merges
//
// Both ways merge the same parts in the same order: what is chosen changes no bit.
#pragma once

#include <cstdint>

namespace warpformer {

struct Cut {
  static constexpr int64_t kSplit = 256, kRows = 16, kColumns = 128, kMaxWarps = 8;
  static constexpr int64_t kMaxWidth = 5 * kColumns;

  int64_t splits;      // of as many slots as a sequence may have
  int64_t row_blocks;  // of a sequence, where all have as many tokens; of the call, where packed
  int64_t blocks;      // for all sequences and heads
  int64_t row_tiles;   // of a block
  int64_t slices;      // warps of a tile: each has 128 columns of queries and of values
  int64_t row_floats;  // of a row of `work`
  bool walks;          // a block takes all splits
  int64_t work;        // bytes

  Cut() = default;
  /// tokens: of a sequence; where they are packed, of all.
  Cut(int64_t sequences, int64_t tokens, bool packed, int64_t heads, int64_t kv_heads,
      int64_t width, int64_t value_width, int64_t slots) {
    const int64_t group = heads / kv_heads, widest = width > value_width ? width : value_width;
    // Of the average sequence: the tiles of a block share what they read, and change no bit.
    const int64_t rows = packed ? up(tokens * group, sequences) : tokens * group;
    splits = up(slots, kSplit);
    slices = at_least_one(up(widest, kColumns));
    row_tiles = at_least_one(kMaxWarps / slices);
    if (row_tiles > up(rows, kRows)) row_tiles = at_least_one(up(rows, kRows));
    const int64_t block_rows = row_tiles * kRows;
    row_blocks = packed ? tokens * group / block_rows + sequences : up(rows, block_rows);
    blocks = (packed ? row_blocks : sequences * row_blocks) * kv_heads;
    row_floats = at_least_one(up(value_width, 8)) * 8;
    const int64_t results = (packed ? tokens : sequences * tokens) * heads * splits;
    const int64_t bytes = results * (row_floats + 2) * int64_t{sizeof(float)};
    // What results of splits cost grows with the rows of a block, and blocks enough keep the GPU
    // busy without them.
    walks = splits <= 1 || blocks * row_tiles * row_tiles >= 4096 || bytes > kMaxWork;
    work = walks ? 0 : bytes;
  }

 private:
  static constexpr int64_t kMaxWork = 256 << 20;
  static int64_t up(int64_t n, int64_t to) { return to ? (n + to - 1) / to : 0; }
  static int64_t at_least_one(int64_t n) { return n > 1 ? n : 1; }
};

}  // namespace warpformer

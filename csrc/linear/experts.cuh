// The rows of each expert of grouped_linear, which are known on the device alone: a grid has as
// many tiles of rows as there can be, and each block finds its own.
//
//   ends    | 3  | 3  | 40           | 41 | rows   tiles of 16 rows: 0 | - | 1 2 3 | 4 | 5 ..
//   expert    0    1    2              3    none
#pragma once

#include "core/cuda/rows.cuh"
#include "linear/op.h"

namespace warpformer::cuda {

/// What a block multiplies by one weight: rows [first, end) of x, of which it takes a tile. As many
/// as 2^31 no grid has tiles for.
struct Expert {
  const uint8_t* weight;  // null: rows of no expert, which are 0
  int index;              // of the bias
  int first, end;
};

/// Tiles of `height` rows that any offsets come to at most, rows of no expert among them.
inline int64_t most_tiles(const Experts& experts, int64_t rows, int64_t height) {
  if (!experts.ends) return (rows + height - 1) / height;
  // Each run of rows has one tile, and one more for every further `height` rows.
  const int64_t runs = rows < experts.count + 1 ? rows : experts.count + 1;
  return runs + (rows - runs) / height;
}

/// Rows by which the height of tiles is chosen: of experts twice the average, which few have more
/// than.
inline int64_t usual_rows(const Experts& experts, int64_t rows) {
  const int64_t mean = (rows + experts.count - 1) / (experts.count ? experts.count : 1);
  return experts.count && 2 * mean < rows ? 2 * mean : rows;
}

/// A value of `ends`, held within 0 to `rows`.
DEVICE int end_at(const Experts& experts, int e, int rows) {
  const int64_t end = experts.wide ? load(static_cast<const int64_t*>(experts.ends) + e)
                                   : load(static_cast<const int32_t*>(experts.ends) + e);
  return static_cast<int>(end < 0 ? 0 : end < rows ? end : rows);
}

/// Tile `tile` of `height` rows; false past the last one. All lanes of a warp call it together, and
/// get the same. Offsets that do not ascend to `rows` are made to: what lies below an earlier one
/// is that one.
DEVICE bool find_expert(const Experts& experts, const Weight& w, int64_t rows, int height,
                        int64_t tile, Expert& found) {
  const int lane = lane_index(), all = static_cast<int>(rows);
  int left = static_cast<int>(tile), last = 0;  // tiles from expert e0 on; where its rows begin
  found = {w.data, 0, left * height, all};
  if (!experts.ends) return found.first < all;
  for (int e0 = 0; e0 <= experts.count; e0 += kWarp) {
    int end = e0 + lane < experts.count ? end_at(experts, e0 + lane, all) : all;
    end = end > last ? end : last;
#pragma unroll
    for (int i = 1; i < kWarp; i *= 2) {
      const int before = shuffle_up(end, i);
      end = before > end ? before : end;
    }
    int begin = shuffle_up(end, 1);
    if (lane == 0) begin = last;
    const int own = (end - begin + height - 1) / height;
    int tiles = own;
#pragma unroll
    for (int i = 1; i < kWarp; i *= 2) {
      const int before = shuffle_up(tiles, i);
      if (lane >= i) tiles += before;
    }
    if (const uint32_t beyond = ballot(left < tiles)) {
      const int source = first_lane(beyond), e = e0 + source;
      found.first = shuffle(begin + (left - tiles + own) * height, source);
      found.end = shuffle(end, source);
      found.index = e;
      found.weight = e < experts.count ? w.data + e * w.panels * w.size : nullptr;
      return true;
    }
    left -= shuffle(tiles, kWarp - 1);
    last = shuffle(end, kWarp - 1);
  }
  return false;
}

/// `height` rows by `width` columns from `column` on of a tile whose rows are those of no expert,
/// by the first `threads` of the block.
DEVICE void write_zeros(const Rows& out, const Expert& expert, int height, int64_t column,
                        int width, int threads = block_threads()) {
  by_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    for (int i = thread_index(); i < height * width; i += threads) {
      const int64_t row = expert.first + i / width, n = column + i % width;
      if (row < expert.end && n < out.n)
        store(static_cast<T*>(out.data) + row_offset(out, row) + n * out.step, from_float<T>(0.0f));
    }
  });
}

}  // namespace warpformer::cuda

// What a warp of cached_attention does, from the copies of the cache to the sums of its rows; the
// picture is in cuda_attention.cu.
#pragma once

#include "core/cuda/position_bias.cuh"
#include "kv_cache/cuda_products.cuh"
#include "kv_cache/cuda_unit.cuh"

namespace warpformer::cuda {

constexpr int kRowWeights = kRows * kWeightPitch;  // floats, of a warp
constexpr int kSums = kOutputs * 4 * kWarp;        // floats, of a warp
constexpr int kExchange = kScores * 4 * kWarp;     // floats, of a warp
constexpr float kLog2e = 1.44269504088896340736f;

/// How operands lie in shared memory: for each stage a tile of keys and one of values, then what
/// slices exchange, weights, sums of splits and queries, each where it is needed.
struct Layout {
  int stages, stage_bytes;
  int key_pitch, value_pitch;  // elements; value_pitch 0: values are the first columns of keys
  int key_lanes, value_lanes;  // of a warp, that copy a row
  int exchange, weights, sums, queries;  // where these begin
  int query_pitch;                       // floats
  int bytes;
  bool vectors;  // all copies are of 16 bytes
};

/// A warp of cached_attention: a tile of rows, or of wide heads a slice of its columns.
template <class T, class E>
class Attention {
 public:
  DEVICE Attention(const CachedAttentionParams& p, const Layout& layout, const Unit& unit)
      : p_(p),
        c_(p.cache),
        layout_(layout),
        unit_(unit),
        slice_(warp_index() % static_cast<int>(p.cut.slices)),
        tile_(warp_index() / static_cast<int>(p.cut.slices)),
        row_(unit.first + tile_ * kRows),
        broken_(!unit.sequence.known),
        products_(make_products(layout, tile_, slice_)) {
    const Range block = unit.seen_by_any(p, unit.first, Unit::block_rows(p.cut));
    begin_ = static_cast<int>(block.begin), end_ = static_cast<int>(block.end);
    const Range any = unit.seen_by_any(p, row_, kRows), all = unit.seen_by_all(p, row_, kRows);
    any_begin_ = static_cast<int>(any.begin), any_end_ = static_cast<int>(any.end);
    all_begin_ = static_cast<int>(all.begin), all_end_ = static_cast<int>(all.end);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = row_of(r), t = row / unit.group;
      const Range seen = row < unit.rows ? unit.sequence.visible(p, t) : Range{0, 0};
      row_begin_[r] = static_cast<int>(seen.begin), row_end_[r] = static_cast<int>(seen.end);
      own_[r] = static_cast<int>(unit.sequence.own_slot(t));
      head_[r] = static_cast<int>(unit.head) * unit.group + row % unit.group;
    }
    columns_ = slice_of(c_.width);
    value_columns_ = slice_of(c_.value_width);
  }

  /// Attends to slots [begin, end), not all of which the warp sees: those of one split, or of any
  /// after clear_sums().
  DEVICE void run(int begin, int end) {
    const int first = begin / kTile, last = (end + kTile - 1) / kTile;
    next_slot_ = slot_in(first);
    if (layout_.stages == 2) issue(first, last, 0);
    read_queries();
    clear();
    int stage = 0;
    for (int tile = first; tile < last; ++tile) {
      if (layout_.stages == 1) {
        sync_block();
        issue(tile, last, 0);
      }
      copy_async_wait<0>();
      sync_block();
      const TileScales k = scales_of(next_k_scale_), v = scales_of(next_v_scale_);
      if (layout_.stages == 2) issue(tile + 1, last, 1 - stage);
      attend(tile * kTile, stage, k, v);
      if (layout_.stages == 2) stage = 1 - stage;
      if ((tile + 1) % (kSplit / kTile) == 0 || tile + 1 == last) end_split();
    }
  }

  /// Sums of several splits lie in shared memory, where each lane has its own.
  DEVICE void clear_sums() const {
#pragma unroll
    for (int n = 0; n < kOutputs; ++n) sums().store16((n * kWarp + lane_index()) * 4, {});
  }

  /// Of row g + 8 r; the same in all lanes that share the row.
  DEVICE State state(int r) const { return sums_[r]; }
  DEVICE bool is_broken() const { return any(broken_); }

  /// f(r, query, head) for those of the lane's two rows that are there.
  template <class F>
  DEVICE void each_row(F f) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (row_of(r) < unit_.rows) f(r, row_of(r) / unit_.group, head_[r]);
    }
  }
  /// f(column, value) for the lane's columns of row g + 8 r.
  template <class F>
  DEVICE void each_column(int r, F f) const {
#pragma unroll
    for (int n = 0; n < kOutputs; ++n) {
      float values[2] = {o_[n][2 * r], o_[n][2 * r + 1]};
      if (p_.cut.walks) {
        const Vector<float> sum = sums().load16((n * kWarp + lane_index()) * 4);
        values[0] = sum[2 * r], values[1] = sum[2 * r + 1];
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = Products<T, E>::column_of(n, i);
        if (column < value_columns_) f(slice_ * kColumns + column, values[i]);
      }
    }
  }
  /// Whether this warp is the one of its rows that writes what all of their columns share.
  DEVICE bool writes_states() const { return slice_ == 0 && lane_index() % 4 == 0; }

 private:
  static constexpr bool kQuantized = sizeof(E) == 1, kIsFloat = sizeof(T) == 4;

  DEVICE static Products<T, E> make_products(const Layout& layout, int tile, int slice) {
    if constexpr (kIsFloat) {
      return {shared_memory<float>(layout.queries) +
                  (tile * kRows * layout.query_pitch + slice * kColumns),
              layout.query_pitch,
              shared_memory<float>(layout.weights) + warp_index() * kRowWeights};
    } else {
      return {};
    }
  }
  /// The row g + 8 r of this lane, of the sequence's.
  DEVICE int row_of(int r) const { return row_ + lane_index() / 4 + 8 * r; }
  DEVICE int slice_of(int64_t width) const {
    return static_cast<int>(within(width - slice_ * kColumns, 0, kColumns));
  }

  // ---- Copies

  DEVICE Shared<E> keys(int stage) const { return shared_memory<E>(stage * layout_.stage_bytes); }
  DEVICE Shared<E> values(int stage) const {
    return layout_.value_pitch ? keys(stage) + kTile * layout_.key_pitch : keys(stage);
  }

  /// Where the slot of this lane's number in a tile lies, if a row of the block sees it.
  DEVICE Slot slot_in(int tile) {
    const int number = tile * kTile + lane_index();
    if (number < begin_ || number >= end_) return {-1, 0};
    const Slot slot = slot_of(c_, unit_.sequence.index, number);
    broken_ |= slot.block < 0;
    return slot;
  }
  /// Begins to copy a tile, if it is one before `last`, and its scales. The block of the next one
  /// is looked up meanwhile.
  DEVICE void issue(int tile, int last, int stage) {
    if (tile < last) {
      const Slot slot = next_slot_;
      if (tile + 1 < last) next_slot_ = slot_in(tile + 1);
      if constexpr (kQuantized) {
        next_k_scale_ = read_scale(c_.k_scales, slot);
        next_v_scale_ = read_scale(c_.v_scales, slot);
      }
      copy(c_.k, c_.width, slot, keys(stage), layout_.key_pitch, layout_.key_lanes);
      if (layout_.value_pitch)
        copy(c_.v, c_.value_width, slot, values(stage), layout_.value_pitch, layout_.value_lanes);
    }
    copy_async_commit();
  }

  /// A row is copied by `lanes` lanes. Zeros where there is no slot, and in columns up to a
  /// multiple of kHalf.
  DEVICE void copy(const Heads& from, int64_t width, const Slot& slot, Shared<E> to, int pitch,
                   int lanes) const {
    const E* head = reinterpret_cast<const E*>(from.data) + unit_.head * from.stride[2];
    const int64_t own = slot.block < 0 ? -1 : offset_of(from, slot);
    const int all = (static_cast<int>(width) + kHalf - 1) / kHalf * kHalf;
    const int rows = kWarp / lanes, warps = block_threads() / kWarp;
    const int in_group = lane_index() / lanes, column = lane_index() % lanes;
    // f(target, source, whether it is there) for every `step` columns
    const auto each = [&](int step, auto f) {
      for (int first = 0; first < all; first += lanes * step) {
        const int c = first + column * step;
        Shared<E> target = to + ((warp_index() * rows + in_group) * pitch + c);
#pragma unroll 4
        for (int row = warp_index() * rows; row < kTile; row += warps * rows) {
          const int64_t offset = shuffle(own, row + in_group);
          const bool is_there = offset >= 0 && c < width;
          if (c < all) f(target, head + (is_there ? offset + c : 0), is_there);
          target = target + warps * rows * pitch;
        }
      }
    };
    if (layout_.vectors) {
      each(Vector<E>::size, [](Shared<E> target, const E* source, bool is_there) {
        copy_async16(target, source, is_there);
      });
    } else {
      each(1, [](Shared<E> target, const E* source, bool is_there) {
        target.store(0, is_there ? load(source) : E{});
      });
    }
  }

  DEVICE float read_scale(const Heads& scales, const Slot& slot) const {
    float scale = 0.0f;
    if (slot.block >= 0)
      by_float(scales.dtype, [&](auto type) {
        scale = to_float(load(at<decltype(type)>(scales, slot, unit_.head)));
      });
    return scale;
  }
  /// From one that each lane has of the slot of its number.
  DEVICE static TileScales scales_of(float own) {
    TileScales scales{own};
#pragma unroll
    for (int n = 0; n < kScores; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scales.values[n][i] = kQuantized ? shuffle(own, 8 * n + lane_index() % 4 * 2 + i) : 1.0f;
    return scales;
  }

  /// A row of the block; null where there is none.
  DEVICE const T* query_row(int row) const {
    const int of_sequence = unit_.first + row, group = unit_.group;
    if (of_sequence >= unit_.rows) return nullptr;
    const Part& queries = unit_.sequence.queries;
    return reinterpret_cast<const T*>(p_.q.data) + queries.batch * p_.q.stride[0] +
           (queries.first + of_sequence / group) * p_.q.stride[1] +
           (unit_.head * group + of_sequence % group) * p_.q.stride[2];
  }
  DEVICE void read_queries() {
    const auto column = [&](const T* row, int c) {
      return row && c < c_.width ? to_float(load(row + c * p_.q.stride[3])) : 0.0f;
    };
    if constexpr (kIsFloat) {
      const Shared<float> to = shared_memory<float>(layout_.queries);
      const int warps = block_threads() / kWarp, pitch = layout_.query_pitch;
      for (int row = warp_index(); row < Unit::block_rows(p_.cut); row += warps)
        for (int c = lane_index(); c < pitch; c += kWarp)
          to.store(row * pitch + c, column(query_row(row), c));
    } else {
      const T* const rows[2] = {query_row(tile_ * kRows + lane_index() / 4),
                                query_row(tile_ * kRows + lane_index() / 4 + 8)};
      products_.read_queries(slice_ * kColumns, [&](int r, int c) { return column(rows[r], c); });
    }
  }

  // ---- A split

  DEVICE Shared<float> sums() const {
    return shared_memory<float>(layout_.sums) + warp_index() * kSums;
  }
  DEVICE void end_split() {
    float kept[2], added[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      total_[r] += shuffle_xor(total_[r], 1);
      total_[r] += shuffle_xor(total_[r], 2);
      merge(sums_[r], {high_[r], total_[r]}, kept[r], added[r]);
    }
    if (!p_.cut.walks) return;  // there was nothing before: the sums are those of the split
#pragma unroll
    for (int n = 0; n < kOutputs; ++n) {
      const int at = (n * kWarp + lane_index()) * 4;
      Vector<float> sum = sums().load16(at);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = merged(sum[i], o_[n][i], kept[i / 2], added[i / 2]);
      sums().store16(at, sum);
    }
    clear();
  }

  // ---- A tile

  DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < 2; ++r) high_[r] = -kInfinity, total_[r] = 0.0f;
#pragma unroll
    for (int n = 0; n < kOutputs; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[n][i] = 0.0f;
  }

  /// The slots from `slot` on.
  DEVICE void attend(int slot, int stage, const TileScales& k_scales, const TileScales& v_scales) {
    const bool is_seen = any_begin_ < slot + kTile && slot < any_end_;
    if (!is_seen && p_.cut.slices == 1) return;  // slices meet, and add zeros
    Scores s = {};
    const int column = slice_ * kColumns;
    products_.score({keys(stage) + column, layout_.key_pitch, columns_}, s);
    if (p_.cut.slices > 1) add_slices(s);
    const bool seen_by_all = all_begin_ <= slot && slot + kTile <= all_end_;
    finish_scores(s, slot, k_scales, seen_by_all);
    weigh(s);
    const int pitch = layout_.value_pitch ? layout_.value_pitch : layout_.key_pitch;
    const TileRows<E> v{values(stage) + column, pitch, value_columns_};
    // Zeros that are multiplied by NaN or infinity would show.
    bool leaks = false;
    if (!seen_by_all) {
      const int own = slot + lane_index();
      const bool hidden = own < all_begin_ || own >= all_end_;
      leaks = any(hidden && !is_finite(v, v_scales.own));
    }
    if (!leaks) {
      products_.add_values(s, v, v_scales, o_);
    } else {
      Sight sight;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sight.begin[r] = row_begin_[r] - slot;
        sight.end[r] = row_end_[r] - slot;
      }
      products_.add_seen_values(s, v, v_scales, sight, o_);
    }
  }

  /// Sums the products of all slices, in their order.
  DEVICE void add_slices(Scores& s) const {
    const int slices = static_cast<int>(p_.cut.slices);
    const Shared<float> area = shared_memory<float>(layout_.exchange) + tile_ * slices * kExchange;
#pragma unroll
    for (int n = 0; n < kScores; ++n)
      area.store16(slice_ * kExchange + (n * kWarp + lane_index()) * 4,
                   {s[n][0], s[n][1], s[n][2], s[n][3]});
    sync_block();
#pragma unroll
    for (int n = 0; n < kScores; ++n) {
      Vector<float> sum = area.load16((n * kWarp + lane_index()) * 4);
      for (int other = 1; other < slices; ++other) {
        const Vector<float> more = area.load16(other * kExchange + (n * kWarp + lane_index()) * 4);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += more[i];
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = sum[i];
    }
  }

  /// Products become scores: -inf where not seen.
  DEVICE void finish_scores(Scores& s, int slot, const TileScales& scales, bool seen_by_all) const {
    const bool is_plain = p_.softcap == 0.0f && !p_.slopes && !p_.position_bias.table.data;
#pragma unroll
    for (int n = 0; n < kScores; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] *= p_.scale;
        if constexpr (kQuantized) s[n][i] *= scales.values[n][i % 2];
      }
    if (is_plain && seen_by_all) return;
#pragma unroll
    for (int n = 0; n < kScores; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = i / 2, key = slot + 8 * n + lane_index() % 4 * 2 + i % 2;
        if (!is_plain) s[n][i] = biased(s[n][i], r, key);
        if (key < row_begin_[r] || key >= row_end_[r]) s[n][i] = -kInfinity;
      }
  }
  DEVICE float biased(float s, int r, int key) const {
    if (p_.softcap != 0.0f) s = p_.softcap * tanh(s / p_.softcap);
    const int distance = key - own_[r];
    if (p_.slopes) s -= load(p_.slopes + head_[r]) * abs(static_cast<float>(distance));
    if (p_.position_bias.table.data)
      s += position_bias(p_.position_bias, p_.position_octaves, distance, head_[r]);
    return s;
  }

  DEVICE static float exponential(float x) {
    if constexpr (kIsFloat) {
      return exp(x);
    } else {
      return exp2_approx(x * kLog2e);
    }
  }

  /// Scores become weights; what was summed up before is scaled to the new maximum.
  DEVICE void weigh(Scores& s) {
    float high[2], shift[2];
    bool has_changed = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      high[r] = high_[r];
#pragma unroll
      for (int n = 0; n < kScores; ++n) high[r] = max(high[r], max(s[n][2 * r], s[n][2 * r + 1]));
      high[r] = max(high[r], shuffle_xor(high[r], 1));
      high[r] = max(high[r], shuffle_xor(high[r], 2));
      shift[r] = finite(high[r]);
      has_changed |= high[r] != high_[r];
    }
    if (any(has_changed)) {  // else by 1, which changes nothing
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float kept = high[r] == high_[r] ? 1.0f : exponential(high_[r] - shift[r]);
        high_[r] = high[r];
        total_[r] *= kept;
#pragma unroll
        for (int n = 0; n < kOutputs; ++n) {
          o_[n][2 * r] *= kept;
          o_[n][2 * r + 1] *= kept;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sums[kScores];
#pragma unroll
      for (int n = 0; n < kScores; ++n) {
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) s[n][i] = exponential(s[n][i] - shift[r]);
        sums[n] = s[n][2 * r] + s[n][2 * r + 1];
      }
      total_[r] += tree_sum(sums);
    }
  }

  /// The values of the slot of this lane's number, in the columns of this warp.
  DEVICE static bool is_finite(const TileRows<E>& v, float scale) {
    bool finite = scale - scale == 0.0f;
    for (int c = 0; !kQuantized && c < v.width; c += Vector<E>::size) {
      const Vector<E> some = v.data.load16(lane_index() * v.pitch + c);
#pragma unroll
      for (int j = 0; j < Vector<E>::size; ++j) {
        const float x = static_cast<float>(value_of(some[j]));
        finite = finite && x - x == 0.0f;
      }
    }
    return finite;
  }
  DEVICE static float value_of(int8_t x) { return x; }
  template <class V>
  DEVICE static float value_of(V x) {
    return to_float(x);
  }

  const CachedAttentionParams& p_;
  const KvCache& c_;
  const Layout& layout_;
  const Unit& unit_;
  int slice_, tile_;
  int row_;                  // of the sequence, the warp's first one
  bool broken_;              // something that is not there was asked for
  int begin_, end_;          // slots that any row of the block sees
  int any_begin_, any_end_;  // that any of the warp's sees
  int all_begin_, all_end_;  // that all of them see
  int row_begin_[2], row_end_[2], own_[2], head_[2];
  int columns_, value_columns_;                      // of the warp's slice
  Slot next_slot_{-1, 0};                            // in the tile that will be issued next
  float next_k_scale_ = 0.0f, next_v_scale_ = 0.0f;  // of the tile that was issued last
  Products<T, E> products_;
  float high_[2], total_[2];
  State sums_[2] = {{-kInfinity, 0.0f}, {-kInfinity, 0.0f}};  // of the splits that have ended
  Outputs o_;
};

}  // namespace warpformer::cuda

// cached_attention: split-KV decoding. What a block works on is told in cut.h; a warp owns a tile
// of 16 rows of it (queries with the heads that share a head of the cache), and where heads are
// wider than 128 a slice of their columns.
//
//   slots        tile 0   tile 1   tile 2   ...            32 slots each, all threads copy them
//                  |        |        |
//   copy_async   stage 0  stage 1  stage 0  ...            the next while one is worked on
//                  |
//   sync_block     |        all copies are there, and nobody reads the stage that comes next
//                  v
//   each warp    s = q k  --(slices add theirs)-->  w = exp(s - high)  -->  o = o e^.. + w v
//
//   end of a split: (high, total, o) goes to `work`, or is merged with what came before;
//   merge_kernel: a team takes a row, and merges its splits in order
//
// A row's results depend on nothing but itself and its sequence: tiles begin at multiples of 32,
// what it does not see adds zeros, and splits are merged one after the other whoever does it.
#include "core/cuda/exponentials.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/position_bias.cuh"
#include "kv_cache/products.cuh"
#include "kv_cache/slots.cuh"

namespace warpformer::cuda {
namespace {

constexpr int kSplit = Cut::kSplit, kRows = Cut::kRows, kColumns = Cut::kColumns;
constexpr int kThreads = Cut::kMaxWarps * kWarp, kMergeThreads = 128;
constexpr int kRowWeights = kRows * kWeightPitch;  // floats, of a warp
constexpr int kSums = kOutputs * 4 * kWarp;        // floats, of a warp
constexpr int kExchange = kScores * 4 * kWarp;     // floats, of a warp
constexpr int kTwoStages = 160 << 10;              // bytes at most; sm_80 has 163 KiB
constexpr float kLog2e = 1.44269504088896340736f;

/// How operands lie in shared memory: for each stage a tile of keys and one of values, then what
/// warps exchange, their weights and their queries.
struct Layout {
  int stages, stage_bytes;
  int key_pitch, value_pitch;  // elements; value_pitch 0: values are the first columns of keys
  int key_lanes, value_lanes;  // of a warp, that copy a row
  int exchange, weights, sums, queries, query_pitch;  // where these begin; floats
  int bytes;
  bool vectors;  // all copies are of 16 bytes
};

// ---- What rows see

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
    if (!p.tokens.cu_seqlens) return item / p.cut.row_blocks;
    return last_sequence(p.cache.batch, [&](int64_t b) { return first_item(p, b) <= item; });
  }
  /// Sequence b has at most first_item(b + 1) - first_item(b) blocks for each head.
  DEVICE static int64_t first_item(const CachedAttentionParams& p, int64_t b) {
    if (!p.tokens.cu_seqlens) return b * p.cut.row_blocks;
    return part_of(p.tokens, b).first * (p.heads / p.cache.kv_heads) / block_rows(p.cut) + b;
  }

  DEVICE Unit(const CachedAttentionParams& p, int64_t item)
      : sequence(p, sequence_of(p, item)),
        head(block_index() % p.cache.kv_heads),
        group(static_cast<int>(p.heads / p.cache.kv_heads)),
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

// ---- The kernel

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
        products_(make_products(p, layout, tile_, slice_)) {
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
    for (int i = 0; i < layout_.stages - 1; ++i) issue(first + i, last, i);
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

  DEVICE static Products<T, E> make_products(const CachedAttentionParams&, const Layout& layout,
                                             int tile, int slice) {
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

  /// Begins to copy a tile, if it is one before `last`, and its scales. Each lane knows where the
  /// slot of its number lies.
  DEVICE void issue(int tile, int last, int stage) {
    if (tile < last) {
      const int number = tile * kTile + lane_index();
      Slot slot{-1, 0};
      if (begin_ <= number && number < end_) {
        slot = slot_of(c_, unit_.sequence.index, number);
        broken_ |= slot.block < 0;
      }
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
    constexpr int kVector = Vector<E>::size;
    const E* head = reinterpret_cast<const E*>(from.data) + unit_.head * from.stride[2];
    const int64_t own = slot.block < 0 ? -1 : offset_of(from, slot);
    const int all = (static_cast<int>(width) + kHalf - 1) / kHalf * kHalf;
    const int rows = kWarp / lanes, warps = block_threads() / kWarp;
    const int in_group = lane_index() / lanes, column = lane_index() % lanes;
#pragma unroll 4
    for (int first = warp_index() * rows; first < kTile; first += warps * rows) {
      const int row = first + in_group;
      const int64_t offset = shuffle(own, row);
      const E* source = head + (offset < 0 ? 0 : offset);
      const Shared<E> target = to + row * pitch;
      if (layout_.vectors) {
        for (int c = column * kVector; c < all; c += lanes * kVector)
          copy_async16(target + c, source + c, offset >= 0 && c < width);
      } else {
        for (int c = column; c < all; c += lanes)
          target.store(c, offset >= 0 && c < width ? load(source + c) : E{});
      }
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
    // The same for all warps that share the rows.
    if (slot + kTile <= any_begin_ || slot >= any_end_) return;
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
    barrier_sync(1 + tile_, slices * kWarp);
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
  float next_k_scale_ = 0.0f, next_v_scale_ = 0.0f;  // of the tile that was issued last
  Products<T, E> products_;
  float high_[2], total_[2];
  State sums_[2] = {{-kInfinity, 0.0f}, {-kInfinity, 0.0f}};  // of the splits that have ended
  Outputs o_;
};

template <class T, class E>
KERNEL(kThreads)
attention_kernel(CachedAttentionParams p, Layout layout) {
  const Unit unit(p, block_index() / p.cache.kv_heads);
  if (unit.first >= unit.rows) return;
  const Part& queries = unit.sequence.queries;
  Range seen = unit.seen_by_any(p, unit.first, Unit::block_rows(p.cut));
  const int64_t split = p.cut.walks ? 0 : block_index_y();
  if (!p.cut.walks) {
    seen = {larger(seen.begin, split * kSplit), smaller(seen.end, (split + 1) * kSplit)};
    if (seen.begin >= seen.end) return;
  }
  Attention<T, E> attention(p, layout, unit);
  if (p.cut.walks) attention.clear_sums();
  attention.run(static_cast<int>(seen.begin), static_cast<int>(seen.end));
  const bool broken = attention.is_broken();
  attention.each_row([&](int r, int64_t t, int64_t head) {
    const State state = broken ? State{0.0f, __builtin_nanf("")} : attention.state(r);
    if (!p.cut.walks) {
      const Work work(p, token_of(p, queries, t), head, split);
      attention.each_column(r, [&](int column, float value) { store(work.o + column, value); });
      if (attention.writes_states()) store(work.state, state);
      return;
    }
    float lse;
    const float scale = finish(p, state, head, lse);
    T* out = out_row<T>(p, queries, t, head);
    attention.each_column(r, [&](int column, float value) {
      store(out + column * p.out.stride[3], from_float<T>(value * scale));
    });
    if (p.lse && attention.writes_states()) store(lse_of(p, queries, t, head), lse);
  });
}

/// A team takes a row, a thread 8 of its columns.
template <class T>
KERNEL(kMergeThreads)
merge_kernel(CachedAttentionParams p, int size) {
  const Team team(size);
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.cache.batch);
  const int column = kChunk * team.index;
  if (team.row >= tokens * p.heads || column >= p.cut.row_floats) return;
  const int64_t token = team.row / p.heads, head = team.row % p.heads;
  const Sequence sequence(p, sequence_of(p.tokens, p.cache.batch, token));
  const int64_t t = token - token_of(p, sequence.queries, 0);
  const Range seen = sequence.visible(p, t);
  State sum{-kInfinity, sequence.known ? 0.0f : __builtin_nanf("")};
  float o[kChunk] = {};
  if (seen.begin < seen.end) {
#pragma unroll 4
    for (int64_t split = seen.begin / kSplit; split <= (seen.end - 1) / kSplit; ++split) {
      const Work work(p, token, head, split);
      float part[kChunk], kept, added;
      load_chunk(work.o + column, part, Cache::normal, Where::here());
      merge(sum, load(work.state), kept, added);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) o[j] = merged(o[j], part[j], kept, added);
    }
  }
  float lse;
  const float scale = finish(p, sum, head, lse);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) o[j] *= scale;
  T* out = out_row<T>(p, sequence.queries, t, head) + column * p.out.stride[3];
  if (column + kChunk <= p.cache.value_width && is_vector_row(out, p.out.stride[3])) {
    store_chunk(out, o, Cache::normal, Where::here());
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (column + j < p.cache.value_width) store(out + j * p.out.stride[3], from_float<T>(o[j]));
  }
  if (p.lse && team.index == 0) store(lse_of(p, sequence.queries, t, head), lse);
}

// ---- Launches

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

/// Whether heads of the cache can be copied 16 bytes at a time.
bool are_vectors(const Heads& t, int64_t width) {
  bool vectors = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && width * t.size % 16 == 0;
  for (int i = 0; i < 3; ++i) vectors = vectors && t.stride[i] * t.size % 16 == 0;
  return vectors;
}
/// Whether values are the first columns of keys.
bool are_in_keys(const KvCache& cache) {
  bool same = cache.v.data == cache.k.data && cache.value_width <= cache.width;
  for (int i = 0; i < 3; ++i) same = same && cache.v.stride[i] == cache.k.stride[i];
  return same;
}

Layout layout_of(const CachedAttentionParams& p) {
  const KvCache& c = p.cache;
  const int64_t vector = 16 / c.k.size;
  const auto pitch = [&](int64_t width) {
    return (up(width, kHalf) * kHalf / vector | 1) * vector;
  };
  const auto lanes = [&](int64_t width) {
    int n = 1;
    while (n < kWarp && n * vector < width) n *= 2;
    return n;
  };
  Layout l{};
  l.key_pitch = static_cast<int>(pitch(c.width));
  l.value_pitch = are_in_keys(c) ? 0 : static_cast<int>(pitch(c.value_width));
  l.key_lanes = lanes(c.width);
  l.value_lanes = lanes(c.value_width);
  l.vectors = are_vectors(c.k, c.width) && are_vectors(c.v, c.value_width);
  const bool is_float = p.q.dtype == DType::f32;
  const int warps = static_cast<int>(p.cut.row_tiles * p.cut.slices);
  const int rows = static_cast<int>(p.cut.row_tiles) * kRows, size = sizeof(float);
  l.query_pitch = static_cast<int>(up(c.width, 4) | 1) * 4;
  const int exchange = p.cut.slices > 1 ? warps * kExchange * size : 0;
  const int weights = is_float ? warps * kRowWeights * size : 0;
  const int queries = is_float ? rows * l.query_pitch * size : 0;
  l.stage_bytes = static_cast<int>(kTile * (l.key_pitch + l.value_pitch) * c.k.size);
  const int sums = p.cut.walks ? warps * kSums * size : 0;
  const int rest = exchange + weights + sums + queries;
  l.stages = 2 * l.stage_bytes + rest <= kTwoStages ? 2 : 1;
  l.exchange = l.stages * l.stage_bytes;
  l.weights = l.exchange + exchange;
  l.sums = l.weights + weights;
  l.queries = l.sums + sums;
  l.bytes = l.queries + queries;
  return l;
}

template <class T, class E>
void run(const CachedAttentionParams& p, Stream stream) {
  const Layout layout = layout_of(p);
  const int threads = static_cast<int>(p.cut.row_tiles * p.cut.slices) * kWarp;
  const Grid grid(p.cut.blocks, p.cut.walks ? 1 : p.cut.splits);
  LAUNCH((attention_kernel<T, E>), grid, threads, layout.bytes, stream, p, layout);
  if (p.cut.walks) return;
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.cache.batch);
  const int team = team_size<1>(p.cache.value_width);
  const int64_t per_block = kMergeThreads / team;
  LAUNCH(merge_kernel<T>, Grid(up(tokens * p.heads, per_block)), kMergeThreads, 0, stream, p, team);
}

template <class T>
void by_cache(const CachedAttentionParams& p, Stream stream) {
  if (p.cache.k.dtype == DType::i8) return run<T, int8_t>(p, stream);
  run<T, T>(p, stream);
}

}  // namespace

void cached_attention(const CachedAttentionParams& params, Stream stream) {
  CachedAttentionParams p = params;
  p.position_octaves = octaves_of(p.position_bias);
  if (p.q.dtype == DType::f32) return by_cache<float>(p, stream);
  if (p.q.dtype == DType::f16) return by_cache<f16>(p, stream);
  by_cache<bf16>(p, stream);
}

}  // namespace warpformer::cuda

// cached_attention: the slots of a sequence in chunks, each a piece of work of its own.
//
//   item   = one sequence, some heads of the cache, some of the query rows that share each
//   chunk  = 256 slots            unit = (item, chunk), handed out to the threads
//
//   unit:  for tiles of a few slots, for heads:  scores[line][slot] = q[line] k[slot]
//          for lines:                             weights = exp(scores - high), total
//          for tiles of a few slots, for heads:  o[line] += weights[line][slot] v[slot]
//   item:  out[line] = sum over chunks of e^(high - highest) o / sum of e^(high - highest) total
//
// A line is a row of q with one head of the cache. All heads of a tile lie together in memory: k
// and v are read once, from one end to the other. What comes next, v after k and the next unit
// after v, is fetched meanwhile, a part with every few lines. No line sees which others are worked
// on beside it: neither the bits of its results do.
#include <math.h>

#include "core/exponentials.h"
#include "core/scratch.h"
#include "kv_cache/digits.h"
#include "kv_cache/floats.h"
#include "kv_cache/items.h"
#include "kv_cache/pairs.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kChunk = 256;
constexpr int64_t kAhead = 32 << 10;      // bytes from what is worked on to what is fetched
constexpr int64_t kStride = kChunk + 16;  // of scores: lines do not share a set
constexpr int kLineTile = 4;
constexpr int64_t kManyRows = 8;  // that share a head: larger tiles, so that q and o are read less
constexpr int64_t kPartialFloats = 4 << 20;  // of the items that are worked on at a time
constexpr int64_t kGrain = 1 << 18;          // multiplications worth a thread
constexpr int64_t kMergeGrain = 1 << 15;     // partial sums worth one
constexpr int64_t kLineSlots = 16;  // a line takes as long as so many slots, beside its own

/// Of the lanes of a register.
alignas(64) constexpr float kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/// What a chunk has come to for a line: the sum is of e^(s - high).
struct State {
  float high, total;
};

/// The results of the chunks of some items.
struct Partials {
  float* o;
  State* states;
  int64_t chunks, lines, width;
  float* row(int64_t item, int64_t chunk, int64_t line) const {
    return o + ((item * chunks + chunk) * lines + line) * width;
  }
  State& state(int64_t item, int64_t chunk, int64_t line) const {
    return states[(item * chunks + chunk) * lines + line];
  }
};

/// P: the products with the cache, Floats or Digits.
template <class P>
class Unit {
 public:
  /// Floats of working memory.
  static int64_t scratch_size(const CachedAttentionParams& p, int64_t lines) {
    const int64_t query = P::query_size(p.cache.width);
    return lines * (query + kStride) + query + (1 + 2 * p.cache.kv_heads) * kChunk;
  }

  Unit(const CachedAttentionParams& p, const Items& items, const Distances& distances,
       int64_t lines, float* scratch)
      : p_(p),
        c_(p.cache),
        items_(items),
        distances_(distances),
        query_size_(P::query_size(p.cache.width)),
        q_(scratch),
        scores_(q_ + lines * query_size_),
        row_(scores_ + lines * kStride),
        bias_(row_ + query_size_),
        k_scales_(bias_ + kChunk),
        v_scales_(k_scales_ + p.cache.kv_heads * kChunk),
        ahead_(p.cache) {}

  /// What `attend` will be called with first: its keys are fetched.
  void expect(int64_t index, int64_t chunk) {
    const Item item = items_[index];
    ahead_.append(keys(item, seen_by(item, chunk)));
    ahead_.fetch(kAhead);
  }

  /// Ends with some keys of unit (next, next_chunk) fetched; next < 0 for none.
  void attend(int64_t index, int64_t chunk, int64_t next, int64_t next_chunk,
              const Partials& partials, int64_t place) {
    const Item item = items_[index];
    const int64_t first = chunk * kChunk;
    const Range seen = seen_by(item, chunk);
    seen_by_all_ = {visible(p_, item, query_of(item, item.rows - 1)).begin - first,
                    visible(p_, item, query_of(item, 0)).end - first};
    ahead_.append(values(item, seen));
    if (next >= 0) {
      const Item other = items_[next];
      ahead_.append(keys(other, seen_by(other, next_chunk)));
    }
    for (int64_t i = 0; i < item.lines(); ++i) partials.state(place, chunk, i) = {-INFINITY, 0.0f};
    if (seen.begin == seen.end) return;
    pack_queries(item);
    for_tiles(
        keys(item, seen), item.rows, first,
        [&](const Tile& tile, int64_t head, int64_t slot) { score_tile(tile, item, head, slot); });
    if (c_.k_scales.data) {
      read_scales(c_.k_scales, item, first, seen.end - first, k_scales_);
      read_scales(c_.v_scales, item, first, seen.end - first, v_scales_);
    }
    for (int64_t head = 0, i = 0; head < item.heads; ++head)
      for (int64_t row = 0; row < item.rows; ++row, ++i)
        partials.state(place, chunk, i) = weigh(item, head, row, first, seen.end);
    float* o = partials.row(place, chunk, 0);
    for (int64_t i = 0; i < item.lines() * partials.width; ++i) o[i] = 0.0f;
    for_tiles(values(item, seen), item.rows, first,
              [&](const Tile& tile, int64_t head, int64_t slot) {
                add_tile(tile, item, head, first, slot, o, partials.width);
              });
    for (int64_t i = 0; i < item.lines(); ++i)
      P::finish(scores_ + i * kStride, c_.value_width, o + i * partials.width);
  }

 private:
  using T = typename P::Element;
  using Tile = typename P::Tile;

  static Range clip(Range seen, int64_t first) {
    const int64_t begin = larger(seen.begin, first);
    return {begin, larger(begin, smaller(seen.end, first + kChunk))};
  }
  int64_t query_of(const Item& item, int64_t row) const {
    return (item.row + row) / items_.group();
  }
  int64_t head_of(const Item& item, int64_t head, int64_t row) const {
    return (item.head + head) * items_.group() + (item.row + row) % items_.group();
  }
  /// The slots of a chunk that any line of the item sees.
  Range seen_by(const Item& item, int64_t chunk) const {
    return clip({visible(p_, item, query_of(item, 0)).begin,
                 visible(p_, item, query_of(item, item.rows - 1)).end},
                chunk * kChunk);
  }
  Span keys(const Item& item, Range slots) const {
    return {&c_.k, item.batch, item.head, item.heads, c_.width, slots};
  }
  Span values(const Item& item, Range slots) const {
    return {&c_.v, item.batch, item.head, item.heads, c_.value_width, slots};
  }

  void pack_queries(const Item& item) {
    by_float(p_.q.dtype, [&](auto type) {
      using From = decltype(type);
      float* to = q_;
      for (int64_t head = 0; head < item.heads; ++head)
        for (int64_t r = 0; r < item.rows; ++r, to += query_size_) {
          const Slot token{item.queries.batch, item.queries.first + query_of(item, r)};
          const From* from = at<From>(p_.q, token, head_of(item, head, r));
          if (p_.q.stride[3] == 1) {
            for_lanes(c_.width, [&](int64_t d, auto k) { store(row_ + d, load(from + d, k), k); });
          } else {
            for (int64_t d = 0; d < c_.width; ++d) row_[d] = to_float(from[d * p_.q.stride[3]]);
          }
          P::pack_query(row_, c_.width, to);
        }
    });
  }

  /// f(tile, head, first slot in the chunk) for all of a span in a chunk that begins with slot
  /// `first`. Tiles begin at multiples of their size in the chunk.
  template <class F>
  void for_tiles(const Span& span, int64_t rows, int64_t first, const F& f) {
    Tile tile;
    const int64_t slots = rows < kManyRows ? P::kSlots : P::kManySlots;
    const int64_t begin = first + (span.slots.begin - first) / slots * slots;
    Slot place = slot_of(c_, span.batch, begin);
    for (int64_t slot = begin; slot < span.slots.end; slot += slots) {
      tile.count = smaller(slots, span.slots.end - slot);
      // Rounded up: what is fetched must not fall behind what is worked on.
      const int64_t parts = (rows + kLineTile - 1) / kLineTile;
      share_ = (tile.count * span.width * int64_t{sizeof(T)} + parts - 1) / parts;
      for (int64_t j = 0; j < slots; ++j, ++place.offset) {
        if (place.offset == c_.block_size && j < tile.count)
          place = slot_of(c_, span.batch, slot + j);
        tile.rows[j] = j < tile.count ? at<T>(*span.operand, place, span.head) : tile.rows[j - 1];
      }
      for (int64_t head = 0; head < span.heads; ++head) {
        f(tile, head, slot - first);
        for (int64_t j = 0; j < slots; ++j) tile.rows[j] += span.operand->stride[2];
      }
    }
  }

  /// Calls f.operator()<rows>(line) over `lines` lines from `line` on.
  template <class F>
  WF_INLINE void by_lines(int64_t line, int64_t lines, const F& f) {
    const int64_t end = line + lines;
    for (; line + kLineTile <= end; line += kLineTile) {
      ahead_.fetch(share_);
      f.template operator()<kLineTile>(line);
    }
    if (line < end) ahead_.fetch(share_);
    if (end - line == 3) f.template operator()<3>(line);
    if (end - line == 2) f.template operator()<2>(line);
    if (end - line == 1) f.template operator()<1>(line);
  }

  void score_tile(const Tile& tile, const Item& item, int64_t head, int64_t slot) {
    by_lines(head * item.rows, item.rows, [&]<int kRows>(int64_t line) {
      P::template score<kRows>(q_ + line * query_size_, tile, c_.width,
                               scores_ + line * kStride + slot, kStride);
    });
  }

  /// The products of a line become weights, 0 where not seen and up to a whole register; those of
  /// int8 take the scales of v.
  State weigh(const Item& item, int64_t head, int64_t row, int64_t first, int64_t end) {
    const int64_t n = end - first, whole = round_up(n, Vec::kWidth), t = query_of(item, row);
    const bool quantized = c_.k_scales.data;
    const float* k_scales = k_scales_ + head * kChunk;
    const float* v_scales = v_scales_ + head * kChunk;
    const Range seen = clip(visible(p_, item, t), first);
    const Vec begins = set(static_cast<float>(seen.begin - first)),
              ends = set(static_cast<float>(smaller(seen.end, end) - first));
    float* s = scores_ + (head * item.rows + row) * kStride;
    const int64_t own = own_slot(item, t) - first;
    if (p_.slopes) write_distances(p_.slopes[head_of(item, head, row)], own, n);
    Max high;
    const auto hide = [&](int64_t j, Vec v) {
      const Vec slot = load(kNumbers) + set(static_cast<float>(j)), none = set(-INFINITY);
      v = where_less(slot, begins, none, where_less(slot, ends, v, none));
      high.add(v);
      store(s + j, v);
    };
    for_lanes(whole, [&](int64_t j, auto) {
      Vec v = load(s + j) * set(p_.scale);
      if (quantized) v = v * load(k_scales + j);
      if (p_.softcap != 0.0f) v = tanh(v / set(p_.softcap)) * set(p_.softcap);
      if (p_.slopes) v = v + load(bias_ + j);
      distances_.bias ? store(s + j, v) : hide(j, v);
    });
    if (distances_.bias) {
      add_position_bias(distances_.bias + head_of(item, head, row) * distances_.count,
                        distances_.reach, -own, n, s);
      for_lanes(whole, [&](int64_t j, auto) { hide(j, load(s + j)); });
    }
    const float highest = high.total();
    const float shift = highest == -INFINITY ? 0.0f : highest;
    Sum total;
    for_lanes(whole, [&](int64_t j, auto) {
      const Vec v = load(s + j);
      const auto of_seen = [&](Vec w) { return where_less(v, set(-__FLT_MAX__), set(0.0f), w); };
      const Vec w = exp_negative(v - set(shift));  // not 0 of -inf
      total.add(of_seen(w));
      store(s + j, of_seen(quantized ? w * load(v_scales + j) : w));
    });
    P::pack_weights(s, n);
    return {highest, total.total()};
  }

  /// What is added to the scores of n slots, of which slot `own` is the query's.
  void write_distances(float slope, int64_t own, int64_t n) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t distance = own - j;
      bias_[j] = -slope * static_cast<float>(distance < 0 ? -distance : distance);
    }
  }

  void read_scales(const Heads& scales, const Item& item, int64_t first, int64_t n, float* to) {
    by_float(scales.dtype, [&](auto type) {
      for (int64_t j = 0, run; j < n; j += run) {
        const Slot slot = slot_of(c_, item.batch, first + j);
        run = smaller(n - j, c_.block_size - slot.offset);
        for (int64_t head = 0; head < item.heads; ++head) {
          const auto* from = at<decltype(type)>(scales, slot, item.head + head);
          for (int64_t i = 0; i < run; ++i)
            to[head * kChunk + j + i] = to_float(from[i * scales.stride[1]]);
        }
      }
    });
  }

  void add_tile(const Tile& tile, const Item& item, int64_t head, int64_t first, int64_t slot,
                float* o, int64_t o_width) {
    by_lines(head * item.rows, item.rows, [&]<int kRows>(int64_t line) {
      float* to = o + line * o_width;
      const float* w = scores_ + line * kStride;
      if (P::kFinite || (seen_by_all_.begin <= slot && slot + tile.count <= seen_by_all_.end)) {
        P::template add_values<kRows>(w, kStride, slot, tile, {0, tile.count}, c_.value_width, to,
                                      o_width);
        return;
      }
      // The same sums, without what a line does not see: 0 times NaN is NaN.
      for (int r = 0; r < kRows; ++r)
        P::template add_values<1>(w + r * kStride, kStride, slot, tile,
                                  seen_in(tile, item, line + r, first + slot), c_.value_width,
                                  to + r * o_width, o_width);
    });
  }
  Range seen_in(const Tile& tile, const Item& item, int64_t line, int64_t slot) const {
    const Range seen = visible(p_, item, query_of(item, line % item.rows));
    const int64_t begin = smaller(tile.count, larger(0, seen.begin - slot));
    return {begin, larger(begin, smaller(tile.count, seen.end - slot))};
  }

  const CachedAttentionParams& p_;
  const KvCache& c_;
  const Items& items_;
  const Distances& distances_;
  int64_t query_size_;
  float *q_, *scores_, *row_, *bias_, *k_scales_, *v_scales_;
  Fetcher ahead_;
  int64_t share_ = 0;    // bytes that are fetched with each few lines of a tile
  Range seen_by_all_{};  // the slots of the chunk that every line sees; also beyond the chunk
};

float exp_of(float x) {
  if (x == 0.0f) return 1.0f;  // what it is of most lines, which have one chunk
  float lane[Vec::kWidth];
  store(lane, exp(set(x)));
  return lane[0];
}

/// Ends a line: the chunks in their order, and the sink. Compiled once, so that it rounds alike
/// wherever it is called.
__attribute__((noinline)) void merge_line(const CachedAttentionParams& p, const Item& item,
                                          int64_t group, int64_t line, const Partials& partials,
                                          int64_t place) {
  const int64_t row = item.row + line % item.rows;
  const int64_t t = item.queries.first + row / group;
  const int64_t h = (item.head + line / item.rows) * group + row % group;
  const int64_t chunks = (item.length + kChunk - 1) / kChunk;
  float high = -INFINITY, total = 0.0f;
  for (int64_t c = 0; c < chunks; ++c) high = fmaxf(high, partials.state(place, c, line).high);
  for (int64_t c = 0; c < chunks; ++c) {
    const State s = partials.state(place, c, line);
    if (s.total != 0.0f) total += exp_of(s.high - high) * s.total;
  }
  const bool seen = total != 0.0f;  // also where it is NaN
  float sink = 0.0f, above = high;
  if (p.sinks && seen) {
    above = fmaxf(high, p.sinks[h]);
    sink = exp_of(p.sinks[h] - above);
  }
  const float all = exp_of(high - above) * total + sink;
  for (int64_t c = 0; c < chunks && seen; ++c) {
    State& s = partials.state(place, c, line);
    if (s.total != 0.0f) s.total = exp_of(s.high - above) / all;
  }
  by_float(p.out.dtype, [&](auto type) {
    using To = decltype(type);
    To* out = at<To>(p.out, {item.queries.batch, t}, h);
    for_lanes(p.cache.value_width, [&](int64_t d, auto k) {
      Vec sum = set(0.0f);
      for (int64_t c = 0; c < chunks && seen; ++c)
        if (const float weight = partials.state(place, c, line).total; weight != 0.0f)
          sum = fma(set(weight), load(partials.row(place, c, line) + d, k), sum);
      if (p.out.stride[3] == 1) {
        store(out + d, sum, k);
      } else {
        float lane[Vec::kWidth];
        store(lane, sum);
        for (int64_t i = 0; i < smaller(Vec::kWidth, p.cache.value_width - d); ++i)
          out[(d + i) * p.out.stride[3]] = from_float<To>(lane[i]);
      }
    });
  });
  if (p.lse)
    p.lse[(item.queries.batch * p.heads + h) * p.tokens.count + t] =
        seen ? above + logf(all) : -INFINITY;
}

/// Lines [begin, end) of an item.
void merge(const CachedAttentionParams& p, const Item& item, int64_t group, int64_t begin,
           int64_t end, const Partials& partials, int64_t place) {
  for (int64_t line = begin; line < smaller(end, item.lines()); ++line)
    merge_line(p, item, group, line, partials, place);
}

template <class P>
void run(const CachedAttentionParams& p, int available) {
  int64_t longest = 0, scores = 0;
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    longest = larger(longest, p.cache.lengths[b]);
    scores += (p.cache.lengths[b] + kLineSlots) * part_of(p.tokens, b).count * p.heads;
  }
  const int64_t work = scores * (p.cache.width + p.cache.value_width);
  const int threads = static_cast<int>(smaller(available, 1 + work / kGrain));
  const int64_t chunks = (longest + kChunk - 1) / kChunk;
  Items items(p, chunks, threads);
  const int64_t lines = items.lines();
  const int64_t width = round_up(p.cache.value_width, P::kColumns);
  const int64_t of_item = larger(1, chunks * lines * (width + 2));
  // An item of one chunk is finished by the thread that has it, while o is in L1.
  const bool at_once = chunks == 1;
  const int64_t at_a_time =
      at_once ? items.count() : smaller(items.count(), larger(1, kPartialFloats / of_item));
  const int64_t places = at_once ? threads : at_a_time;
  const int64_t merged_at_once = 1 + kMergeGrain / (chunks * width + 1);
  const int64_t own = round_up(Unit<P>::scratch_size(p, lines), 16);
  const int64_t farthest = longest + p.tokens.count;
  const int64_t biases = Distances::size(p.position_bias, farthest);
  const int64_t numbers = round_up(2 * (p.cache.batch + 1) + biases, 16);
  const int64_t shared = numbers + Units::size(threads);
  float* scratch = scratch_floats(shared + threads * own + places * of_item + 16);
  items.number(reinterpret_cast<int64_t*>(scratch));
  const Distances by_distance =
      distances(p.position_bias, farthest, scratch + 2 * (p.cache.batch + 1));
  float* counters = scratch + numbers;
  scratch += shared;
  float* o = scratch + threads * own;
  const Partials partials{o, reinterpret_cast<State*>(o + places * chunks * lines * width), chunks,
                          lines, width};
  for (int64_t first = 0; first < items.count(); first += at_a_time) {
    const int64_t count = smaller(at_a_time, items.count() - first);
    const Units units(count * chunks, threads, counters);
    parallel(threads, [&](int t) {
      Unit<P> unit(p, items, by_distance, lines, scratch + t * own);
      int64_t i = units.take(t);
      if (i >= 0) unit.expect(first + i / chunks, i % chunks);
      while (i >= 0) {
        const int64_t next = units.take(t);
        unit.attend(first + i / chunks, i % chunks, next < 0 ? -1 : first + next / chunks,
                    next % chunks, partials, at_once ? t : i / chunks);
        if (at_once) merge(p, items[first + i], items.group(), 0, lines, partials, t);
        i = next;
      }
    });
    if (at_once) return;
    parallel_for(count * lines, merged_at_once, threads, [&](int, int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int64_t place = i / lines, here = smaller(end, (place + 1) * lines) - place * lines;
        merge(p, items[first + place], items.group(), i % lines, here, partials, place);
        i = place * lines + here;
      }
    });
  }
}

}  // namespace

void cached_attention(const CachedAttentionParams& p, int threads) {
  const DType dtype = p.cache.k.dtype;
  if (dtype == DType::f16) return run<Floats<f16, FloatKeys>>(p, threads);
  if (dtype == DType::f32) return run<Floats<float, FloatKeys>>(p, threads);
#if defined(__AVX512VNNI__)
  if (dtype == DType::i8 && p.q.dtype == DType::f32) return run<Digits<3, 3>>(p, threads);
  if (dtype == DType::i8) return run<Digits<2, 2>>(p, threads);
#else
  if (dtype == DType::i8) return run<Floats<int8_t, FloatKeys>>(p, threads);
#endif
#if defined(__AVX512BF16__)
  run<Pairs>(p, threads);
#else
  run<Floats<bf16, FloatKeys>>(p, threads);
#endif
}

}  // namespace warpformer::cpu::WF_ISA

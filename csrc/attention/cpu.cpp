// A unit is one key/value head of one sequence and up to 48 tiles of the queries of its group of
// heads. K and V are packed once per unit, in spans that stay in L2 while all tiles pass over them:
//
//   for a span of keys:         k --transpose--> k panels [keys / 16][D][16]           (L2)
//                               v --copy-------> v panels [Dv / 16][keys][16]          (L2)
//     for each tile of q:       q --> rows of words                                    (L1)
//       for 256 keys:           S = q k^T            [rows of a tile, 256]             (L1)
//                               S + biases, row maximum m, P = exp(scale S - m), l += sum P
//                               o = o * exp(m_old - m) + P v                           (L2)
//   out = o / l
//
// The words of k, q, P and v are floats or, for bf16 operands where the ISA multiplies them, Pairs
// of bf16. Meanwhile a part of what is packed next is fetched with every tile, a few lines between
// its products.
#include "attention/pack.h"
#include "attention/scores.h"
#include "core/exponentials.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kBlock = kDepth;       // keys of one tile of scores
constexpr int64_t kQueries = 24;         // of a tile: one of k or v in L1 serves several of gemm
constexpr int64_t kUnitTiles = 48;       // with their output they still leave room in L2
constexpr int64_t kSpanWords = 1 << 17;  // packed k and v: half a megabyte
constexpr int64_t kStates = 32;          // whole registers of them
static_assert(kQueries % kTileRows == 0 && kStates % Vec::kWidth == 0 && kStates >= kQueries);

inline int64_t tiles(int64_t queries) { return (queries + kQueries - 1) / kQueries; }

/// The softmax so far of the rows of a tile.
struct TileState {
  float high[kStates];   // largest score, before scaling
  float total[kStates];  // sum of exp(scale (score - high))
};
constexpr float kLog2E = 1.44269504f;

/// Sizes that follow from the widths, and where everything lies in a thread's scratch, in floats.
template <class Word>
struct Sizes {
  int64_t width, value_width;  // words of a row of q and k; padded columns of the output
  int64_t span;                // keys
  int64_t k, v, q, scores, bias, kept, row, out, state, total;
  explicit Sizes(const AttentionParams& p)
      : width(words<Word>(p.width)), value_width(padded(p.value_width)) {
    const int64_t per_key = width + words<Word>(value_width);
    span = kSpanWords / (per_key ? per_key : 1) / kBlock * kBlock;
    span = at_most(span < kBlock ? kBlock : span, (p.keys + kBlock - 1) / kBlock * kBlock);
    k = 0;
    v = k + span * width;
    q = v + words<Word>(span) * value_width;
    scores = q + stretches(width) * kQueries * kStride;
    bias = scores + kQueries * kStride;
    kept = bias + kStride;
    row = kept + kStride;
    out = row + kPanel * padded(p.width > p.value_width ? p.width : p.value_width);
    state = out + kUnitTiles * kQueries * value_width;
    total = state + kUnitTiles * sizeof(TileState) / sizeof(float);
  }
};

/// 2^x of x <= 0, -inf included; relative error 2e-8 before rounding, none at 0; 0 below 2^-126.
WF_INLINE Vec exp2_negative(Vec x) {
  // Rounds to a multiple of 1, and leaves n + 127 in the lowest bits: where those of an exponent
  // go.
  constexpr float kRound = 0x1.8p23f + 127.0f;
  const Vec bounded = max(set(-127.0f), x), rounded = bounded + set(kRound);
  const Vec r = bounded - (rounded - set(kRound));
  Vec p = set(0.000153533620f);
  p = fma(p, r, set(0.00133988750f));
  p = fma(p, r, set(0.00961843692f));
  p = fma(p, r, set(0.0555033237f));
  p = fma(p, r, set(0.240226477f));
  p = fma(p, r, set(0.693147182f));
  p = fma(p, r, set(1.0f));
  return p * bits_as_float(shift_left<23>(bits_of(rounded)));
}

/// The largest of s[0, n), n a multiple of 16.
inline float highest(const float* s, int64_t n) {
  Max high;
  for_lanes(n, [&](int64_t j, auto k) { high.add(load(s + j, k)); });
  return high.total();
}

/// Raises the largest scores to those of new keys: the sums so far, and what follows from them, are
/// multiplied by `rescale`, and `shift` is added to the new scores. `scale` is one of powers of 2.
inline void raise(const float* high, float scale, TileState& state, float* rescale, float* shift) {
  for (int64_t r = 0; r < kStates; r += Vec::kWidth) {
    const Vec old = load(state.high + r), now = max(load(high + r), old), zero = set(0.0f);
    const Vec below = where_less(set(-INFINITY), now, zero - now, zero);
    const Vec times = exp2_negative((old + below) * set(scale));
    store(state.high + r, now);
    store(state.total + r, load(state.total + r) * times);
    store(rescale + r, times);
    store(shift + r, below);
  }
}

/// s[0, n) -> weights exp2(scale (s + shift)), n a multiple of 16; returns their sum. `weights` may
/// be s. The weights, not their sum, are then multiplied by `kept`, where there is a dropout.
template <class Word>
float weigh(const float* s, int64_t n, float scale, float shift, const float* kept, Word* weights) {
  Vec sums[2] = {set(0.0f), set(0.0f)};
  const auto add = [&](int64_t j, Vec& sum) {
    const Vec e = exp2_negative((load(s + j) + set(shift)) * set(scale));
    store_weights(weights, j, kept ? e * load(kept + j) : e);
    sum = sum + e;
  };
  int64_t j = 0;
  for (; j + 2 * Vec::kWidth <= n; j += 2 * Vec::kWidth) {
    add(j, sums[0]);
    add(j + Vec::kWidth, sums[1]);
  }
  for (; j < n; j += Vec::kWidth) add(j, sums[0]);
  return sum(sums[0] + sums[1]);
}

/// gemm without 0 * inf and 0 * NaN: what a row does not see stays out of it. The order of the
/// sums, and with it every bit of the rows that see only finite values, is that of gemm.
template <class Word>
void add_visible_values(const Word* weights, int64_t rows, Panels v, int64_t depth, float* out,
                        int64_t width) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < width; d += Vec::kWidth)
      for (int64_t begin = 0; begin < depth; begin += kChain) {
        Vec sum = set(0.0f);
        for (int64_t j = begin; j < at_most(depth, begin + kChain); ++j)
          sum = multiply_add_visible(weights + i * kStride + j,
                                     v.data + d / kPanel * v.panel + j * kPanel + d % kPanel, sum);
        float* o = out + i * width + d;
        store(o, load(o) + sum);
      }
}

/// Work of one thread at a time: tiles [first, first + count) of the heads that share a key/value
/// head.
struct Unit {
  Sequence sequence;
  Range keys;  // without padding
  int64_t kv_head, first, count;
};

/// All units, of at most `most` tiles, by number; numbers that are asked for rise.
class UnitNumbers {
 public:
  UnitNumbers(const AttentionParams& p, int64_t most) : p_(p), most_(most) {}

  /// False past the last one.
  bool find(int64_t number, Unit& unit) {
    for (; next_ < p_.sequences; ++next_) {
      const Sequence s = sequence(p_, next_);
      const int64_t count = p_.heads / p_.kv_heads * tiles(s.queries);
      const int64_t of_head = (count + most_ - 1) / most_, i = number - before_;
      if (i < of_head * p_.kv_heads) {
        // The last queries first: causal ones cost the most.
        const int64_t end = count - i % of_head * most_, first = end > most_ ? end - most_ : 0;
        unit = {s, unpadded(p_, s), i / of_head, first, end - first};
        return true;
      }
      before_ += of_head * p_.kv_heads;
    }
    return false;
  }

 private:
  const AttentionParams& p_;
  int64_t most_, next_ = 0, before_ = 0;
};

template <class Word>
class Attention {
 public:
  Attention(const AttentionParams& p, const Distances& distances, float* scratch)
      : p_(p), distances_(distances), sizes_(p), scratch_(scratch), group_(p.heads / p.kv_heads) {}

  /// `next`, if it is not null, is likely to be asked for next.
  void attend(const Unit& unit, const Unit* next) {
    Span span = first_span(unit), ahead{};
    for (bool first = true;; first = false, span = ahead) {
      const bool last = span.key + span.count >= span.end;
      if (!last) {
        ahead = following(span);
      } else if (next) {
        ahead = first_span(*next);
      }
      pack(span);
      for (int64_t i = 0; i < unit.count; ++i) {
        // The output of a tile that sees one span only does not leave L1.
        float* out = at(sizes_.out) + (first && last ? 0 : i * kQueries * sizes_.value_width);
        if (first) start(state()[i], out);
        fetch_part(ahead, i, unit.count);
        if (i + 1 < unit.count) {
          fetch_queries(unit, i + 1);
        } else if (last && next) {
          fetch_queries(*next, 0);
        }
        if (last) fetch_output(unit, i);
        attend_span(unit, tile(unit, i), span, state()[i], out);
        ahead_.fetch_all();
        if (last) finish(tile(unit, i), unit.sequence, state()[i], out);
      }
      if (last) return;
    }
  }

 private:
  struct Tile {
    int64_t head, query, rows;
  };
  /// Keys [key, key + count) of those before `end`: as many as are packed at once.
  struct Span {
    Rows k, v;
    int64_t key, count, end;
  };

  float* at(int64_t offset) const { return scratch_ + offset; }
  TileState* state() const { return reinterpret_cast<TileState*>(at(sizes_.state)); }
  Word* as_words(int64_t offset) const { return reinterpret_cast<Word*>(at(offset)); }

  Tile tile(const Unit& unit, int64_t i) const {
    const int64_t per_head = tiles(unit.sequence.queries), at = unit.first + i;
    const int64_t query = at % per_head * kQueries;
    return {unit.kv_head * group_ + at / per_head, query,
            at_most(kQueries, unit.sequence.queries - query)};
  }

  Range seen_by(const Unit& unit, const Tile& t) const {
    const Sequence& s = unit.sequence;
    return common(unit.keys,
                  {visible(p_, s, t.query).begin, visible(p_, s, t.query + t.rows - 1).end});
  }
  Range seen_by(const Unit& unit) const {
    Range all{0, 0};
    for (int64_t i = 0; i < unit.count; ++i) {
      const Range seen = seen_by(unit, tile(unit, i));
      if (seen.begin >= seen.end) continue;
      all = {all.end ? at_most(all.begin, seen.begin) : seen.begin,
             seen.end > all.end ? seen.end : all.end};
    }
    return all;
  }

  Span first_span(const Unit& unit) const {
    const Sequence& s = unit.sequence;
    const Range seen = seen_by(unit);
    const int64_t key = seen.begin / kBlock * kBlock;
    return {rows_of(p_.k, s.batch, unit.kv_head, s.first_key, s.keys, p_.width),
            rows_of(p_.v, s.batch, unit.kv_head, s.first_key, s.keys, p_.value_width), key,
            at_most(sizes_.span, seen.end - key), seen.end};
  }
  Span following(const Span& s) const {
    const int64_t key = s.key + s.count;
    return {s.k, s.v, key, at_most(sizes_.span, s.end - key), s.end};
  }

  void pack(const Span& span) {
    for (int64_t block = 0; block < span.count; block += kBlock) {
      const int64_t key = span.key + block, count = at_most(kBlock, span.count - block);
      pack_keys<Word>(span.k, key, count, sizes_.width, at(sizes_.row),
                      at(sizes_.k) + block * sizes_.width);
      finite_[block / kBlock] =
          pack_values(span.v, key, count, words<Word>(sizes_.span), at(sizes_.row),
                      at(sizes_.v) + words<Word>(block) * kPanel, Word{});
    }
  }

  /// Part i of n of a span that is packed later.
  void fetch_part(const Span& span, int64_t i, int64_t n) {
    const int64_t begin = span.key + span.count * i / n, end = span.key + span.count * (i + 1) / n;
    ahead_.append(span.k, begin, end);
    ahead_.append(span.v, begin, end);
  }
  void fetch_queries(const Unit& unit, int64_t i) {
    const Tile t = tile(unit, i);
    ahead_.append(queries(t, unit.sequence), t.query, t.query + t.rows);
  }
  void fetch_output(const Unit& unit, int64_t i) {
    const Tile t = tile(unit, i);
    ahead_.append(output(t, unit.sequence), t.query, t.query + t.rows);
  }

  Rows queries(const Tile& t, const Sequence& s) const {
    return rows_of(p_.q, s.batch, t.head, s.first_query, s.queries, p_.width);
  }

  Rows output(const Tile& t, const Sequence& s) const {
    return rows_of(p_.out, s.batch, t.head, s.first_query, s.queries, p_.value_width);
  }

  void start(TileState& state, float* out) const {
    for (int64_t r = 0; r < kStates; ++r) state.high[r] = -INFINITY, state.total[r] = 0.0f;
    for (int64_t i = 0; i < kQueries * sizes_.value_width; ++i) out[i] = 0.0f;
  }

  void attend_span(const Unit& unit, const Tile& t, const Span& span, TileState& state,
                   float* out) {
    const Sequence& s = unit.sequence;
    const Range seen = common(seen_by(unit, t), {span.key, span.key + span.count});
    if (seen.begin >= seen.end) return;
    const Scores scores(p_, s, t.head, distances_);
    const Rows q = queries(t, s);
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t d = 0; d < stretches(sizes_.width); ++d) {
        constexpr int64_t kElements = kDepth * kPerWord<Word>;
        const int64_t first = d * kElements;
        pack_row(q, t.query + r, first, at_most(kElements, p_.width - first),
                 p_.scale / scores.scale, as_words(sizes_.q) + (d * kQueries + r) * kStride);
      }
    for (int64_t block = 0; block < span.count; block += kBlock) {
      // From a multiple of two chains on, so that chains begin where they do for every other row.
      const int64_t hidden = seen.begin - span.key - block;
      const int64_t begin = hidden > 0 ? hidden / (2 * kChain) * (2 * kChain) : 0;
      const int64_t end = at_most(at_most(kBlock, span.count - block), seen.end - span.key - block);
      if (begin >= end) continue;
      int64_t ends[kQueries / kTileRows];  // of the keys that a tile of rows sees
      for (int64_t i = 0; i < t.rows; i += kTileRows) {
        const int64_t last = t.query + at_most(t.rows, i + kTileRows) - 1;
        ends[i / kTileRows] = at_most(end, visible(p_, s, last).end - span.key - block);
      }
      multiply_keys(t.rows, block, begin, ends);
      weigh_rows(t, scores, span.key + block, begin, end, state, out);
      add_values(t.rows, block, begin, ends, out);
    }
  }

  /// Scores of keys [begin, ends[i]) of the block that is `block` keys into the span, for tile i of
  /// the rows.
  void multiply_keys(int64_t rows, int64_t block, int64_t begin, const int64_t* ends) {
    const int64_t width = sizes_.width;
    for (int64_t d = 0; d < stretches(width); ++d) {
      Extent extents[kQueries / kTileRows];
      for (int64_t i = 0; i * kTileRows < rows; ++i)
        extents[i] = {padded(ends[i] - begin) / kPanel, at_most(kDepth, width - d * kDepth)};
      gemm_tall(
          rows, extents, as_words(sizes_.q) + d * kQueries * kStride,
          {at(sizes_.k) + ((block + begin) * width + d * kDepth * kPanel), width * kPanel, kPanel},
          chain_of_scores<Word>(width), at(sizes_.scores) + begin, kStride, d > 0, ahead_);
    }
  }

  /// One step of the online softmax: scores of keys [begin, end) of the block at `key` -> weights,
  /// in their place; the sums and the output so far follow the largest scores. A function of its
  /// own: inlined, its loops share registers with all others, which costs 4 % of causal attention.
  __attribute__((noinline)) void weigh_rows(const Tile& t, const Scores& scores, int64_t key,
                                            int64_t begin, int64_t end, TileState& state,
                                            float* out) {
    const int64_t n = padded(end - begin), width = sizes_.value_width;
    const float scale = scores.softmax_scale() * kLog2E;
    float high[kStates], rescale[kStates], shift[kStates];
    for (float& h : high) h = -INFINITY;
    for (int64_t r = 0; r < t.rows; ++r) {
      float* s = at(sizes_.scores) + r * kStride + begin;
      scores.finish(t.query + r, key + begin, end - begin, s, at(sizes_.bias));
      high[r] = highest(s, n);
    }
    raise(high, scale, state, rescale, shift);
    for (int64_t r = 0; r < t.rows; ++r) {
      float* s = at(sizes_.scores) + r * kStride + begin;
      float* kept = p_.dropout.seed ? at(sizes_.kept) : nullptr;
      if (kept) scores.draw(t.query + r, key + begin, n, kept);
      Word* weights = as_words(sizes_.scores) + r * kStride + words<Word>(begin);
      state.total[r] += weigh(s, n, scale, shift[r], kept, weights);
      float* o = out + r * width;
      for (int64_t d = 0; d < width; d += Vec::kWidth) store(o + d, load(o + d) * set(rescale[r]));
    }
  }

  void add_values(int64_t rows, int64_t block, int64_t begin, const int64_t* ends, float* out) {
    const int64_t width = sizes_.value_width, first = words<Word>(begin),
                  tiles = (rows + kTileRows - 1) / kTileRows,
                  depth = words<Word>(ends[tiles - 1]) - first;
    const Word* weights = as_words(sizes_.scores) + first;
    const Panels v{at(sizes_.v) + (words<Word>(block) + first) * kPanel,
                   words<Word>(sizes_.span) * kPanel, kPanel};
    if (!finite_[block / kBlock]) return add_visible_values(weights, rows, v, depth, out, width);
    for (int64_t j = 0; j < depth; j += kChain) {
      Extent extents[kQueries / kTileRows];
      for (int64_t i = 0; i < tiles; ++i) {
        const int64_t left = words<Word>(ends[i]) - first - j;
        extents[i] = {left > 0 ? width / kPanel : 0, at_most(kChain, left)};
      }
      gemm_tall(rows, extents, weights + j, {v.data + j * kPanel, v.panel, v.row}, kChain, out,
                width, true, ahead_);
    }
  }

  void finish(const Tile& t, const Sequence& s, const TileState& state, float* out) {
    const Rows to = output(t, s);
    const float scale = Scores(p_, s, t.head, distances_).softmax_scale();
    for (int64_t r = 0; r < t.rows; ++r) {
      double high = static_cast<double>(state.high[r]) * scale;  // lse is rounded once
      float total = state.total[r], factor = 1.0f;
      if (p_.sinks && total != 0.0f) {
        const float sink = p_.sinks[t.head];
        const double higher = sink > high ? sink : high;
        factor = expf(static_cast<float>(high - higher));
        high = higher;
        total = total * factor + expf(static_cast<float>(sink - higher));
      }
      float* o = out + r * sizes_.value_width;
      const Vec times = set(total == 0.0f ? 0.0f : factor / total);
      float* written = row_out(to, t.query + r, o);
      for_lanes(to.n, [&](int64_t d, auto k) { store(written + d, load(o + d, k) * times, k); });
      finish_row(to, t.query + r, written);
      if (p_.lse.data) {
        float* lse = reinterpret_cast<float*>(p_.lse.data) + s.batch * p_.lse.stride[0] +
                     t.head * p_.lse.stride[1] + (s.first_query + t.query + r) * p_.lse.stride[2];
        *lse = total == 0.0f ? -INFINITY : static_cast<float>(high + logf(total));
      }
    }
  }

  const AttentionParams& p_;
  const Distances distances_;
  const Sizes<Word> sizes_;
  float* scratch_;
  int64_t group_;
  RowFetcher ahead_;
  bool finite_[kSpanWords / kBlock];
};

template <class Word>
void run(const AttentionParams& p, int available) {
  const int threads = p.sequences * p.heads * p.queries > 16 ? available : 1;
  const int64_t size = Sizes<Word>(p).total;
  const int64_t shared = Distances::size(p.position_bias, farthest(p));
  float* scratch = scratch_floats(shared + threads * size);
  const Distances by_distance = distances(p.position_bias, farthest(p), scratch);
  scratch += shared;
  // Few units are cut smaller, so that every thread gets some. Where the cuts lie changes no bit.
  const int64_t all_tiles = p.sequences * p.heads * tiles(p.queries);
  const int64_t most = at_most(kUnitTiles, 1 + all_tiles / (4 * threads));
  int64_t claimed = 0;
  parallel(threads, [&](int t) {
    Attention<Word> attention(p, by_distance, scratch + t * size);
    UnitNumbers units(p, most), later(p, most);
    Unit unit, next;
    const auto claim = [&] { return __atomic_fetch_add(&claimed, 1, __ATOMIC_RELAXED); };
    for (int64_t i = claim(); units.find(i, unit); i = claim())
      attention.attend(unit, later.find(i + threads, next) ? &next : nullptr);
  });
}

}  // namespace

void attention(const AttentionParams& p, int threads) {
#if defined(__AVX512BF16__)
  if (p.q.dtype == DType::bf16) return run<Pair>(p, threads);
#endif
  run<float>(p, threads);
}

}  // namespace warpformer::cpu::WF_ISA

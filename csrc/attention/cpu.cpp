// A unit is one key/value head of one sequence and up to 96 tiles of the queries of its group of
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
// of bf16.
#include "attention/pack.h"
#include "attention/scores.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kBlock = kDepth;       // keys of one tile of scores
constexpr int64_t kUnitTiles = 96;       // with their output they still leave room in L2
constexpr int64_t kSpanWords = 1 << 17;  // packed k and v: half a megabyte

/// Sizes that follow from the widths, and where everything lies in a thread's scratch, in floats.
template <class Word>
struct Sizes {
  int64_t width, value_width;  // words of a row of q and k; padded columns of the output
  int64_t span;                // keys
  int64_t k, v, q, scores, weights, bias, kept, row, out, state, total;
  explicit Sizes(const AttentionParams& p)
      : width(words<Word>(p.width)), value_width(padded(p.value_width)) {
    const int64_t per_key = width + words<Word>(value_width) + 1;
    span = kSpanWords / per_key / kBlock * kBlock;
    span = at_most(span < kBlock ? kBlock : span, (p.keys + kBlock - 1) / kBlock * kBlock);
    k = 0;
    v = k + span * width;
    q = v + words<Word>(span) * value_width;
    scores = q + stretches(width) * kTileRows * kStride;
    weights = scores + kTileRows * kStride;
    bias = weights + kTileRows * kStride;
    kept = bias + kStride;
    row = kept + kStride;
    out = row + 2 * padded(p.width > p.value_width ? p.width : p.value_width);
    state = out + kUnitTiles * kTileRows * value_width;
    total = state + kUnitTiles * kTileRows * 2;
  }
};

/// The softmax so far of one row of queries.
struct RowState {
  float high;   // largest score
  float total;  // sum of exp(score - high)
};

/// One step of the online softmax: weights = exp(scale * s - high), the sum and the output so far
/// are rescaled to the new high. s has a multiple of 16 entries, -inf past the last key. The
/// weights, not their sum, are then multiplied by `kept`, where there is a dropout.
template <class Word>
void update_row(const float* s, int64_t begin, int64_t n, float scale, const float* kept,
                RowState& state, float* out, int64_t width, Word* weights) {
  Vec top[4] = {set(-INFINITY), set(-INFINITY), set(-INFINITY), set(-INFINITY)};
  int64_t j = begin;
  for (; j + 4 * Vec::kWidth <= n; j += 4 * Vec::kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) top[i] = max(top[i], load(s + j + i * Vec::kWidth));
  for (; j < n; j += Vec::kWidth) top[0] = max(top[0], load(s + j));
  const float high = max_lane(max(max(top[0], top[1]), max(top[2], top[3]))) * scale;
  const float highest = high > state.high ? high : state.high;
  const Vec shift = set(highest == -INFINITY ? 0.0f : -highest);
  Vec added[2] = {set(0.0f), set(0.0f)};
  for (j = begin; j + 2 * Vec::kWidth <= n; j += 2 * Vec::kWidth)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vec e = exp(fma(load(s + j + i * Vec::kWidth), set(scale), shift));
      store_weights(weights, j + i * Vec::kWidth,
                    kept ? e * load(kept + j - begin + i * Vec::kWidth) : e);
      added[i] = added[i] + e;
    }
  for (; j < n; j += Vec::kWidth) {
    const Vec e = exp(fma(load(s + j), set(scale), shift));
    store_weights(weights, j, kept ? e * load(kept + j - begin) : e);
    added[0] = added[0] + e;
  }
  const float total = sum(added[0] + added[1]);
  if (highest != state.high && state.total != 0.0f) {
    float rescale[Vec::kWidth];
    store(rescale, exp(set(state.high) + shift));
    state.total *= rescale[0];
    for (int64_t d = 0; d < width; d += Vec::kWidth)
      store(out + d, load(out + d) * set(rescale[0]));
  }
  state = {highest, state.total + total};
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
  int64_t kv_head, first, count;
};

template <class Word>
class Attention {
 public:
  Attention(const AttentionParams& p, const Distances& distances, float* scratch)
      : p_(p), distances_(distances), sizes_(p), scratch_(scratch), group_(p.heads / p.kv_heads) {}

  void attend(const Unit& unit) {
    const Sequence& s = unit.sequence;
    const int64_t width = sizes_.value_width;
    for (int64_t i = 0; i < unit.count * kTileRows * width; ++i) at(sizes_.out)[i] = 0.0f;
    for (int64_t i = 0; i < unit.count * kTileRows; ++i) state()[i] = {-INFINITY, 0.0f};

    const Rows k = rows_of(p_.k, s.batch, unit.kv_head, s.first_key, s.keys, p_.width);
    const Rows v = rows_of(p_.v, s.batch, unit.kv_head, s.first_key, s.keys, p_.value_width);
    const Range seen = seen_by(unit);
    for (int64_t key = seen.begin / kBlock * kBlock; key < seen.end; key += sizes_.span) {
      const int64_t count = at_most(sizes_.span, seen.end - key);
      pack_keys<Word>(k, key, count, sizes_.width, at(sizes_.row), at(sizes_.k));
      for (int64_t block = 0; block < count; block += kBlock)
        finite_[block / kBlock] =
            pack_values(v, key + block, at_most(kBlock, count - block), words<Word>(sizes_.span),
                        at(sizes_.row), at(sizes_.v) + words<Word>(block) * kPanel, Word{});
      for (int64_t i = 0; i < unit.count; ++i) attend_span(unit, i, key, count);
    }
    for (int64_t i = 0; i < unit.count; ++i) finish(unit, i);
  }

 private:
  struct Tile {
    int64_t head, query, rows;
  };

  float* at(int64_t offset) const { return scratch_ + offset; }
  RowState* state() const { return reinterpret_cast<RowState*>(at(sizes_.state)); }
  Word* as_words(int64_t offset) const { return reinterpret_cast<Word*>(at(offset)); }

  Tile tile(const Unit& unit, int64_t i) const {
    const int64_t per_head = tiles(unit.sequence.queries), at = unit.first + i;
    const int64_t query = at % per_head * kTileRows;
    return {unit.kv_head * group_ + at / per_head, query,
            at_most(kTileRows, unit.sequence.queries - query)};
  }

  Range seen_by(const Tile& t, const Sequence& s) const {
    return {visible(p_, s, t.query).begin, visible(p_, s, t.query + t.rows - 1).end};
  }
  Range seen_by(const Unit& unit) const {
    Range all{unit.sequence.keys, 0};
    for (int64_t i = 0; i < unit.count; ++i) {
      const Range seen = seen_by(tile(unit, i), unit.sequence);
      all = {at_most(all.begin, seen.begin), seen.end > all.end ? seen.end : all.end};
    }
    return all;
  }

  void attend_span(const Unit& unit, int64_t index, int64_t key, int64_t count) {
    const Sequence& s = unit.sequence;
    const Tile t = tile(unit, index);
    const Range seen = seen_by(t, s);
    if (seen.begin >= key + count || seen.end <= key || seen.begin == seen.end) return;
    const Scores scores(p_, s, t.head, distances_);
    const Rows q = rows_of(p_.q, s.batch, t.head, s.first_query, s.queries, p_.width);
    for (int64_t r = 0; r < t.rows; ++r)
      for (int64_t d = 0; d < stretches(sizes_.width); ++d) {
        constexpr int64_t kPerWord = words<Word>(2) == 1 ? 2 : 1;
        const int64_t first = d * kDepth * kPerWord;
        pack_row(q, t.query + r, first, at_most(kDepth * kPerWord, p_.width - first),
                 p_.scale / scores.scale, as_words(sizes_.q) + (d * kTileRows + r) * kStride);
      }
    for (int64_t block = 0; block < count; block += kBlock) {
      // From a multiple of two chains on, so that chains begin where they do for every other row.
      const int64_t hidden = seen.begin - key - block;
      const int64_t begin = hidden > 0 ? hidden / (2 * kChain) * (2 * kChain) : 0;
      const int64_t end = at_most(at_most(kBlock, count - block), seen.end - key - block);
      if (begin < end) attend_block(t, scores, index, key, block, begin, end);
    }
  }

  /// Keys [begin, end) of the block that is `block` keys into the span at `key`.
  void attend_block(const Tile& t, const Scores& scores, int64_t index, int64_t key, int64_t block,
                    int64_t begin, int64_t end) {
    const int rows = static_cast<int>(t.rows);
    const int64_t width = sizes_.width;
    float* s = at(sizes_.scores);
    for (int64_t d = 0; d < stretches(width); ++d)
      gemm(rows, padded(end - begin) / kPanel, as_words(sizes_.q) + d * kTileRows * kStride,
           {at(sizes_.k) + ((block + begin) * width + d * kDepth * kPanel), width * kPanel, kPanel},
           at_most(kDepth, width - d * kDepth), chain_of_scores<Word>(width), s + begin, kStride,
           d > 0);
    float* out = at(sizes_.out) + index * kTileRows * sizes_.value_width;
    Word* weights = as_words(sizes_.weights);
    float* kept = p_.dropout.seed ? at(sizes_.kept) : nullptr;
    for (int64_t r = 0; r < rows; ++r) {
      float* row = s + r * kStride;
      scores.finish(t.query + r, key + block + begin, end - begin, row + begin, at(sizes_.bias));
      for (int64_t j = end; j < begin + padded(end - begin); ++j) row[j] = -INFINITY;
      if (kept) scores.draw(t.query + r, key + block + begin, padded(end - begin), kept);
      update_row(row, begin, begin + padded(end - begin), scores.softmax_scale(), kept,
                 state()[index * kTileRows + r], out + r * sizes_.value_width, sizes_.value_width,
                 weights + r * kStride);
    }
    const int64_t first = words<Word>(begin), depth = words<Word>(end) - first;
    const Panels v{at(sizes_.v) + (words<Word>(block) + first) * kPanel,
                   words<Word>(sizes_.span) * kPanel, kPanel};
    if (finite_[block / kBlock]) {
      gemm(rows, sizes_.value_width / kPanel, weights + first, v, depth, kChain, out,
           sizes_.value_width, true);
    } else {
      add_visible_values(weights + first, rows, v, depth, out, sizes_.value_width);
    }
  }

  void finish(const Unit& unit, int64_t index) {
    const Sequence& s = unit.sequence;
    const Tile t = tile(unit, index);
    const Rows out = rows_of(p_.out, s.batch, t.head, s.first_query, s.queries, p_.value_width);
    for (int64_t r = 0; r < t.rows; ++r) {
      RowState row = state()[index * kTileRows + r];
      float* o = at(sizes_.out) + (index * kTileRows + r) * sizes_.value_width;
      float factor = 1.0f;
      if (p_.sinks && row.total != 0.0f) {
        const float sink = p_.sinks[t.head], high = sink > row.high ? sink : row.high;
        factor = expf(row.high - high);
        row = {high, row.total * factor + expf(sink - high)};
      }
      const Vec times = set(row.total == 0.0f ? 0.0f : factor / row.total);
      for (int64_t d = 0; d < sizes_.value_width; d += Vec::kWidth)
        store(o + d, load(o + d) * times);
      write_span(o, out, t.query + r, 0, out.n);
      if (p_.lse.data) {
        float* lse = reinterpret_cast<float*>(p_.lse.data) + s.batch * p_.lse.stride[0] +
                     t.head * p_.lse.stride[1] + (s.first_query + t.query + r) * p_.lse.stride[2];
        *lse = row.total == 0.0f ? -INFINITY : row.high + logf(row.total);
      }
    }
  }

  const AttentionParams& p_;
  const Distances distances_;
  const Sizes<Word> sizes_;
  float* scratch_;
  int64_t group_;
  bool finite_[kSpanWords / kBlock];
};

template <class Word>
void run(const AttentionParams& p, int available) {
  const int threads = p.sequences * p.heads * p.queries > 16 ? available : 1;
  const int64_t size = Sizes<Word>(p).total, group = p.heads / p.kv_heads;
  float* scratch = scratch_floats(Distances::size(p) + threads * size);
  const Distances by_distance = distances(p, scratch);
  scratch += Distances::size(p);
  // Few units are cut smaller, so that every thread gets some. Where the cuts lie changes no bit.
  const int64_t all_tiles = p.sequences * p.heads * tiles(p.queries);
  const int64_t most = at_most(kUnitTiles, 1 + all_tiles / (4 * threads));
  int64_t next = 0;
  parallel(threads, [&](int t) {
    Attention<Word> attention(p, by_distance, scratch + t * size);
    int64_t number = 0, mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < p.sequences; ++i) {
      const Sequence s = sequence(p, i);
      const int64_t count = group * tiles(s.queries);
      for (int64_t head = 0; head < p.kv_heads; ++head)
        // The last queries first: causal ones cost the most.
        for (int64_t end = count; end > 0; end -= at_most(most, end)) {
          if (number++ != mine) continue;
          const int64_t tiles = at_most(most, end);
          attention.attend({s, head, end - tiles, tiles});
          mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
        }
    }
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

// A unit is one key/value head of one sequence or, where those are few, 256 of its keys. Scores are
// computed anew, 60 queries and 256 keys at a time, and everything that reads them follows at once:
//
//   for 256 keys:           k, v --transpose--> panels for S and dP; k --copy--> for dq (L2)
//     for 60 queries, the last ones first:
//       for a head of the group:
//                           delta = dout out - dlse, dq = 0, once: at the first keys seen
//                           q, dout --> panels for dk and dv (L2)
//         for a tile of rows:  S = q k^T, dP = dout v^T             [rows of a tile, 256] (L1)
//                              P = exp(scale S - lse), dS = P (drop dP - delta)
//                              dq += dS k (L2), biases by distance += dS
//         for a tile of keys:  dv += (drop P)^T dout, dk += dS^T q (L2)
//
// Every sum has an order that follows from the sequence's length alone: blocks of keys (dq), blocks
// of queries and in them the heads of the group (dk, dv), one after the other. Where several
// threads work on one head, a block of keys takes its turn at a block of queries after the one
// before it: all of them go through the queries in one order, from the end that causal keys share,
// so that they follow each other and hardly wait.
#include <sched.h>

#include "attention/pack.h"
#include "attention/scores.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kBlock = kDepth;      // keys
constexpr int64_t kGradientChain = 32;  // products summed in one chain, as in core/gemm.h
constexpr int64_t kQueries = 60;        // a multiple of every ISA's tile
static_assert(kQueries % kTileRows == 0);

/// One even without keys: the rows of dq are written.
int64_t blocks(int64_t keys) { return keys ? (keys + kBlock - 1) / kBlock : 1; }

/// Work of one thread at a time: some blocks of the keys of one key/value head.
struct Unit {
  Sequence sequence;
  int64_t kv_head, first, blocks;
  int64_t number;  // of the first one, of all blocks there are
};

/// sums += ds[0, n) by distance: the transpose of add_position_bias.
void sum_by_distance(const float* ds, int64_t reach, int64_t distance, int64_t n, double* sums) {
  const auto total = [&](int64_t begin, int64_t end) {
    Sum sum;
    for_lanes(end - begin, [&](int64_t j, auto k) { sum.add(load(ds + begin + j, k)); });
    return sum.total();
  };
  by_reach(
      reach, distance, n, [&](int64_t end) { sums[0] += total(0, end); },
      [&](int64_t index, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; ++j) sums[index + j] += ds[j];
      },
      [&](int64_t begin) { sums[2 * reach] += total(begin, n); });
}

template <class Word>
class AttentionBackward {
 public:
  AttentionBackward(const AttentionBackwardParams& p, const Distances& distances, float* scratch,
                    int64_t* turns, float* parts)
      : p_(p),
        f_(p.forward),
        distances_(distances),
        turns_(turns),
        parts_(parts),
        group_(f_.heads / f_.kv_heads) {
    width_ = words<Word>(f_.width);
    value_words_ = words<Word>(f_.value_width);
    padded_ = padded(f_.width);
    value_padded_ = padded(f_.value_width);
    float* next = scratch;
    const auto take = [&](int64_t floats) {
      float* taken = next;
      next += floats;
      return taken;
    };
    sums_ = reinterpret_cast<double*>(
        take(p.dposition_bias
                 ? 2 * group_ * (2 * Distances::reach_of(f_.position_bias, farthest(f_)) + 1)
                 : 0));
    keys_ = take(kBlock * width_);
    values_ = take(kBlock * value_words_);
    key_panels_ = take(words<Word>(kBlock) * padded_);
    query_panels_ = take(words<Word>(kQueries) * padded_);
    dout_panels_ = take(words<Word>(kQueries) * value_padded_);
    query_rows_ = take(stretches(width_) * kTileRows * kStride);
    dout_rows_ = take(stretches(value_words_) * kTileRows * kStride);
    scores_ = take(kTileRows * kStride);
    dscores_ = take(kTileRows * kStride);
    dscore_rows_ = take(kTileRows * kStride);
    weight_columns_ = take(words<Word>(kQueries) * kStride);
    dscore_columns_ = take(words<Word>(kQueries) * kStride);
    bias_ = take(kStride);
    derivative_ = take(kStride);
    kept_ = take(kStride);
    row_ = take(kPanel * (padded_ > value_padded_ ? padded_ : value_padded_));
    dq_ = take(kTileRows * padded_);
    dk_ = take(kBlock * padded_);
    dv_ = take(kBlock * value_padded_);
    group_dk_ = group_ > 1 ? take(kBlock * padded_) : dk_;
    group_dv_ = group_ > 1 ? take(kBlock * value_padded_) : dv_;
    size_ = padded(next - scratch);  // the next thread's doubles are aligned
  }
  int64_t size() const { return size_; }

  void differentiate(const Unit& unit) {
    for (int64_t i = 0; i < unit.blocks; ++i)
      differentiate(unit.sequence, unit.kv_head, unit.first + i, unit.number + i);
  }

 private:
  static void clear(float* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
  }
  static void add(const float* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] += from[i];
  }
  static Word* as_words(float* p) { return reinterpret_cast<Word*>(p); }

  int64_t row_index(const Sequence& s, int64_t head, int64_t query) const {
    return (s.batch * f_.heads + head) * f_.queries + s.first_query + query;
  }

  /// Block `block` of the keys, the one of this number of all.
  void differentiate(const Sequence& s, int64_t kv_head, int64_t block, int64_t number) {
    const Rows k = rows_of(f_.k, s.batch, kv_head, s.first_key, s.keys, f_.width);
    const Rows v = rows_of(f_.v, s.batch, kv_head, s.first_key, s.keys, f_.value_width);
    const Rows dk = rows_of(p_.dk, s.batch, kv_head, s.first_key, s.keys, f_.width);
    const Rows dv = rows_of(p_.dv, s.batch, kv_head, s.first_key, s.keys, f_.value_width);
    const int64_t key = block * kBlock, count = at_most(kBlock, s.keys - key);
    pack_keys<Word>(k, key, count, width_, row_, keys_);
    pack_keys<Word>(v, key, count, value_words_, row_, values_);
    // Where a key is not finite, dS is NaN if it is seen and 0 if not: 0 in its place serves both.
    if (!pack_values(k, key, count, words<Word>(kBlock), row_, key_panels_, Word{}))
      clear_non_finite(key_panels_, words<Word>(kBlock) * padded_, Word{});
    clear(dk_, count * padded_);
    clear(dv_, count * value_padded_);
    for (int64_t i = 0; p_.dposition_bias && i < group_ * distances_.count; ++i) sums_[i] = 0.0;
    const int64_t last = (s.queries + kQueries - 1) / kQueries * kQueries - kQueries;
    for (int64_t query = last, step = 0; query >= 0; query -= kQueries) {
      const int64_t rows = at_most(kQueries, s.queries - query);
      if (group_ > 1) {
        clear(group_dk_, count * padded_);
        clear(group_dv_, count * value_padded_);
      }
      for (int64_t h = 0; h < group_; ++h, ++step) {
        const int64_t head = kv_head * group_ + h;
        const Range range = seen_by(s, key, count, query, rows);
        const int64_t first = at_most(visible(f_, s, query).begin / kBlock, blocks(s.keys) - 1);
        if (block == first) start(s, head, query, rows);
        if (range.begin < range.end) {
          if (block > first) wait(turns_ + number - 1, step);
          add_queries(s, head, key, range, query, rows);
        }
        __atomic_store_n(turns_ + number, step + 1, __ATOMIC_RELEASE);
      }
      if (group_ > 1) {
        add(group_dk_, dk_, count * padded_);
        add(group_dv_, dv_, count * value_padded_);
      }
    }
    for (int64_t j = 0; j < count; ++j) {
      write_span(dk_ + j * padded_, dk, key + j, 0, f_.width);
      write_span(dv_ + j * value_padded_, dv, key + j, 0, f_.value_width);
    }
    if (p_.dposition_bias) sum_buckets(parts_ + number * group_ * f_.position_bias.table.count);
  }

  /// parts [group, buckets]: the sums by distance of these keys, by bucket.
  void sum_buckets(float* parts) const {
    const int64_t buckets = f_.position_bias.table.count;
    clear(parts, group_ * buckets);
    for (int64_t h = 0; h < group_; ++h)
      for (int64_t i = 0; i < distances_.count;) {
        const int32_t bucket = distances_.bucket[i];
        double total = 0.0;
        for (; i < distances_.count && distances_.bucket[i] == bucket; ++i)
          total += sums_[h * distances_.count + i];
        parts[h * buckets + bucket] = static_cast<float>(total);
      }
  }

  /// In double, for dP - delta cancels: a query that sees few keys has gradients far below both.
  static double product(const float* a, const float* b, int64_t n) {
    double sums[8] = {};
    int64_t j = 0;
    for (; j + 8 <= n; j += 8)
      for (int64_t i = 0; i < 8; ++i) sums[i] += static_cast<double>(a[j + i]) * b[j + i];
    for (; j < n; ++j) sums[j % 8] += static_cast<double>(a[j]) * b[j];
    double total = 0.0;
    for (const double sum : sums) total += sum;
    return total;
  }

  /// delta of the rows [query, query + rows) of a head, and dq = 0.
  void start(const Sequence& s, int64_t head, int64_t query, int64_t rows) {
    const Rows out = rows_of(f_.out, s.batch, head, s.first_query, s.queries, f_.value_width);
    const Rows dout = rows_of(p_.dout, s.batch, head, s.first_query, s.queries, f_.value_width);
    const Rows dlse = rows_of(p_.dlse, s.batch, head, s.first_query, s.queries, 1);
    for (int64_t i = query; i < query + rows; ++i) {
      const float* o = row_in(out, i, row_);
      const float* d = row_in(dout, i, row_ + value_padded_);
      float gradient = 0.0f;
      if (dlse.data) read_span(dlse, i, 0, 1, &gradient);
      p_.delta[row_index(s, head, i)] =
          static_cast<float>(product(o, d, f_.value_width) - gradient);
      clear(p_.dq + row_index(s, head, i) * f_.width, f_.width);
    }
  }

  /// Until `turn` is past `step`. Those before took their blocks before: one of them is at work.
  static void wait(const int64_t* turn, int64_t step) {
    while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) <= step) sched_yield();
  }

  /// Of the keys [key, key + count), those that the queries [query, query + rows) see.
  Range seen_by(const Sequence& s, int64_t key, int64_t count, int64_t query, int64_t rows) const {
    const Range seen = common(unpadded(f_, s),
                              {visible(f_, s, query).begin, visible(f_, s, query + rows - 1).end});
    const int64_t first = seen.begin - key;
    return {first > 0 ? first / kPanel * kPanel : 0, at_most(count, seen.end - key)};
  }

  /// The queries [query, query + count) of a head, count at most kQueries, with the keys `range` of
  /// the block at `key`: adds to dq and to the group's dk and dv.
  void add_queries(const Sequence& s, int64_t head, int64_t key, Range range, int64_t query,
                   int64_t count) {
    const Rows q = rows_of(f_.q, s.batch, head, s.first_query, s.queries, f_.width);
    const Rows dout = rows_of(p_.dout, s.batch, head, s.first_query, s.queries, f_.value_width);
    if (!pack_values(q, query, count, words<Word>(kQueries), row_, query_panels_, Word{}))
      clear_non_finite(query_panels_, words<Word>(kQueries) * padded_, Word{});
    const bool finite =
        pack_values(dout, query, count, words<Word>(kQueries), row_, dout_panels_, Word{});
    const Scores scores(f_, s, head, distances_);
    for (int64_t i = 0; i < count; i += kTileRows)
      add_tile(scores, head, key, range, query, i, at_most(kTileRows, count - i), q, dout);

    const int64_t depth = words<Word>(count);
    const Panels outs{dout_panels_, words<Word>(kQueries) * kPanel, kPanel};
    const Panels queries{query_panels_, words<Word>(kQueries) * kPanel, kPanel};
    for (int64_t j = range.begin; j < range.end; j += kTileRows) {
      const int rows = static_cast<int>(at_most(kTileRows, range.end - j));
      const auto multiply = finite ? &gemm<Layout::columns, Word> : &multiply_visible;
      multiply(rows, value_padded_ / kPanel, as_words(weight_columns_) + j, outs, depth,
               kGradientChain, group_dv_ + j * value_padded_, value_padded_, true);
      gemm<Layout::columns>(rows, padded_ / kPanel, as_words(dscore_columns_) + j, queries, depth,
                            kGradientChain, group_dk_ + j * padded_, padded_, true);
    }
  }

  /// Rows [i, i + rows) of the block of queries at `query`.
  void add_tile(const Scores& scores, int64_t head, int64_t key, Range range, int64_t query,
                int64_t i, int64_t rows, const Rows& q, const Rows& dout) {
    const int64_t begin = range.begin, n = range.end - begin, columns = padded(n);
    const int height = static_cast<int>(rows);
    multiply(q, query + i, rows, f_.scale / scores.scale, query_rows_, keys_, width_,
             chain_of_scores<Word>(width_), begin, columns, scores_);
    multiply(dout, query + i, rows, 1.0f, dout_rows_, values_, value_words_, chain(value_words_),
             begin, columns, dscores_);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = row_index(scores.sequence, head, query + i + r);
      differentiate_row(scores, head, query + i + r, key + begin, n, columns,
                        lse(scores, head, query + i + r), p_.delta[at],
                        scores_ + r * kStride + begin, dscores_ + r * kStride + begin);
      for (int64_t j = 0; j < columns; j += Vec::kWidth)
        store_weights(as_words(dscore_rows_) + r * kStride + words<Word>(begin), j,
                      load(dscores_ + r * kStride + begin + j));
    }
    store_columns(scores_, i, rows, begin, columns, as_words(weight_columns_));
    store_columns(dscores_, i, rows, begin, columns, as_words(dscore_columns_));
    const Panels panels{key_panels_ + words<Word>(begin) * kPanel, words<Word>(kBlock) * kPanel,
                        kPanel};
    gemm(height, padded_ / kPanel, as_words(dscore_rows_) + words<Word>(begin), panels,
         words<Word>(n), kGradientChain, dq_, padded_, false);
    for (int64_t r = 0; r < rows; ++r)
      add(dq_ + r * padded_, p_.dq + row_index(scores.sequence, head, query + i + r) * f_.width,
          f_.width);
  }

  float lse(const Scores& scores, int64_t head, int64_t query) const {
    const Sequence& s = scores.sequence;
    const auto* data = reinterpret_cast<const float*>(f_.lse.data);
    return data[s.batch * f_.lse.stride[0] + head * f_.lse.stride[1] +
                (s.first_query + query) * f_.lse.stride[2]];
  }

  /// product[rows, columns] = times * rows of x, times the transposed panels from column `begin`
  /// on.
  void multiply(const Rows& x, int64_t first, int64_t rows, float times, float* buffer,
                const float* panels, int64_t depth, int64_t chain, int64_t begin, int64_t columns,
                float* product) {
    constexpr int64_t kElements = kDepth * kPerWord<Word>;
    for (int64_t d = 0; d < stretches(depth); ++d) {
      Word* tile = as_words(buffer) + d * kTileRows * kStride;
      for (int64_t r = 0; r < rows; ++r)
        pack_row(x, first + r, d * kElements, at_most(kElements, x.n - d * kElements), times,
                 tile + r * kStride);
      gemm(static_cast<int>(rows), columns / kPanel, tile,
           {panels + begin * depth + d * kDepth * kPanel, depth * kPanel, kPanel},
           at_most(kDepth, depth - d * kDepth), chain, product + begin, kStride, d > 0);
    }
  }

  /// s: products q k -> P;  ds: products dout v -> scale dS. Both 0 where the query does not see.
  void differentiate_row(const Scores& scores, int64_t head, int64_t query, int64_t key, int64_t n,
                         int64_t columns, float lse, float delta, float* s, float* ds) {
    scores.finish(query, key, n, s, bias_, derivative_);
    const bool dropout = f_.dropout.seed;
    if (dropout) scores.draw(query, key, columns, kept_);
    const Vec scale = set(scores.softmax_scale()), shift = set(lse == -INFINITY ? lse : -lse);
    for (int64_t j = 0; j < columns; j += Vec::kWidth) {
      const Vec weight = exp(fma(load(s + j), scale, shift)), zero = set(0.0f);
      store(s + j, weight);
      Vec dweight = load(ds + j);
      if (dropout) {
        const Vec kept = load(kept_ + j);
        store(s + j, weight * kept);
        dweight = where_less(zero, kept, dweight * kept, zero);
      }
      // Where the weight is 0, dP may be anything.
      store(ds + j, where_less(zero, abs(weight), weight * (dweight - set(delta)), weight));
    }
    if (p_.dposition_bias)
      sum_by_distance(ds, distances_.reach, key - scores.own(query), n,
                      sums_ + head % group_ * distances_.count);
    if (p_.dmask.data)
      write_span(ds,
                 rows_of(p_.dmask, scores.sequence.batch, head, 0, scores.sequence.queries,
                         scores.sequence.keys),
                 query, key, n);
    for (int64_t j = 0; j < columns; j += Vec::kWidth) {
      Vec v = load(ds + j) * set(f_.scale);
      if (f_.softcap != 0.0f) v = v * load(derivative_ + j);
      store(ds + j, v);
    }
  }

  /// rows of floats -> rows [i, i + rows) of a block of words whose columns are multiplied.
  static void store_columns(const float* from, int64_t i, int64_t rows, int64_t begin,
                            int64_t columns, float* to) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = begin; j < begin + columns; j += Vec::kWidth)
        store(to + (i + r) * kStride + j, load(from + r * kStride + j));
  }
#if defined(__AVX512BF16__)
  static void store_columns(const float* from, int64_t i, int64_t rows, int64_t begin,
                            int64_t columns, Pair* to) {
    for (int64_t r = 0; r < rows; r += 2)
      for (int64_t j = begin; j < begin + columns; j += Vec::kWidth) {
        const float* even = from + r * kStride + j;
        const auto half = [](const float* p) {
          return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load(p).v));
        };
        __m512i pair = half(even);
        if (r + 1 < rows) pair = _mm512_or_si512(pair, _mm512_slli_epi32(half(even + kStride), 16));
        _mm512_storeu_si512(to + (i + r) / 2 * kStride + j, pair);
      }
  }
#endif

  /// gemm by columns without 0 * inf and 0 * NaN.
  static void multiply_visible(int rows, int64_t panels, const Word* a, Panels b, int64_t depth,
                               int64_t, float* c, int64_t c_row, bool) {
    for (int i = 0; i < rows; ++i)
      for (int64_t d = 0; d < panels * kPanel; d += Vec::kWidth) {
        Vec sum = set(0.0f);
        for (int64_t j = 0; j < depth; ++j)
          sum = multiply_add_visible(a + j * kStride + i,
                                     b.data + d / kPanel * b.panel + j * b.row + d % kPanel, sum);
        float* to = c + i * c_row + d;
        store(to, load(to) + sum);
      }
  }

  const AttentionBackwardParams& p_;
  const AttentionParams& f_;
  const Distances distances_;
  int64_t* turns_;  // the steps of each block that are done
  float* parts_;    // [blocks of all, group, buckets]
  int64_t group_, width_, value_words_, padded_, value_padded_, size_;
  float *keys_, *values_, *key_panels_, *query_panels_, *dout_panels_, *query_rows_, *dout_rows_;
  float *scores_, *dscores_, *dscore_rows_, *weight_columns_, *dscore_columns_, *bias_,
      *derivative_, *kept_;
  double* sums_;  // of scores' gradients, by distance
  float *row_, *dq_, *dk_, *dv_, *group_dk_, *group_dv_;
};

/// Calls f(unit) for all units of at most `most` blocks, one after the other.
template <class F>
void for_units(const AttentionParams& p, int64_t most, const F& f) {
  int64_t number = 0;
  for (int64_t i = 0; i < p.sequences; ++i) {
    const Sequence s = sequence(p, i);
    const int64_t all = blocks(s.keys);
    for (int64_t head = 0; head < p.kv_heads; ++head, number += all)
      for (int64_t first = 0; first < all; first += at_most(most, all))
        f(Unit{s, head, first, at_most(most, all - first), number + first});
  }
}

/// The table's gradient: that of each block of keys, one after the other.
void sum_position_bias(const AttentionParams& p, const float* parts, float* dposition_bias) {
  const int64_t buckets = p.position_bias.table.count, group = p.heads / p.kv_heads;
  for_units(p, 1, [&](const Unit& unit) {
    for (int64_t h = unit.kv_head * group; h < (unit.kv_head + 1) * group; ++h)
      for (int64_t b = 0; b < buckets; ++b) dposition_bias[b * p.heads + h] += *parts++;
  });
}

template <class Word>
void run(const AttentionBackwardParams& p, int threads) {
  const AttentionParams& f = p.forward;
  int64_t all_blocks = 0;
  for_units(f, INT64_MAX, [&](const Unit& unit) { all_blocks += unit.blocks; });
  const int64_t buckets = p.dposition_bias ? f.position_bias.table.count : 0;
  const int64_t size_of_parts = f.heads / f.kv_heads * buckets;  // of a block
  const int64_t shared =
      padded(all_blocks * (2 + size_of_parts) + Distances::size(f.position_bias, farthest(f)));
  const int64_t size = AttentionBackward<Word>(p, {}, nullptr, nullptr, nullptr).size();
  float* scratch = scratch_floats(shared + threads * size);
  int64_t* turns = reinterpret_cast<int64_t*>(scratch);
  for (int64_t i = 0; i < all_blocks; ++i) turns[i] = 0;
  float* parts = scratch + 2 * all_blocks;
  const Distances by_distance =
      distances(f.position_bias, farthest(f), parts + all_blocks * size_of_parts);
  scratch += shared;

  // Where the cuts lie changes no bit.
  const int64_t most = f.sequences * f.kv_heads < 4 * threads ? 1 : INT64_MAX;
  int64_t next = 0;
  parallel(threads, [&](int t) {
    AttentionBackward<Word> attention(p, by_distance, scratch + t * size, turns, parts);
    int64_t number = 0, mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    for_units(f, most, [&](const Unit& unit) {
      if (number++ != mine) return;
      attention.differentiate(unit);
      mine = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
    });
  });
  if (p.dposition_bias) sum_position_bias(f, parts, p.dposition_bias);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, int threads) {
#if defined(__AVX512BF16__)
  if (p.forward.q.dtype == DType::bf16) return run<Pair>(p, threads);
#endif
  run<float>(p, threads);
}

}  // namespace warpformer::cpu::WF_ISA

// A unit is one key/value head of one sequence. Scores are computed anew, 60 queries and 256 keys
// at a time, and everything that reads them follows at once:
//
//   for 256 keys:               k, v --transpose--> panels for S and dP; k --copy--> panels for dq
//   (L2)
//     for a head of the group:
//       for 60 queries:         q, dout --> panels for dk and dv (L2)
//         for a tile of rows:   S = q k^T, dP = dout v^T                [rows of a tile, 256] (L1)
//                               P = exp(scale S - lse), dS = P (dP - delta)
//                               dq += dS k (L2)
//         for a tile of keys:   dv += P^T dout, dk += dS^T q (L2)
//
// Every sum has an order that follows from the sequence's length alone: blocks of keys (dq), heads
// of the group and blocks of queries (dk, dv), one after the other.
#include "attention/pack.h"
#include "attention/scores.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kBlock = kDepth;  // keys
constexpr int64_t kQueries = 60;    // a multiple of every ISA's tile
static_assert(kQueries % kTileRows == 0);

template <class Word>
class AttentionBackward {
 public:
  AttentionBackward(const AttentionBackwardParams& p, float* scratch)
      : p_(p), f_(p.forward), group_(f_.heads / f_.kv_heads) {
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
    row_ = take(2 * (padded_ > value_padded_ ? padded_ : value_padded_));
    dq_ = take(kTileRows * padded_);
    dk_ = take(kBlock * padded_);
    dv_ = take(kBlock * value_padded_);
    group_dk_ = take(group_ > 1 ? kBlock * padded_ : 0);
    group_dv_ = take(group_ > 1 ? kBlock * value_padded_ : 0);
    size_ = next - scratch;
  }
  int64_t size() const { return size_; }

  void differentiate(const Sequence& s, int64_t kv_head) {
    for (int64_t h = 0; h < group_; ++h) start(s, kv_head * group_ + h);
    const Rows k = rows_of(f_.k, s.batch, kv_head, s.first_key, s.keys, f_.width);
    const Rows v = rows_of(f_.v, s.batch, kv_head, s.first_key, s.keys, f_.value_width);
    const Rows dk = rows_of(p_.dk, s.batch, kv_head, s.first_key, s.keys, f_.width);
    const Rows dv = rows_of(p_.dv, s.batch, kv_head, s.first_key, s.keys, f_.value_width);
    for (int64_t key = 0; key < s.keys; key += kBlock) {
      const int64_t count = at_most(kBlock, s.keys - key);
      pack_keys<Word>(k, key, count, width_, row_, keys_);
      pack_keys<Word>(v, key, count, value_words_, row_, values_);
      // Where a key is not finite, dS is NaN if it is seen and 0 if not: 0 in its place serves
      // both.
      if (!pack_values(k, key, count, words<Word>(kBlock), row_, key_panels_, Word{}))
        clear_non_finite(key_panels_, words<Word>(kBlock) * padded_, Word{});
      for (int64_t h = 0; h < group_; ++h) {
        clear(dk_, count * padded_);
        clear(dv_, count * value_padded_);
        for (int64_t query = 0; query < s.queries; query += kQueries)
          add_queries(s, kv_head * group_ + h, key, count, query,
                      at_most(kQueries, s.queries - query));
        if (group_ == 1) break;
        add(dk_, group_dk_, count * padded_, h > 0);
        add(dv_, group_dv_, count * value_padded_, h > 0);
      }
      for (int64_t j = 0; j < count; ++j) {
        write_span((group_ == 1 ? dk_ : group_dk_) + j * padded_, dk, key + j, 0, f_.width);
        write_span((group_ == 1 ? dv_ : group_dv_) + j * value_padded_, dv, key + j, 0,
                   f_.value_width);
      }
    }
  }

 private:
  static void clear(float* p, int64_t n) {
    for (int64_t i = 0; i < n; ++i) p[i] = 0.0f;
  }
  static void add(const float* from, float* to, int64_t n, bool more) {
    for (int64_t i = 0; i < n; ++i) to[i] = more ? to[i] + from[i] : from[i];
  }
  static Word* as_words(float* p) { return reinterpret_cast<Word*>(p); }

  int64_t row_index(const Sequence& s, int64_t head, int64_t query) const {
    return (s.batch * f_.heads + head) * f_.queries + s.first_query + query;
  }

  /// delta of every row of a head, and dq = 0.
  void start(const Sequence& s, int64_t head) {
    const Rows out = rows_of(f_.out, s.batch, head, s.first_query, s.queries, f_.value_width);
    const Rows dout = rows_of(p_.dout, s.batch, head, s.first_query, s.queries, f_.value_width);
    const Rows dlse = rows_of(p_.dlse, s.batch, head, s.first_query, s.queries, 1);
    for (int64_t i = 0; i < s.queries; ++i) {
      const float* o = row_in(out, i, row_);
      const float* d = row_in(dout, i, row_ + value_padded_);
      Sum products;
      for_lanes(f_.value_width,
                [&](int64_t j, auto k) { products.add(load(o + j, k) * load(d + j, k)); });
      float gradient = 0.0f;
      if (dlse.data) read_span(dlse, i, 0, 1, &gradient);
      p_.delta[row_index(s, head, i)] = products.total() - gradient;
      clear(p_.dq + row_index(s, head, i) * f_.width, f_.width);
    }
  }

  /// The queries [query, query + count) of a head, count at most kQueries, with the keys
  /// [key, key + keys): adds to dq, dk_ and dv_.
  void add_queries(const Sequence& s, int64_t head, int64_t key, int64_t keys, int64_t query,
                   int64_t count) {
    const int64_t first = visible(f_, s, query).begin - key;
    const int64_t begin = first > 0 ? first / kPanel * kPanel : 0;
    const int64_t end = at_most(keys, visible(f_, s, query + count - 1).end - key);
    if (begin >= end) return;
    const Rows q = rows_of(f_.q, s.batch, head, s.first_query, s.queries, f_.width);
    const Rows dout = rows_of(p_.dout, s.batch, head, s.first_query, s.queries, f_.value_width);
    if (!pack_values(q, query, count, words<Word>(kQueries), row_, query_panels_, Word{}))
      clear_non_finite(query_panels_, words<Word>(kQueries) * padded_, Word{});
    const bool finite =
        pack_values(dout, query, count, words<Word>(kQueries), row_, dout_panels_, Word{});
    const Scores scores(f_, s, head);
    for (int64_t i = 0; i < count; i += kTileRows)
      add_tile(scores, head, key, {begin, end}, query, i, at_most(kTileRows, count - i), q, dout);

    const int64_t depth = words<Word>(count);
    const Panels outs{dout_panels_, words<Word>(kQueries) * kPanel, kPanel};
    const Panels queries{query_panels_, words<Word>(kQueries) * kPanel, kPanel};
    for (int64_t j = begin; j < end; j += kTileRows) {
      const int rows = static_cast<int>(at_most(kTileRows, end - j));
      const auto multiply = finite ? &gemm<Layout::columns, Word> : &multiply_visible;
      multiply(rows, value_padded_ / kPanel, as_words(weight_columns_) + j, outs, depth, kChain,
               dv_ + j * value_padded_, value_padded_, true);
      gemm<Layout::columns>(rows, padded_ / kPanel, as_words(dscore_columns_) + j, queries, depth,
                            kChain, dk_ + j * padded_, padded_, true);
    }
  }

  /// Rows [i, i + rows) of the block of queries at `query`.
  void add_tile(const Scores& scores, int64_t head, int64_t key, Range range, int64_t query,
                int64_t i, int64_t rows, const Rows& q, const Rows& dout) {
    const int64_t begin = range.begin, n = range.end - begin, columns = padded(n);
    const int height = static_cast<int>(rows);
    multiply(q, query + i, rows, f_.scale / scores.scale, query_rows_, keys_, width_, begin,
             columns, scores_);
    multiply(dout, query + i, rows, 1.0f, dout_rows_, values_, value_words_, begin, columns,
             dscores_);
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
         words<Word>(n), kChain, dq_, padded_, false);
    for (int64_t r = 0; r < rows; ++r)
      add(dq_ + r * padded_, p_.dq + row_index(scores.sequence, head, query + i + r) * f_.width,
          f_.width, true);
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
                const float* panels, int64_t depth, int64_t begin, int64_t columns,
                float* product) {
    constexpr int64_t kPerWord = __is_same(Word, float) ? 1 : 2;
    for (int64_t d = 0; d < stretches(depth); ++d) {
      Word* tile = as_words(buffer) + d * kTileRows * kStride;
      for (int64_t r = 0; r < rows; ++r)
        pack_row(x, first + r, d * kDepth * kPerWord,
                 at_most(kDepth * kPerWord, x.n - d * kDepth * kPerWord), times,
                 tile + r * kStride);
      gemm(static_cast<int>(rows), columns / kPanel, tile,
           {panels + begin * depth + d * kDepth * kPanel, depth * kPanel, kPanel},
           at_most(kDepth, depth - d * kDepth), chain(depth), product + begin, kStride, d > 0);
    }
  }

  /// s: products q k -> P;  ds: products dout v -> scale dS. Both 0 where the query does not see.
  void differentiate_row(const Scores& scores, int64_t head, int64_t query, int64_t key, int64_t n,
                         int64_t columns, float lse, float delta, float* s, float* ds) {
    scores.finish(query, key, n, s, bias_, derivative_);
    for (int64_t j = n; j < columns; ++j) s[j] = -INFINITY;
    const Vec scale = set(scores.softmax_scale()), shift = set(lse == -INFINITY ? lse : -lse);
    for (int64_t j = 0; j < columns; j += Vec::kWidth) {
      const Vec weight = exp(fma(load(s + j), scale, shift)), zero = set(0.0f);
      store(s + j, weight);
      // Where the weight is 0, dP may be anything.
      store(ds + j, where_less(zero, abs(weight), weight * (load(ds + j) - set(delta)), weight));
    }
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
  int64_t group_, width_, value_words_, padded_, value_padded_, size_;
  float *keys_, *values_, *key_panels_, *query_panels_, *dout_panels_, *query_rows_, *dout_rows_;
  float *scores_, *dscores_, *dscore_rows_, *weight_columns_, *dscore_columns_, *bias_,
      *derivative_;
  float *row_, *dq_, *dk_, *dv_, *group_dk_, *group_dv_;
};

template <class Word>
void run(const AttentionBackwardParams& p, int threads) {
  const int64_t size = AttentionBackward<Word>(p, nullptr).size();
  float* scratch = scratch_floats(threads * size);
  int64_t next = 0;
  const int64_t units = p.forward.sequences * p.forward.kv_heads;
  parallel(threads, [&](int t) {
    AttentionBackward<Word> attention(p, scratch + t * size);
    for (int64_t i; (i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < units;)
      attention.differentiate(sequence(p.forward, i / p.forward.kv_heads), i % p.forward.kv_heads);
  });
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, int threads) {
#if defined(__AVX512BF16__)
  if (p.forward.q.dtype == DType::bf16) return run<Pair>(p, threads);
#endif
  run<float>(p, threads);
}

}  // namespace warpformer::cpu::WF_ISA

// The tiles of queries of cuda_sm90.cu and what they see; and values that are not finite. A key
// that a row does not see has the weight 0, and 0 times NaN is NaN: where a tile holds such keys,
// clean() makes zeros of these values first, and attend_row() gives rows that do see them their
// due.
#pragma once

#include "attention/cuda_scores.cuh"

namespace warpformer::cuda::sm90 {

using attend::kInfinity, attend::kLog2E, attend::Order, attend::order_of, attend::Place,
    attend::place, attend::Range, attend::Sequence;

constexpr int kRows = 128, kKeys = 128;  // of a tile

/// A tile of 128 queries of a head, from `row` of the sequence on.
struct Queries {
  const AttentionParams& p;
  Sequence s;
  int head, row;
  int left, right;  // query i sees keys i - left .. i + right

  DEVICE Queries(const AttentionParams& p, const Place& at)
      : p(p), s(at.sequence), head(at.head), row(at.tile * kRows) {
    const int shift = p.bottom_right ? s.keys - s.queries : 0, reach = s.queries + s.keys;
    left = (p.left < reach ? static_cast<int>(p.left) : reach) - shift;
    right = (p.right < reach ? static_cast<int>(p.right) : reach) + shift;
  }

  DEVICE Range seen(int query) const {
    const int begin = query - left, end = query + right + 1;
    return {begin > 0 ? begin : 0, end < s.keys ? end : s.keys};
  }
  /// Tiles of keys that it meets: last .. first, none if last < first.
  DEVICE int first() const { return seen(row).begin / kKeys; }
  DEVICE int last() const {
    const int end = seen(row + kRows < s.queries ? row + kRows - 1 : s.queries - 1).end;
    return end > 0 ? (end - 1) / kKeys : -1;
  }
  DEVICE int kv_head() const { return head / static_cast<int>(p.heads / p.kv_heads); }

  /// Whether 128 keys from `key` on hold some that one of the queries [from, from + count) does not
  /// see. For a warp.
  DEVICE bool hides(int key, int from, int count) const {
    if (key < seen(from + count - 1).begin || key + kKeys > seen(from).end) return true;
    bool kept = true;
    if (p.mask.data)
      for (int i = lane_index(); i < kKeys; i += kWarp) kept &= keeps(key + i);
    return !all(kept);
  }
  /// Whether a mask of keys keeps one.
  DEVICE bool keeps(int key) const {
    return load(reinterpret_cast<const bool*>(p.mask.data) + s.batch * p.mask.stride[0] +
                key * p.mask.stride[3]);
  }
};

template <class T>
DEVICE T* row_of(const Heads& x, int64_t batch, int64_t head, int64_t row) {
  return reinterpret_cast<T*>(x.data) + batch * x.stride[0] + head * x.stride[1] +
         row * x.stride[2];
}

/// Makes zeros of what is not finite in `count` values of a tile, of which this thread takes every
/// `threads`-th 16 bytes from `thread` on; returns whether there was any.
template <class T>
DEVICE bool clean(Shared<T> tile, int count, int thread, int threads) {
  bool found = false;
#pragma unroll 1
  for (int i = thread * Vector<T>::size; i < count; i += threads * Vector<T>::size) {
    Vector<T> values = tile.load16(i);
    bool here = false;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j)
      if (!is_finite(values[j])) values[j] = T{}, here = true;
    if (here) tile.store16(i, values);
    found |= here;
  }
  return found;
}

/// The values of a row of out that are not finite, from the keys that it sees, one by one. This
/// thread has the columns first, first + 1, then those 8 further, and so on: at most `count`.
template <class T, int count>
DEVICE void attend_row(const Queries& queries, int row, int first) {
  const AttentionParams& p = queries.p;
  const Sequence& s = queries.s;
  const T* q = row_of<T>(p.q, s.batch, queries.head, s.first_query + row);
  T* out = row_of<T>(p.out, s.batch, queries.head, s.first_query + row);
  const Range seen = queries.seen(row);
  float top = p.sinks ? load(p.sinks + queries.head) : -kInfinity, total = 0.0f;
  float sums[count];
#pragma unroll 1
  for (int i = 0; i < count; ++i) sums[i] = 0.0f;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // for the highest score, and for the sums
    if (pass == 1 && p.sinks) total = exp(load(p.sinks + queries.head) - top);
#pragma unroll 1
    for (int key = seen.begin; key < seen.end; ++key) {
      if (p.mask.data && !queries.keeps(key)) continue;
      const T* k = row_of<T>(p.k, s.batch, queries.kv_head(), s.first_key + key);
      float score = 0.0f;
#pragma unroll 1
      for (int64_t i = 0; i < p.width; ++i)
        score = fma(to_float(load(q + i * p.q.stride[3])), to_float(load(k + i * p.k.stride[3])),
                    score);
      score *= p.scale;
      if (pass == 0) {
        top = max(top, score);
        continue;
      }
      const float weight = exp(score - top);
      total += weight;
      const T* v = row_of<T>(p.v, s.batch, queries.kv_head(), s.first_key + key);
#pragma unroll 1
      for (int i = 0; i < count && first + i / 2 * 8 + i % 2 < p.value_width; ++i)
        sums[i] =
            fma(weight, to_float(load(v + (first + i / 2 * 8 + i % 2) * p.v.stride[3])), sums[i]);
    }
  }
#pragma unroll 1
  for (int i = 0; i < count && first + i / 2 * 8 + i % 2 < p.value_width; ++i)
    if (!is_finite(sums[i]))
      store(out + (first + i / 2 * 8 + i % 2) * p.out.stride[3], from_float<T>(sums[i] / total));
}

}  // namespace warpformer::cuda::sm90

// What attention's kernels share: where a sequence lies, what a query sees, and how a row of
// products q k becomes scores. Included by cpu files only.
#pragma once

#include "attention/op.h"
#include "core/gemm.h"
#include "core/philox.h"

namespace warpformer::cpu::WF_ISA {

/// Where a sequence lies in the operands.
struct Sequence {
  int64_t number, batch, first_query, queries, first_key, keys;
};

inline Sequence sequence(const AttentionParams& p, int64_t i) {
  if (!p.cu_seqlens_q) return {i, i, 0, p.queries, 0, p.keys};
  return {i,
          0,
          p.cu_seqlens_q[i],
          p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i],
          p.cu_seqlens_k[i],
          p.cu_seqlens_k[i + 1] - p.cu_seqlens_k[i]};
}

/// Rows [first, first + count) of one head of one batch.
inline Rows rows_of(const Heads& t, int64_t batch, int64_t head, int64_t first, int64_t count,
                    int64_t width) {
  Rows r;
  const int64_t at = batch * t.stride[0] + head * t.stride[1] + first * t.stride[2];
  r.data = t.data ? t.data + at * t.size : nullptr;
  r.dtype = t.dtype;
  r.n = width;
  r.step = t.stride[3];
  r.count = count;
  r.ndim = 1;
  r.shape[0] = count;
  r.stride[0] = t.stride[2];
  return r;
}

struct Range {
  int64_t begin, end;
};

/// No key is farther from a query than this.
inline int64_t farthest(const AttentionParams& p) { return p.queries + p.keys; }

/// The keys that a query of the sequence sees, mask aside.
inline Range visible(const AttentionParams& p, const Sequence& s, int64_t query) {
  const int64_t own = query + (p.bottom_right ? s.keys - s.queries : 0);
  const int64_t begin = own - p.left > 0 ? own - p.left : 0;
  const int64_t end = own >= s.keys - 1 - p.right ? s.keys : own + p.right + 1;
  return {begin, end > begin ? end : begin};
}

/// What both see.
inline Range common(const Range& a, const Range& b) {
  return {a.begin > b.begin ? a.begin : b.begin, at_most(a.end, b.end)};
}

/// Of key padding, a mask that all heads and queries share: the keys from the first to the last one
/// that it keeps.
inline Range unpadded(const AttentionParams& p, const Sequence& s) {
  Range kept{0, s.keys};
  const Heads& mask = p.mask;
  if (!mask.data || mask.dtype != DType::boolean || mask.stride[1] || mask.stride[2]) return kept;
  const bool* keep = reinterpret_cast<const bool*>(mask.data) + s.batch * mask.stride[0];
  while (kept.end > 0 && !keep[(kept.end - 1) * mask.stride[3]]) --kept.end;
  while (kept.begin < kept.end && !keep[kept.begin * mask.stride[3]]) ++kept.begin;
  return kept;
}

/// s[begin, end) = -inf, `end` a multiple of 16: by whole registers, as one that is stored in part
/// and then read whole waits for its memory.
inline void hide(float* s, int64_t begin, int64_t end) {
  int64_t j = begin / Vec::kWidth * Vec::kWidth;
  if (j < begin) {
    store(s + j, pad(load(s + j), Tail{begin - j}, -INFINITY));
    j += Vec::kWidth;
  }
  for (; j < end; j += Vec::kWidth) store(s + j, set(-INFINITY));
}

/// The rows of scores of one head, and what they go through.
struct Scores {
  const AttentionParams& p;
  Sequence sequence;
  int64_t head;
  Rows mask;
  float slope;
  const float* position_bias;  // by distance, null where there are none
  int64_t reach;
  float
      scale;  // positive: its sign is in q, so that -inf stands for an unseen score before scaling
  bool is_scaled;  // by finish(): because something is added to scaled scores

  Scores(const AttentionParams& p, const Sequence& s, int64_t head, const Distances& distances)
      : p(p),
        sequence(s),
        head(head),
        mask(rows_of(p.mask, s.batch, head, 0, s.queries, s.keys)),
        slope(p.slopes ? p.slopes[head] : 0.0f),
        position_bias(distances.bias ? distances.bias + head * distances.count : nullptr),
        reach(distances.reach),
        scale(p.scale > 0.0f   ? p.scale
              : p.scale < 0.0f ? -p.scale
                               : 1.0f),
        is_scaled(p.softcap != 0.0f || p.slopes || position_bias ||
                  (mask.data && mask.dtype != DType::boolean)) {}

  /// The key at distance 0 of a query.
  int64_t own(int64_t query) const {
    return query + (p.bottom_right ? sequence.keys - sequence.queries : 0);
  }

  /// What the dropout multiplies the weights of n keys by, `key` a multiple of 4.
  void draw(int64_t query, int64_t key, int64_t n, float* kept) const {
    const Draw& d = p.dropout;
    warpformer::cpu::WF_ISA::draw(
        d, static_cast<uint64_t>(query) << 32 | static_cast<uint64_t>(key / 4),
        static_cast<uint64_t>(sequence.number) << 32 | static_cast<uint64_t>(head), n, kept);
  }

  /// What the softmax still multiplies by.
  float softmax_scale() const { return is_scaled ? 1.0f : scale; }

  /// s[0, n): products of query and the keys from `key` on -> scores, -inf where not seen, even if
  /// s is NaN, and up to padded(n). `bias` has room for n floats. With a softcap, `derivative` (if
  /// given) gets its own.
  void finish(int64_t query, int64_t key, int64_t n, float* s, float* bias,
              float* derivative = nullptr) const {
    if (is_scaled) add_biases(query, key, n, s, bias, derivative);
    if (mask.data && mask.dtype == DType::boolean) {
      const bool* kept =
          static_cast<const bool*>(mask.data) + query * mask.stride[0] + key * mask.step;
      if (mask.step == 1) {
        for_lanes(n, [&](int64_t j, auto k) {
          store(s + j, where(kept + j, k, load(s + j, k), set(-INFINITY)), k);
        });
      } else {
        for (int64_t j = 0; j < n; ++j) s[j] = kept[j * mask.step] ? s[j] : -INFINITY;
      }
    }
    const Range seen = visible(p, sequence, query);
    for (int64_t j = 0; j < at_most(n, seen.begin - key); ++j) s[j] = -INFINITY;
    hide(s, seen.end > key ? at_most(n, seen.end - key) : 0, padded(n));
  }

 private:
  void add_biases(int64_t query, int64_t key, int64_t n, float* s, float* bias,
                  float* derivative) const {
    const float cap = p.softcap;
    for_lanes(n, [&](int64_t j, auto k) {
      Vec v = load(s + j, k) * set(scale);
      if (cap != 0.0f) {
        const Vec t = tanh(v / set(cap));
        v = t * set(cap);
        if (derivative) store(derivative + j, fma(set(0.0f) - t, t, set(1.0f)), k);
      }
      store(s + j, v, k);
    });
    if (p.slopes) {
      const int64_t same = own(query) - key;
      for (int64_t j = 0; j < n; ++j)
        s[j] -= slope * static_cast<float>(j > same ? j - same : same - j);
    }
    if (position_bias) add_position_bias(position_bias, reach, key - own(query), n, s);
    if (mask.data && mask.dtype != DType::boolean) {
      read_span(mask, query, key, n, bias);
      for_lanes(n, [&](int64_t j, auto k) {
        const Vec b = load(bias + j, k);
        store(s + j, where_less(b, set(-__FLT_MAX__), b, load(s + j, k) + b), k);
      });
    }
  }
};

}  // namespace warpformer::cpu::WF_ISA

// What attention's kernels share: where a sequence lies, what a query sees, and how products q k
// become scores. The CPU's twin is scores.h.
#pragma once

#include "attention/cuda_tiles.cuh"
#include "attention/op.h"
#include "core/cuda/activation.cuh"
#include "core/cuda/philox.cuh"
#include "core/cuda/position_bias.cuh"

namespace warpformer::cuda::attend {

constexpr float kInfinity = __builtin_inff();
constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.6931471805599453;

struct Sequence {
  int number, batch, first_query, first_key, queries, keys;
};

/// Of packed sequences a GPU's memory holds the beginnings: they are kept within the operands.
DEVICE int beginning(const int32_t* starts, int64_t i, int64_t total) {
  const int32_t at = load(starts + i);
  return at < 0 ? 0 : at > total ? static_cast<int>(total) : at;
}
DEVICE Sequence sequence(const AttentionParams& p, int64_t i) {
  const int number = static_cast<int>(i);
  if (!p.cu_seqlens_q)
    return {number, number, 0, 0, static_cast<int>(p.queries), static_cast<int>(p.keys)};
  const int q = beginning(p.cu_seqlens_q, i, p.queries);
  const int k = beginning(p.cu_seqlens_k, i, p.keys);
  const int queries = beginning(p.cu_seqlens_q, i + 1, p.queries) - q;
  const int keys = beginning(p.cu_seqlens_k, i + 1, p.keys) - k;
  return {number, 0, q, k, queries > 0 ? queries : 0, keys > 0 ? keys : 0};
}

/// The order of a grid's blocks. A section of heads, whose keys and values fit the second-level
/// cache together, is done before the next one; within it the last tiles come first, which see most
/// where attention is causal. Packed sequence i has the tiles from starts[i] / rows + i on, enough
/// for any length; those past its end stay empty.
struct Order {
  int64_t tiles, heads, section;  // tiles of a head; heads of all batches; heads of a section
};
struct Place {
  Sequence sequence;
  int head, tile;
  bool exists;
};

/// The `index`-th of tiles of `rows` queries or, `by_keys`, keys; then heads are those of keys.
DEVICE Place place(const AttentionParams& p, const Order& order, bool by_keys, int rows,
                   int64_t index) {
  const int32_t* starts = by_keys ? p.cu_seqlens_k : p.cu_seqlens_q;
  const int64_t total = by_keys ? p.keys : p.queries, per_batch = by_keys ? p.kv_heads : p.heads;
  const int64_t in_section = order.tiles * order.section, section = index / in_section;
  const int64_t first = section * order.section, within = index % in_section;
  const int64_t heads = first + order.section > order.heads ? order.heads - first : order.section;
  const int64_t head = first + within % heads, tile = order.tiles - 1 - within / heads;
  if (!starts)
    return {sequence(p, head / per_batch), static_cast<int>(head % per_batch),
            static_cast<int>(tile), true};
  int64_t low = 0, high = p.sequences - 1;
  while (low < high) {  // the last one whose tiles begin at or before this one
    const int64_t middle = (low + high + 1) / 2;
    if (beginning(starts, middle, total) / rows + middle <= tile) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int64_t own = tile - beginning(starts, low, total) / rows - low;
  return {sequence(p, low), static_cast<int>(head), static_cast<int>(own), own >= 0};
}
inline Order order_of(const AttentionParams& p, bool by_keys, int rows) {
  constexpr int64_t kCache = 16 << 20;  // bytes, of those of the second-level cache
  const int64_t n = by_keys ? p.keys : p.queries, other = by_keys ? p.queries : p.keys;
  const int64_t heads = by_keys ? p.kv_heads : p.heads;
  const int64_t tiles = p.cu_seqlens_q ? n / rows + p.sequences : (n + rows - 1) / rows;
  const int64_t bytes = other * (p.width + p.value_width) * p.q.size + 1;
  const int64_t all = p.cu_seqlens_q ? heads : heads * p.sequences;
  const int64_t section = kCache / bytes;
  return {tiles, all, section < 1 ? 1 : section < all ? section : all > 0 ? all : 1};
}

struct Range {
  int begin, end;
};
/// The keys that a query of the sequence sees, mask aside; none where a tile is longer than it.
DEVICE Range visible(const AttentionParams& p, const Sequence& s, int query) {
  if (query >= s.queries) return {0, 0};
  const int64_t own = query + (p.bottom_right ? s.keys - s.queries : 0);
  const int64_t begin = own - p.left, end = own + p.right + 1;
  const int from = begin < 0 ? 0 : begin > s.keys ? s.keys : static_cast<int>(begin);
  const int to = end > s.keys ? s.keys : end < 0 ? 0 : static_cast<int>(end);
  return {from, to > from ? to : from};
}

/// The scores of one head, and what they go through.
struct Scores {
  const AttentionParams& p;
  const Sequence& s;
  int head;
  float scale;   // of the softmax: positive, 1 where scaled scores have something added
  float factor;  // what products are multiplied by before, in a special kernel
  bool is_scaled;

  DEVICE Scores(const AttentionParams& p, const Sequence& s, int head) : p(p), s(s), head(head) {
    is_scaled = p.softcap != 0.0f || p.slopes || p.position_bias.table.data ||
                (p.mask.data && p.mask.dtype != DType::boolean);
    const float positive = p.scale > 0.0f ? p.scale : p.scale < 0.0f ? -p.scale : 1.0f;
    scale = is_scaled ? 1.0f : positive;
    factor = is_scaled ? p.scale : p.scale / positive;
  }

  /// Products of the queries from `query` and the keys from `key` on -> scores, before they are
  /// scaled, -inf where not seen, even if they are NaN. Rows are queries or, kByKeys, keys. With a
  /// softcap, `derivative` (if given) gets its own.
  template <bool kSpecial, bool kByKeys = false, int kBlocks, int kCount>
  DEVICE void finish(float (&x)[kBlocks][kCount][4], int query, int key, bool all_seen,
                     float (*derivative)[kCount][4] = nullptr) const {
    if constexpr (kSpecial) add_biases<kByKeys>(x, query, key, derivative);
    if (all_seen) return;
    if constexpr (kByKeys) {
      const int first = key + lane_index() / 4;
#pragma unroll
      for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const Range seen = visible(p, s, query + 8 * n + 2 * (lane_index() % 4) + e);
#pragma unroll
          for (int m = 0; m < kBlocks; ++m)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int j = first + 16 * m + 8 * h;
              if (j < seen.begin || j >= seen.end) x[m][n][2 * h + e] = -kInfinity;
            }
        }
      return;
    }
    each_row<kBlocks>([&](int m, int h, int row) {
      const Range seen = visible(p, s, query + row);
      const int first = key + 2 * (lane_index() % 4);
#pragma unroll
      for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = first + 8 * n + e;
          if (j < seen.begin || j >= seen.end) x[m][n][2 * h + e] = -kInfinity;
        }
    });
  }

  /// Weights of the same queries and keys -> those that a dropout leaves. Neighbouring lanes hold
  /// the two halves of a counter's words; each draws for one of their two rows.
  template <int kBlocks, int kCount>
  DEVICE void drop(float (&x)[kBlocks][kCount][4], int query, int key) const {
    const auto seed = static_cast<uint64_t>(load(p.dropout.seed));
    const uint64_t high = upper_counter();
    const int odd = lane_index() % 2;
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int n = 0; n < kCount; ++n) {
        const int row = query + 16 * m + 8 * odd + lane_index() / 4;
        const int quad = key / 4 + 2 * n + lane_index() % 4 / 2;
        uint32_t words[4];
        philox(seed, static_cast<uint64_t>(row) << 32 | static_cast<uint32_t>(quad), high, words);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint32_t other = shuffle_xor(odd ? words[e] : words[2 + e], 1);
          x[m][n][e] = kept(odd ? other : words[e], x[m][n][e]);
          x[m][n][2 + e] = kept(odd ? words[2 + e] : other, x[m][n][2 + e]);
        }
      }
  }

  /// The same for two arrays whose rows are keys: a word of four of each counter.
  template <int kBlocks, int kCount>
  DEVICE void drop_by_keys(float (&x)[kBlocks][kCount][4], float (&y)[kBlocks][kCount][4],
                           int query, int key) const {
    const auto seed = static_cast<uint64_t>(load(p.dropout.seed));
    const uint64_t high = upper_counter();
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int j = key + 16 * m + 8 * (e / 2) + lane_index() / 4;
          const int i = query + 8 * n + 2 * (lane_index() % 4) + e % 2;
          uint32_t words[4];
          philox(seed, static_cast<uint64_t>(i) << 32 | static_cast<uint32_t>(j / 4), high, words);
          const uint32_t pair[2] = {j % 2 ? words[1] : words[0], j % 2 ? words[3] : words[2]};
          const uint32_t word = j % 4 < 2 ? pair[0] : pair[1];
          x[m][n][e] = kept(word, x[m][n][e]);
          y[m][n][e] = kept(word, y[m][n][e]);
        }
  }

 private:
  /// Of the dropout's Philox: the sequence and the head.
  DEVICE uint64_t upper_counter() const {
    return static_cast<uint64_t>(s.number) << 32 | static_cast<uint64_t>(head);
  }
  DEVICE float kept(uint32_t word, float x) const {
    return word >= p.dropout.threshold ? x * p.dropout.scale : 0.0f;
  }

  template <bool kByKeys, int kBlocks, int kCount>
  DEVICE void add_biases(float (&x)[kBlocks][kCount][4], int query, int key,
                         float (*derivative)[kCount][4]) const {
    const auto each_pair = [&](auto f) {  // f(score, query, key)
      each_element(x, [&](float& v, int r, int c) {
        kByKeys ? f(v, query + c, key + r) : f(v, query + r, key + c);
      });
    };
    const int shift = p.bottom_right ? s.keys - s.queries : 0;
    if (factor != 1.0f) each_element(x, [&](float& v, int, int) { v *= factor; });
    if (p.softcap != 0.0f) {
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int n = 0; n < kCount; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float t = lane::tanh(x[m][n][e] / p.softcap);
            x[m][n][e] = t * p.softcap;
            if (derivative) derivative[m][n][e] = fma(-t, t, 1.0f);
          }
    }
    if (p.slopes) {
      const float slope = load(p.slopes + head);
      each_pair([&](float& v, int i, int j) {
        const int distance = j - (i + shift);
        v -= slope * static_cast<float>(distance < 0 ? -distance : distance);
      });
    }
    if (p.position_bias.table.data) {
      const int reach = static_cast<int>(p.reach);
      const float* biases = p.biases + head * (2 * p.reach + 1) + reach;
      each_pair([&](float& v, int i, int j) {
        const int distance = j - (i + shift);
        v += load(biases + (distance < -reach ? -reach : distance > reach ? reach : distance));
      });
    }
    const Heads& mask = p.mask;
    if (!mask.data) return;
    const int64_t first = s.batch * mask.stride[0] + head * mask.stride[1];
    const auto each = [&](auto type, auto f) {
      using M = decltype(type);
      const M* from = reinterpret_cast<const M*>(mask.data) + first;
      each_pair([&](float& v, int i, int j) {
        if (i < s.queries && j < s.keys) f(v, load(from + i * mask.stride[2] + j * mask.stride[3]));
      });
    };
    const auto add = [](float& v, auto bias) {
      const float b = to_float(bias);
      v = b < -3.40282347e38f ? b : v + b;
    };
    if (mask.dtype == DType::boolean)
      each(bool{}, [](float& v, bool keep) { v = keep ? v : -kInfinity; });
    if (mask.dtype == DType::f32) each(float{}, add);
    if (mask.dtype == DType::bf16) each(bf16{}, add);
    if (mask.dtype == DType::f16) each(f16{}, add);
  }
};

/// Whether anything but ranges is done to scores.
inline bool is_special(const AttentionParams& p) {
  return p.mask.data || p.slopes || p.position_bias.table.data || p.softcap != 0.0f ||
         p.dropout.seed || p.scale <= 0.0f;
}

}  // namespace warpformer::cuda::attend

// Forward. A block of four warps takes a tile of queries of one head, and passes over the keys that
// they see. Keys and values have one buffer each: one is filled while the other is multiplied.
//
//   q tile -> shared, once
//   for each tile of keys:
//     k is there;  v is copied meanwhile     S = q k^T            (mma, registers)
//                                            S + biases, row maximum m, P = exp2(c S - c m), l += P
//                                            o = o exp2(c m_old - c m)
//     v is there;  the next k meanwhile      o += P v
//   out = o / l, through the rows of q in shared memory
//
// A warp has 32 rows or, where registers do not last, 16. P is the A operand of the second product
// as it lies in the registers of the first one. Rows wider than a tile are multiplied in parts;
// each part of the columns of v has blocks of its own.
//
// What is not finite in v reaches rows that do not see it, as 0 times it is NaN. Should a row not
// be finite in the end, the tile is done again with zeros in place of such values, and then once
// for those that are +inf or NaN and once for -inf or NaN, with 1 in their place: a row sees one
// where the sum is above 0.
#include "attention/cuda_scores.cuh"
#include "attention/cuda_sm90.h"
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"

namespace warpformer::cuda {
namespace {

using namespace attend;

template <class T, int kWidth, bool kSpecial>
struct Shape {
  static constexpr bool half = sizeof(T) == 2;
  static constexpr int blocks = half && kWidth <= 128 && !kSpecial ? 2 : 1;
  static constexpr int rows = 16 * blocks * kWarps;
  static constexpr int keys = !half ? 16 : kWidth == 256 ? 32 : 64;
  using Queries = Tile<T, rows, kWidth>;
  using Keys = Tile<T, keys, kWidth>;
  static constexpr int bytes = Queries::kBytes + 2 * Keys::kBytes;
};

enum Pass { kFast, kFinite, kHigh, kLow };

/// Values of a tile -> what `pass` takes in their place.
template <class T, class Values>
DEVICE void replace(const Values& v, int pass) {
  v.each_chunk([&](int, int, Shared<T> chunk) {
    Vector<T> x = chunk.load16();
#pragma unroll
    for (int i = 0; i < Values::kChunk; ++i) {
      const float value = to_float(x[i]);
      const bool finite = value - value == 0.0f;
      const bool mine = pass == kHigh ? !finite && !(value < 0.0f) : !finite && !(value > 0.0f);
      if (pass != kFinite) {
        x[i] = from_float<T>(mine ? 1.0f : 0.0f);
      } else if (!finite) {
        x[i] = T{};
      }
    }
    chunk.store16(0, x);
  });
}

/// The warp's rows of o, which lie in its rows of the tile -> out.
template <class T, class Tile>
DEVICE void write_rows(const Tile& o, int row, int rows, const Source<T>& out, int query,
                       int column, int pass) {
  for (int i = lane_index(); i < rows * Tile::kChunks; i += kWarp) {
    const int r = row + i / Tile::kChunks, chunk = i % Tile::kChunks;
    const int c = column + chunk * Tile::kChunk;
    if (query + r >= out.count || c >= out.width) continue;
    T* to = out.data + (query + r) * out.stride + c * out.step;
    const Vector<T> x = o.at(r, chunk).load16();
    if (out.is_vector && pass <= kFinite) {
      store16(to, x);
      continue;
    }
    for (int j = 0; j < Tile::kChunk && c + j < out.width; ++j) {
      T* at = to + j * out.step;
      if (pass <= kFinite) {
        store(at, x[j]);
      } else if (to_float(x[j]) > 0.0f) {
        const float infinite = pass == kHigh ? kInfinity : -kInfinity;
        store(at, from_float<T>(to_float(load(at)) + infinite));
      }
    }
  }
}

template <class T, int kWidth, bool kSpecial>
KERNEL(kThreads, 2)
attention_kernel(AttentionParams p, Order order) {
  using Shape = Shape<T, kWidth, kSpecial>;
  constexpr int kBlocks = Shape::blocks, kCount = Shape::keys / 8, kColumns = kWidth / 8;
  const Place at = place(p, order, false, Shape::rows, block_index());
  const Sequence& seq = at.sequence;
  const int query = at.tile * Shape::rows, column = static_cast<int>(block_index_y()) * kWidth;
  if (!at.exists || query >= seq.queries) return;
  const int kv_head = static_cast<int>(at.head / (p.heads / p.kv_heads));
  const int width = static_cast<int>(p.width), value_width = static_cast<int>(p.value_width);
  const typename Shape::Queries q_tile{shared_memory<T>()};
  const typename Shape::Keys k_tile{shared_memory<T>(Shape::Queries::kBytes)};
  const typename Shape::Keys v_tile{shared_memory<T>(Shape::Queries::kBytes + Shape::Keys::kBytes)};
  const int row = warp_index() * 16 * kBlocks;  // of this warp, in the tile

  const int last = query + Shape::rows < seq.queries ? query + Shape::rows - 1 : seq.queries - 1;
  const Range first_sees = visible(p, seq, query), last_sees = visible(p, seq, last);
  const int begin = first_sees.begin / Shape::keys * Shape::keys, end = last_sees.end;
  const Scores scores(p, seq, at.head);
  const float c = scores.scale * kLog2E;
  // Where something was added to scaled scores, the maximum is subtracted before the product with
  // c: exact for it, and no overflow whatever a mask holds.
  const bool shifts = kSpecial && scores.is_scaled;

  // Addresses are computed anew for each tile, or they would take the registers of o.
  const auto load_queries = [&](int d) {
    q_tile.load(Source<T>(p.q, seq.batch, at.head, seq.first_query, seq.queries, width), query, d);
  };
  const auto load_keys = [&](int key, int d) {
    const int head = opaque(kv_head);
    k_tile.load(Source<T>(p.k, seq.batch, head, seq.first_key, seq.keys, width), key, d);
  };
  const auto load_values = [&](int key) {
    const int head = opaque(kv_head);
    v_tile.load(Source<T>(p.v, seq.batch, head, seq.first_key, seq.keys, value_width), key, column);
  };

#pragma unroll 1
  for (int pass = kFast; pass <= kLow; ++pass) {
    float o[kBlocks][kColumns][4] = {}, high[kBlocks][2], total[kBlocks][2] = {};
    each_row<kBlocks>([&](int m, int h, int) { high[m][h] = -kInfinity; });
    if (begin < end) {
      load_queries(0);
      load_keys(begin, 0);
    }
    copy_async_commit();
#pragma unroll 1
    for (int key = begin; key < end; key += Shape::keys) {
      copy_async_wait<0>();
      sync_block();
      load_values(key);
      copy_async_commit();
      float s[kBlocks][kCount][4] = {};
#pragma unroll 1
      for (int d = 0;;) {
        multiply_rows<T>(s, q_tile, row, k_tile);
        d += kWidth;
        if (d >= width) break;
        sync_block();
        load_queries(d);
        load_keys(key, d);
        copy_async_commit();
        copy_async_wait<0>();
        sync_block();
      }
      const bool all_seen = key >= last_sees.begin && key + Shape::keys <= first_sees.end;
      scores.finish<kSpecial>(s, query + row, key, all_seen);
      each_row<kBlocks>([&](int m, int h, int) {
        float top = high[m][h];
#pragma unroll
        for (int n = 0; n < kCount; ++n) top = max(top, max(s[m][n][2 * h], s[m][n][2 * h + 1]));
        top = max(top, shuffle_xor(top, 1));
        top = max(top, shuffle_xor(top, 2));
        const float finite = top == -kInfinity ? 0.0f : top;
        const float before = shifts ? finite : 0.0f, after = shifts ? 0.0f : finite * c;
        const float rescale = high[m][h] == -kInfinity ? 0.0f
                              : shifts                 ? exp2_approx((high[m][h] - finite) * c)
                                                       : exp2_approx(high[m][h] * c - after);
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < kCount; ++n)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            if constexpr (kSpecial) s[m][n][e] -= before;
            s[m][n][e] = exp2_approx(fma(s[m][n][e], c, -after));
            sum += s[m][n][e];
          }
        high[m][h] = top;
        total[m][h] = total[m][h] * rescale + sum;
#pragma unroll
        for (int n = 0; n < kColumns; ++n)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) o[m][n][e] *= rescale;
      });
      if constexpr (kSpecial) {
        if (p.dropout.seed) scores.drop(s, query + row, key);
      }
      const Weights<T, kBlocks, kCount> weights(s);
      copy_async_wait<0>();
      sync_block();
      if (key + Shape::keys < end) {
        if (width > kWidth) load_queries(0);
        load_keys(key + Shape::keys, 0);
      }
      copy_async_commit();
      if (pass != kFast) {
        replace<T>(v_tile, pass);
        sync_block();
      }
      multiply_weights(o, weights, v_tile);
    }
    copy_async_wait<0>();

    // Lane i of four ends row i of those that they share.
    const int mine = lane_index() % 4;
    float sum = 0.0f, top = -kInfinity;
    each_row<kBlocks>([&](int m, int h, int) {
      float all = total[m][h];
      all += shuffle_xor(all, 1);
      all += shuffle_xor(all, 2);
      if (mine % (2 * kBlocks) == 2 * m + h) sum = all, top = high[m][h];
    });
    // The logarithm of what was divided by, rounded once.
    double base = shifts ? static_cast<double>(top) : static_cast<double>(top * c) * kLn2;
    float factor = 1.0f;
    if (p.sinks && sum != 0.0f) {
      const float sink = load(p.sinks + at.head);
      const double higher = sink > base ? sink : base;
      factor = exp(static_cast<float>(base - higher));
      base = higher;
      sum = sum * factor + exp(static_cast<float>(sink - higher));
    }
    const int own = query + row + 8 * mine + lane_index() / 4;
    if (p.lse.data && pass <= kFinite && column == 0 && mine < 2 * kBlocks && own < seq.queries)
      store(reinterpret_cast<float*>(p.lse.data) + seq.batch * p.lse.stride[0] +
                at.head * p.lse.stride[1] + (seq.first_query + own) * p.lse.stride[2],
            sum == 0.0f ? -kInfinity : static_cast<float>(base + log(sum)));
    const float times = sum == 0.0f ? 0.0f : factor / sum;
    float infected = 0.0f;  // NaN if something is not finite
    each_row<kBlocks>([&](int m, int h, int) {
      const float by = shuffle(times, lane_index() / 4 * 4 + 2 * m + h);
#pragma unroll
      for (int n = 0; n < kColumns; ++n)
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          o[m][n][e] *= by;
          infected += o[m][n][e] - o[m][n][e];
        }
    });
    const bool again = sync_block_or(infected != 0.0f);
    if (pass == kFast && again) continue;
    store_accumulators(o, q_tile, row);
    sync_warp();
    const Source<T> out(p.out, seq.batch, at.head, seq.first_query, seq.queries, value_width);
    write_rows(q_tile, row, 16 * kBlocks, out, query, column, pass);
    if (pass == kFast) return;
    sync_block();
  }
}

/// biases[H, 2 reach + 1]: those of each distance, from -reach on.
KERNEL(256) position_bias_kernel(AttentionParams p, float octaves) {
  const int64_t i = block_index() * block_threads() + thread_index(), count = 2 * p.reach + 1;
  if (i >= count) return;
  for (int64_t h = 0; h < p.heads; ++h)
    store(p.biases + h * count + i, position_bias(p.position_bias, octaves, i - p.reach, h));
}

template <class T, int kWidth, bool kSpecial>
void launch_width(const AttentionParams& p, Stream stream) {
  using Shape = Shape<T, kWidth, kSpecial>;
  const Order order = order_of(p, false, Shape::rows);
  const int64_t columns = p.value_width > 0 ? (p.value_width + kWidth - 1) / kWidth : 1;
  LAUNCH((attention_kernel<T, kWidth, kSpecial>), Grid(order.tiles * order.heads, columns),
         kThreads, Shape::bytes, stream, p, order);
}
template <class T, bool kSpecial>
void launch_special(const AttentionParams& p, Stream stream) {
  const int64_t width = p.width > p.value_width ? p.width : p.value_width;
  if constexpr (sizeof(T) == 2) {
    if (width > 128) return launch_width<T, 256, kSpecial>(p, stream);
    if (width > 64) return launch_width<T, 128, kSpecial>(p, stream);
  }
  launch_width<T, 64, kSpecial>(p, stream);
}
template <class T>
void launch_type(const AttentionParams& p, Stream stream) {
  return is_special(p) ? launch_special<T, true>(p, stream) : launch_special<T, false>(p, stream);
}

}  // namespace

void position_biases(const AttentionParams& p, Stream stream) {
  if (p.position_bias.table.data)
    LAUNCH(position_bias_kernel, (2 * p.reach + 256) / 256, 256, 0, stream, p,
           octaves_of(p.position_bias));
}

void attention(const AttentionParams& p, Stream stream) {
  if (compute_capability(stream.device) == 90 && fits_sm90(p)) return attention_sm90(p, stream);
  position_biases(p, stream);
  if (p.q.dtype == DType::f32) launch_type<float>(p, stream);
  if (p.q.dtype == DType::bf16) launch_type<bf16>(p, stream);
  if (p.q.dtype == DType::f16) launch_type<f16>(p, stream);
}

}  // namespace warpformer::cuda

// Backward. One kernel does both halves: its blocks own a tile of keys, for dk and dv, or a tile of
// queries, for dq, and pass over the tiles of the other side, whose rows are copied one tile ahead.
//
//                          own rows (A)   others (B)      keys own          queries own
//   S  = x y^T             x              y               x = k, y = q      x = q, y = k
//   dP = u w^T             u              w               u = v, w = dout   u = dout, w = v
//   P = exp(scale S - lse), dS = P (dP - delta), in registers: A of the products that follow
//   dx += dS y             registers      y               dk                dq
//   du += P w              registers      w               dv
//
// So P is computed twice, and nothing is added by two blocks: every sum has one order, that of the
// other side's tiles and, for keys, in them of the heads of the group. Sums of the position bias
// follow from dS: along the diagonals of a tile, in shared memory, then by bucket, by block.
//
// What is not finite in y reaches rows that do not see it, as 0 times it is NaN. Should a result
// not be finite, the tile is done again with zeros in place of such values: where they are seen dS
// is not finite, and says so.
#include "attention/cuda_scores.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"

namespace warpformer::cuda {

void position_biases(const AttentionParams& p, Stream stream);

namespace {

using namespace attend;

constexpr int kRows = 16 * kWarps;  // of the tile that a block owns

template <class T, int kWidth>
struct Shape {
  static constexpr int others = sizeof(T) == 4 ? 16 : kWidth == 64 ? 64 : 32;
  using Own = Tile<T, kRows, kWidth>;
  using Others = Tile<T, others, kWidth>;
  static constexpr int stage = 2 * Others::kBytes;
  static constexpr int bytes = 2 * Own::kBytes + 2 * stage;
};
/// Bytes of what the position bias takes: dS of a tile and the sums of its diagonals.
constexpr int kDiagonals = 128;
template <int kOthers>
constexpr int kPositionBytes = (kRows * (kOthers + 1) + kDiagonals) * 4;

/// The queries that may see some of the keys [key, key + count).
DEVICE Range seeing(const AttentionParams& p, const Sequence& s, int key, int count) {
  const int64_t shift = p.bottom_right ? s.keys - s.queries : 0;
  const int64_t begin = key - shift - p.right, end = key + count - shift + p.left;
  const int from = begin < 0 ? 0 : begin > s.queries ? s.queries : static_cast<int>(begin);
  const int to = end > s.queries ? s.queries : end < 0 ? 0 : static_cast<int>(end);
  return {from, to > from ? to : from};
}

/// exp x, as exact as T asks for.
template <class T>
DEVICE float weight_of(float x) {
  return sizeof(T) == 4 ? exp(x) : exp2_approx(kLog2E * x);
}

/// Zeros in place of what is not finite.
template <class T, class Tile>
DEVICE void clear_non_finite(const Tile& tile) {
  tile.each_chunk([&](int, int, Shared<T> chunk) {
    Vector<T> x = chunk.load16();
#pragma unroll
    for (int i = 0; i < Tile::kChunk; ++i) {
      const float value = to_float(x[i]);
      if (!(value - value == 0.0f)) x[i] = T{};
    }
    chunk.store16(0, x);
  });
}

/// Accumulators of a warp's 16 rows -> rows of a result.
template <class D, int kColumns>
DEVICE void write_gradient(const float (&g)[1][kColumns][4], const Source<D>& to, int row,
                           int column, float times) {
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int r = row + e / 2 * 8 + lane_index() / 4;
      const int c = column + 8 * n + 2 * (lane_index() % 4) + e % 2;
      if (r < to.count && c < to.width)
        store(to.data + r * to.stride + c * to.step, from_float<D>(g[0][n][e] * times));
    }
}

template <int kColumns>
DEVICE bool is_finite(const float (&g)[1][kColumns][4]) {
  float zero = 0.0f;
#pragma unroll
  for (int n = 0; n < kColumns; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) zero += g[0][n][e] - g[0][n][e];
  return zero == 0.0f;
}

/// Adds dS of a tile of queries x keys to the sums by bucket, which lie behind the diagonals' ones.
template <int kCount>
DEVICE void add_diagonals(const AttentionBackwardParams& p, const float (&ds)[1][kCount][4],
                          const Sequence& s, int query, int key, float octaves,
                          Shared<float> memory) {
  constexpr int kStride = 8 * kCount + 1;
  const AttentionParams& f = p.forward;
  const Shared<float> diagonals = memory + kRows * kStride, sums = diagonals + kDiagonals;
  const int row = warp_index() * 16 + lane_index() / 4, column = 2 * (lane_index() % 4);
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      memory.store((row + e / 2 * 8) * kStride + 8 * n + column + e % 2, ds[0][n][e]);
  sync_block();
  const int first = key - query - (kRows - 1) - (f.bottom_right ? s.keys - s.queries : 0);
  float sum = 0.0f;
  for (int r = 0; r < kRows; ++r) {
    const int c = thread_index() + r - (kRows - 1);
    if (c >= 0 && c < 8 * kCount) sum += memory.load(r * kStride + c);
  }
  diagonals.store(thread_index(), sum);
  sync_block();
  const int count = kRows + 8 * kCount - 1;
  const int buckets = static_cast<int>(f.position_bias.table.count);
  for (int b = thread_index(); b < buckets; b += kThreads) {
    float total = sums.load(b);
    for (int d = 0; d < count; ++d)
      if (bucket_of(f.position_bias, octaves, first + d) == b) total += diagonals.load(d);
    sums.store(b, total);
  }
}

template <class T, int kWidth, bool kSpecial, bool kByKeys>
KERNEL(kThreads, 2)
attention_backward_kernel(AttentionBackwardParams p, Order order, float octaves) {
  using Shape = Shape<T, kWidth>;
  constexpr int kOthers = Shape::others, kCount = kOthers / 8, kColumns = kWidth / 8;
  const AttentionParams& f = p.forward;
  const Place at = place(f, order, kByKeys, kRows, block_index());
  const Sequence& seq = at.sequence;
  const int first = at.tile * kRows, column = static_cast<int>(block_index_y()) * kWidth;
  const int own_rows = kByKeys ? seq.keys : seq.queries;
  if (!at.exists || first >= own_rows) return;
  const int group = static_cast<int>(f.heads / f.kv_heads);
  const int kv_head = kByKeys ? at.head : at.head / group;
  const int first_head = kByKeys ? at.head * group : at.head, heads = kByKeys ? group : 1;
  const int width = static_cast<int>(f.width), value_width = static_cast<int>(f.value_width);
  const int widest = width > value_width ? width : value_width;
  const int row = warp_index() * 16;

  Range range{0, 0};  // of the other side
  if constexpr (kByKeys) {
    range = seeing(f, seq, first, kRows);
  } else {
    const int last = first + kRows < seq.queries ? first + kRows - 1 : seq.queries - 1;
    range = {visible(f, seq, first).begin, visible(f, seq, last).end};
  }
  const int begin = range.begin / kOthers * kOthers;
  const int tiles = range.end > range.begin ? (range.end - begin + kOthers - 1) / kOthers : 0;
  const int steps = tiles * heads;

  const typename Shape::Own x{shared_memory<T>()}, u{shared_memory<T>(Shape::Own::kBytes)};
  const auto stage = [&](int step, int which) {
    return typename Shape::Others{shared_memory<T>(
        2 * Shape::Own::kBytes + step % 2 * Shape::stage + which * Shape::Others::kBytes)};
  };
  const auto of_queries = [&](const Heads& t, int head, int columns) {
    return Source<T>(t, seq.batch, head, seq.first_query, seq.queries, columns);
  };
  const auto of_keys = [&](const Heads& t, int columns) {
    return Source<T>(t, seq.batch, opaque(kv_head), seq.first_key, seq.keys, columns);
  };
  const auto head_of = [&](int step) { return first_head + step % heads; };
  const auto other_of = [&](int step) { return begin + step / heads * kOthers; };
  const auto load_own = [&](int d) {
    if constexpr (kByKeys) {
      x.load(of_keys(f.k, width), first, d);
      u.load(of_keys(f.v, value_width), first, d);
    } else {
      x.load(of_queries(f.q, first_head, width), first, d);
      u.load(of_queries(p.dout, first_head, value_width), first, d);
    }
  };
  const auto load_others = [&](int step, int d) {
    const int head = opaque(head_of(step)), other = other_of(step);
    if constexpr (kByKeys) {
      stage(step, 0).load(of_queries(f.q, head, width), other, d);
      stage(step, 1).load(of_queries(p.dout, head, value_width), other, d);
    } else {
      stage(step, 0).load(of_keys(f.k, width), other, d);
      stage(step, 1).load(of_keys(f.v, value_width), other, d);
    }
  };

  const bool sums = kSpecial && !kByKeys && p.dposition_bias && column == 0;
  const Shared<float> position = shared_memory<float>(Shape::bytes);

#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if (sums)
      for (int b = thread_index(); b < f.position_bias.table.count; b += kThreads)
        position.store(kPositionBytes<kOthers> / 4 + b, 0.0f);
    float dx[1][kColumns][4] = {}, du[1][kByKeys ? kColumns : 1][4] = {};
    if (steps > 0) {
      load_own(0);
      load_others(0, 0);
    }
    copy_async_commit();
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int head = head_of(step), other = other_of(step);
      const int query = kByKeys ? other : first, key = kByKeys ? first : other;
      const auto y = stage(step, 0), w = stage(step, 1);
      copy_async_wait<0>();
      sync_block();
      if (widest <= kWidth && step + 1 < steps) load_others(step + 1, 0);
      copy_async_commit();
      float s[1][kCount][4] = {}, dp[1][kCount][4] = {};
#pragma unroll 1
      for (int d = 0;;) {
        multiply_rows<T>(s, x, row, y);
        multiply_rows<T>(dp, u, row, w);
        d += kWidth;
        if (d >= widest) break;
        sync_block();
        load_own(d);
        load_others(step, d);
        copy_async_commit();
        copy_async_wait<0>();
        sync_block();
      }
      if (widest > kWidth) {  // the part of the columns that is this block's
        sync_block();
        load_others(step, column);
        copy_async_commit();
        copy_async_wait<0>();
        sync_block();
      }

      const Scores scores(f, seq, head);
      float derivative[1][kSpecial ? kCount : 1][4];
      const int last_query = (kByKeys ? query + kOthers : query + kRows) - 1;
      const int keys_end = kByKeys ? key + kRows : key + kOthers;
      const bool all_seen = last_query < seq.queries && key >= visible(f, seq, last_query).begin &&
                            keys_end <= visible(f, seq, query).end;
      if constexpr (kSpecial) {
        scores.finish<true, kByKeys>(s, kByKeys ? query : query + row, kByKeys ? key + row : key,
                                     all_seen, f.softcap != 0.0f ? derivative : nullptr);
      } else {
        scores.finish<false, kByKeys>(s, kByKeys ? query : query + row, kByKeys ? key + row : key,
                                      all_seen);
      }
      // Of each query: what its products are shifted by, and delta.
      float shift[kByKeys ? 2 * kCount : 2], delta[kByKeys ? 2 * kCount : 2];
#pragma unroll
      for (int i = 0; i < (kByKeys ? 2 * kCount : 2); ++i) {
        const int own = kByKeys ? query + i / 2 * 8 + 2 * (lane_index() % 4) + i % 2
                                : query + row + 8 * i + lane_index() / 4;
        const bool there = own < seq.queries;
        const int64_t packed = seq.first_query + own;
        const float lse =
            there ? load(reinterpret_cast<const float*>(f.lse.data) + seq.batch * f.lse.stride[0] +
                         head * f.lse.stride[1] + packed * f.lse.stride[2])
                  : -kInfinity;
        shift[i] = lse == -kInfinity ? lse : -lse;
        delta[i] = there ? load(p.delta + (seq.batch * f.heads + head) * f.queries + packed) : 0.0f;
      }
      const auto of = [](int n, int e) { return kByKeys ? 2 * n + e % 2 : e / 2; };
#pragma unroll
      for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          s[0][n][e] = weight_of<T>(fma(s[0][n][e], scores.scale, shift[of(n, e)]));
      float dropped[1][kByKeys && kSpecial ? kCount : 1][4];
      if constexpr (kSpecial && kByKeys) {
#pragma unroll
        for (int n = 0; n < kCount; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) dropped[0][n][e] = s[0][n][e];
        if (f.dropout.seed) scores.drop_by_keys(dropped, dp, query, key + row);
      } else if constexpr (kSpecial) {
        if (f.dropout.seed) scores.drop(dp, query + row, key);
      }
#pragma unroll
      for (int n = 0; n < kCount; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {  // where a weight is 0, dP may be anything
          const float weight = s[0][n][e];
          dp[0][n][e] = weight > 0.0f ? weight * (dp[0][n][e] - delta[of(n, e)]) : weight;
        }
      if constexpr (kSpecial && !kByKeys) {
        if (p.dmask.data && column == 0) {
          float* to = reinterpret_cast<float*>(p.dmask.data) + seq.batch * p.dmask.stride[0] +
                      head * p.dmask.stride[1];
          each_element(dp, [&](float& v, int r, int c) {
            const int64_t i = query + row + r, j = key + c;
            if (i < seq.queries && j < seq.keys)
              store(to + i * p.dmask.stride[2] + j * p.dmask.stride[3], v);
          });
        }
        if (sums) add_diagonals(p, dp, seq, query, key, octaves, position);
      }
      if constexpr (kSpecial) {
        if (f.softcap != 0.0f) {
#pragma unroll
          for (int n = 0; n < kCount; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) dp[0][n][e] *= derivative[0][n][e];
        }
      }
      if (pass == 1) {
        sync_block();
        clear_non_finite<T>(y);
        if constexpr (kByKeys) clear_non_finite<T>(w);
        sync_block();
      }
      multiply_weights(dx, Weights<T, 1, kCount>(dp), y);
      if constexpr (kByKeys) {
        const auto add_values = [&](float (&weights)[1][kCount][4]) {
#pragma unroll
          for (int n = 0; n < kCount; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e)  // what is not finite in dout shows in dP
              weights[0][n][e] = fma(dp[0][n][e], 0.0f, weights[0][n][e]);
          multiply_weights(du, Weights<T, 1, kCount>(weights), w);
        };
        if constexpr (kSpecial) {
          add_values(dropped);
        } else {
          add_values(s);
        }
      }
      if (widest > kWidth && step + 1 < steps) {
        sync_block();
        load_own(0);
        load_others(step + 1, 0);
        copy_async_commit();
      }
    }
    copy_async_wait<0>();
    const bool infected = !is_finite(dx) || !is_finite(du);
    if (sync_block_or(infected) && pass == 0) continue;
    if constexpr (kByKeys) {
      const Source<T> dk(p.dk, seq.batch, kv_head, seq.first_key, seq.keys, width);
      const Source<T> dv(p.dv, seq.batch, kv_head, seq.first_key, seq.keys, value_width);
      write_gradient(dx, dk, first + row, column, f.scale);
      write_gradient(du, dv, first + row, column, 1.0f);
    } else {
      Heads to;
      to.data = reinterpret_cast<char*>(p.dq);
      to.stride[0] = f.heads * f.queries * f.width;
      to.stride[1] = f.queries * f.width;
      to.stride[2] = f.width;
      to.stride[3] = 1;
      const Source<float> dq(to, seq.batch, at.head, seq.first_query, seq.queries, width);
      write_gradient(dx, dq, first + row, column, f.scale);
      if (sums) {
        const int64_t tile = seq.first_query / kRows + (f.cu_seqlens_q ? seq.number : 0) + at.tile;
        const int64_t block = (seq.batch * f.heads + at.head) * order.tiles + tile;
        const int64_t buckets = f.position_bias.table.count;
        for (int64_t b = thread_index(); b < buckets; b += kThreads)
          store(p.parts + block * buckets + b,
                position.load(kPositionBytes<kOthers> / 4 + static_cast<int>(b)));
      }
    }
    return;
  }
}

/// delta, a warp for each query. In double: dP - delta cancels, so that a query of few keys has
/// gradients far below both.
template <class T>
KERNEL(kThreads)
delta_kernel(AttentionBackwardParams p) {
  const AttentionParams& f = p.forward;
  const int64_t i = block_index() * kWarps + warp_index();
  const int64_t batches = f.cu_seqlens_q ? 1 : f.sequences;
  if (i >= batches * f.heads * f.queries) return;
  const int64_t query = i % f.queries, head = i / f.queries % f.heads,
                batch = i / f.queries / f.heads;
  const auto row = [&](const Heads& t) {
    return reinterpret_cast<const T*>(t.data) + batch * t.stride[0] + head * t.stride[1] +
           query * t.stride[2];
  };
  const T *out = row(f.out), *dout = row(p.dout);
  double sum = 0.0;
  for (int64_t c = lane_index(); c < f.value_width; c += kWarp)
    sum += static_cast<double>(to_float(load(out + c * f.out.stride[3]))) *
           to_float(load(dout + c * p.dout.stride[3]));
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2)
    sum += bits_as<double>(shuffle_xor(bits_as<int64_t>(sum), step));
  if (lane_index() > 0) return;
  if (p.dlse.data)
    sum -= load(reinterpret_cast<const float*>(p.dlse.data) + batch * p.dlse.stride[0] +
                head * p.dlse.stride[1] + query * p.dlse.stride[2]);
  store(p.delta + i, static_cast<float>(sum));
}

/// The table's gradient: a block for each head, a thread for each bucket, over the parts in order.
KERNEL(kThreads) sum_parts_kernel(AttentionBackwardParams p, int64_t tiles) {
  const AttentionParams& f = p.forward;
  const int64_t buckets = f.position_bias.table.count, head = block_index();
  const int64_t batches = f.cu_seqlens_q ? 1 : f.sequences;
  for (int64_t b = thread_index(); b < buckets; b += kThreads) {
    double sum = 0.0;
    for (int64_t batch = 0; batch < batches; ++batch)
      for (int64_t tile = 0; tile < tiles; ++tile)
        sum += load(p.parts + ((batch * f.heads + head) * tiles + tile) * buckets + b);
    store(p.dposition_bias + b * f.heads + head, static_cast<float>(sum));
  }
}

template <class T, int kWidth, bool kSpecial, bool kByKeys>
void launch_side(const AttentionBackwardParams& p, Stream stream) {
  using Shape = Shape<T, kWidth>;
  const AttentionParams& f = p.forward;
  const Order order = order_of(f, kByKeys, kRows);
  const int64_t width = f.width > f.value_width ? f.width : f.value_width;
  const int64_t columns = width > 0 ? (width + kWidth - 1) / kWidth : 1;
  const bool sums = !kByKeys && p.dposition_bias;
  const size_t bytes =
      Shape::bytes +
      (sums ? kPositionBytes<Shape::others> + f.position_bias.table.count * sizeof(float) : 0);
  LAUNCH((attention_backward_kernel<T, kWidth, kSpecial, kByKeys>),
         Grid(order.tiles * order.heads, columns), kThreads, bytes, stream, p, order,
         octaves_of(f.position_bias));
  if (sums) LAUNCH(sum_parts_kernel, f.heads, kThreads, 0, stream, p, order.tiles);
}
template <class T, int kWidth>
void launch_width(const AttentionBackwardParams& p, Stream stream) {
  if (is_special(p.forward)) {
    launch_side<T, kWidth, true, true>(p, stream);
    launch_side<T, kWidth, true, false>(p, stream);
  } else {
    launch_side<T, kWidth, false, true>(p, stream);
    launch_side<T, kWidth, false, false>(p, stream);
  }
}
template <class T>
void launch_type(const AttentionBackwardParams& p, Stream stream) {
  const AttentionParams& f = p.forward;
  const int64_t batches = f.cu_seqlens_q ? 1 : f.sequences;
  const int64_t queries = batches * f.heads * f.queries;
  LAUNCH(delta_kernel<T>, (queries + kWarps - 1) / kWarps, kThreads, 0, stream, p);
  if constexpr (sizeof(T) == 2) {
    if (f.width > 64 || f.value_width > 64) return launch_width<T, 128>(p, stream);
  }
  launch_width<T, 64>(p, stream);
}

}  // namespace

void attention_backward(const AttentionBackwardParams& p, Stream stream) {
  position_biases(p.forward, stream);
  if (p.forward.q.dtype == DType::f32) launch_type<float>(p, stream);
  if (p.forward.q.dtype == DType::bf16) launch_type<bf16>(p, stream);
  if (p.forward.q.dtype == DType::f16) launch_type<f16>(p, stream);
}

}  // namespace warpformer::cuda

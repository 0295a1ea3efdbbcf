// A task is one head of one sequence and a block of 192 queries. It goes through the keys in blocks
// of 256, so that the scores never exceed a tile in L1:
//
//   q block --pack--> q tiles
//   for a block of keys:        k --transpose--> k panels [keys / 16][D][16]         (L2)
//                               v --copy-------> v panels [Dv / 16][keys][16]        (L2)
//     for each tile of q:       S = q k^T            [rows of a tile, 256]           (L1)
//                               S + mask, row maximum m, P = exp(scale S - m), l += sum P
//                               o = o * exp(m_old - m) + P v                         (L2)
//   out = o / l
#include "attention/op.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// The softmax so far of one row of queries.
struct RowState {
  float high;   // largest score
  float total;  // sum of exp(score - high)
};

struct Workspace {
  float *k, *v, *q, *scores, *bias, *row, *out;
  RowState* state;
  Workspace(const AttentionParams& p, float* scratch) {
    k = scratch;
    v = k + kBlockKeys * p.width;
    q = v + kBlockKeys * padded(p.value_width);
    scores = q + kBlockQueries * stretches(p.width) * kStride;
    bias = scores + kMaxTileRows * kStride;
    row = bias + kStride;
    out = row + padded(p.width) + padded(p.value_width);
    state = reinterpret_cast<RowState*>(out + kBlockQueries * padded(p.value_width));
  }
};

/// Where a sequence lies in the operands.
struct Sequence {
  int64_t batch, first_query, queries, first_key, keys;
};

Sequence sequence(const AttentionParams& p, int64_t i) {
  if (!p.cu_seqlens_q) return {i, 0, p.queries, 0, p.keys};
  return {0, p.cu_seqlens_q[i], p.cu_seqlens_q[i + 1] - p.cu_seqlens_q[i], p.cu_seqlens_k[i],
          p.cu_seqlens_k[i + 1] - p.cu_seqlens_k[i]};
}

/// One sequence of one head, as rows.
struct Task {
  Rows q, k, v, out, mask;
};

Rows rows_of(const Heads& t, int64_t batch, int64_t head, int64_t first, int64_t count,
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

Task task(const AttentionParams& p, const Sequence& s, int64_t head) {
  const int64_t kv_head = head / (p.heads / p.kv_heads);
  return {rows_of(p.q, s.batch, head, s.first_query, s.queries, p.width),
          rows_of(p.k, s.batch, kv_head, s.first_key, s.keys, p.width),
          rows_of(p.v, s.batch, kv_head, s.first_key, s.keys, p.value_width),
          rows_of(p.out, s.batch, head, s.first_query, s.queries, p.value_width),
          rows_of(p.mask, s.batch, head, 0, s.queries, s.keys)};
}

/// `sign` is 1, or where the scale is not positive, -1 or 0.
void pack_queries(const Rows& q, int64_t first, int64_t count, float sign, float* tiles) {
  for (int64_t i = 0; i < count; ++i) {
    float* tile = tiles + i / kTileRows * stretches(q.n) * kTileRows * kStride;
    for (int64_t s = 0; s * kDepth < q.n; ++s) {
      float* to = tile + (s * kTileRows + i % kTileRows) * kStride;
      const int64_t n = at_most(kDepth, q.n - s * kDepth);
      read_span(q, first + i, s * kDepth, n, to);
      if (sign != 1.0f)
        for (int64_t j = 0; j < n; ++j) to[j] *= sign;
    }
  }
}

void pack_keys(const Rows& k, int64_t first, int64_t count, float* buffer, float* panels) {
  for (int64_t j = 0; j < padded(count); ++j) {
    float* to = panels + j / kPanel * k.n * kPanel + j % kPanel;
    const float* row = j < count ? row_in(k, first + j, buffer) : nullptr;
    for (int64_t d = 0; d < k.n; ++d) to[d * kPanel] = row ? row[d] : 0.0f;
  }
}

/// Returns whether every value is finite: 0 * v is then 0, and the product P v may be used as it
/// is.
bool pack_values(const Rows& v, int64_t first, int64_t count, float* buffer, float* panels) {
  Vec zero = set(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    const float* row = row_in(v, first + j, buffer);
    for (int64_t i = v.n; i < padded(v.n); ++i)
      panels[i / kPanel * kBlockKeys * kPanel + j * kPanel + i % kPanel] = 0.0f;
    for_lanes(v.n, [&](int64_t i, auto k) {
      const Vec value = load(row + i, k);
      store(panels + i / kPanel * kBlockKeys * kPanel + j * kPanel + i % kPanel, value, k);
      zero = fma(value, set(0.0f), zero);
    });
  }
  return sum(zero) == 0.0f;
}

/// Bool masks: s = -inf where it is false. Additive ones: s = scale * s + mask, -inf where the mask
/// is. Even if s is NaN.
void mask_scores(const Rows& mask, int64_t row, int64_t first_key, int64_t n, float scale,
                 float* bias, float* s) {
  if (mask.dtype == DType::boolean) {
    const bool* kept =
        static_cast<const bool*>(mask.data) + row * mask.stride[0] + first_key * mask.step;
    const int64_t step = mask.step;
    if (step == 1) {  // known to be 1, it lets the compiler use vectors
      for (int64_t j = 0; j < n; ++j) s[j] = kept[j] ? s[j] : -INFINITY;
    } else {
      for (int64_t j = 0; j < n; ++j) s[j] = kept[j * step] ? s[j] : -INFINITY;
    }
    return;
  }
  read_span(mask, row, first_key, n, bias);
  for_lanes(n, [&](int64_t j, auto k) {
    const Vec b = load(bias + j, k);
    const Vec masked = fma(load(s + j, k), set(scale), b);
    store(s + j, where_less(b, set(-__FLT_MAX__), b, masked), k);
  });
}

/// One step of the online softmax: s becomes exp(scale * s - high), the sum and the output so far
/// are rescaled to the new high.
void update_row(float* s, int64_t n, float scale, RowState& state, float* out, int64_t width) {
  Vec top = set(state.high);
  for_lanes(n, [&](int64_t j, auto k) { top = max(top, load_or(s + j, k, s[j]) * set(scale)); });
  const float highest = max_lane(top);
  const Vec shift = set(highest == -INFINITY ? 0.0f : -highest);
  Sum added;
  for_lanes(n, [&](int64_t j, auto k) {
    const Vec e = exp(fma(load(s + j, k), set(scale), shift));
    store(s + j, e, k);
    added.add(keep(e, k));
  });
  float rescale[Vec::kWidth];
  store(rescale, exp(set(state.high) + shift));
  state.total = state.total * rescale[0] + added.total();
  if (rescale[0] != 1.0f)
    for (int64_t d = 0; d < width; d += Vec::kWidth)
      store(out + d, load(out + d) * set(rescale[0]));
  state.high = highest;
}

/// out += P v without 0 * inf and 0 * NaN: what a row does not see stays out of it. The order of
/// the sums, and with it every bit of the rows that see only finite values, is that of gemm.
void add_visible_values(const float* weights, int64_t rows, int64_t n, const float* panels,
                        int64_t width, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < width; d += Vec::kWidth) {
      const float* values = panels + d / kPanel * kBlockKeys * kPanel + d % kPanel;
      for (int64_t begin = 0; begin < n; begin += kChain) {
        Vec sum = set(0.0f);
        for (int64_t j = begin; j < at_most(n, begin + kChain); ++j)
          if (weights[i * kStride + j] != 0.0f)
            sum = fma(set(weights[i * kStride + j]), load(values + j * kPanel), sum);
        float* o = out + i * width + d;
        store(o, load(o) + sum);
      }
    }
}

/// The queries [first, first + count) of a task.
void attend(const AttentionParams& p, const Task& task, int64_t first, int64_t count,
            const Workspace& w) {
  const int64_t width = p.width, value_width = padded(p.value_width);
  for (int64_t i = 0; i < count * value_width; ++i) w.out[i] = 0.0f;
  for (int64_t i = 0; i < count; ++i) w.state[i] = {-INFINITY, 0.0f};
  // -inf stands for a masked score before scaling, so the scale has to be positive.
  const float scale = p.scale > 0.0f ? p.scale : p.scale < 0.0f ? -p.scale : 1.0f;
  pack_queries(task.q, first, count, p.scale / scale, w.q);
  const bool additive = task.mask.data && task.mask.dtype != DType::boolean;

  const int64_t keys = p.causal ? at_most(task.k.count, first + count) : task.k.count;
  for (int64_t key = 0; key < keys; key += kBlockKeys) {
    const int64_t block = at_most(kBlockKeys, keys - key);
    pack_keys(task.k, key, block, w.row, w.k);
    const bool finite = pack_values(task.v, key, block, w.row, w.v);
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int64_t rows = at_most(kTileRows, count - i);
      const int64_t n = p.causal ? at_most(block, first + i + rows - key) : block;
      if (n <= 0) continue;
      for (int64_t s = 0; s < stretches(width); ++s)
        gemm(static_cast<int>(rows), padded(n) / kPanel,
             w.q + (i * stretches(width) + s * kTileRows) * kStride,
             {w.k + s * kDepth * kPanel, width * kPanel, kPanel},
             at_most(kDepth, width - s * kDepth), chain(width), w.scores, kStride, s > 0);
      for (int64_t r = 0; r < rows; ++r) {
        float* s = w.scores + r * kStride;
        const int64_t query = first + i + r;
        if (task.mask.data) mask_scores(task.mask, query, key, n, scale, w.bias, s);
        if (p.causal)
          for (int64_t j = query + 1 > key ? query + 1 - key : 0; j < n; ++j) s[j] = -INFINITY;
        update_row(s, n, additive ? 1.0f : scale, w.state[i + r], w.out + (i + r) * value_width,
                   value_width);
      }
      float* out = w.out + i * value_width;
      if (finite) {
        gemm(static_cast<int>(rows), value_width / kPanel, w.scores,
             {w.v, kBlockKeys * kPanel, kPanel}, n, kChain, out, value_width, true);
      } else {
        add_visible_values(w.scores, rows, n, w.v, value_width, out);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    float* out = w.out + i * value_width;
    const Vec factor = set(w.state[i].total == 0.0f ? 0.0f : 1.0f / w.state[i].total);
    for (int64_t d = 0; d < value_width; d += Vec::kWidth) store(out + d, load(out + d) * factor);
    write_span(out, task.out, first + i, 0, task.out.n);
  }
}

}  // namespace

void attention(const AttentionParams& p, int available) {
  const int threads = p.sequences * p.heads * p.queries > 16 ? available : 1;
  const int64_t size = attention_scratch(p.width, p.value_width);
  float* scratch = scratch_floats(threads * size);
  // Work is dealt out in turn, for neighbours in a batch sorted by length cost about the same:
  // whole sequences, whose heads lie side by side in memory, or where they are few, single heads
  // and blocks.
  const bool whole = p.sequences >= 4 * threads;
  parallel(threads, [&](int t) {
    const Workspace workspace(p, scratch + t * size);
    int64_t number = 0;
    for (int64_t i = 0; i < p.sequences; ++i) {
      const Sequence s = sequence(p, i);
      for (int64_t head = 0; head < p.heads; ++head)
        for (int64_t first = 0; first < s.queries; first += kBlockQueries)
          if ((whole ? i : number++) % threads == t)
            attend(p, task(p, s, head), first, at_most(kBlockQueries, s.queries - first),
                   workspace);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA

// A task is one head of one sequence and a block of 192 queries. It goes through the keys in blocks of
// 256, so that the scores never exceed a tile in L1:
//
//   q block --pack--> q tiles
//   for a block of keys:        k --transpose--> k panels [keys / 16][D][16]         (L2)
//                               v --copy-------> v panels [Dv / 16][keys][16]        (L2)
//     for each tile of q:       S = q k^T            [rows of a tile, 256]           (L1)
//                               S * scale + mask, row maximum m, P = exp(S - m), l += sum P
//                               o = o * exp(m_old - m) + P v                         (L2)
//   out = o / l
#include "attention/op.h"
#include "core/dispatch.h"
#include "core/parallel.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// Keys summed in one chain of P v; shorter chains round less.
constexpr int64_t kChain = 128;

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

/// The softmax so far of one row of queries.
struct RowState {
  float high;   // largest score
  float total;  // sum of exp(score - high)
};

struct Workspace {
  float *k, *v, *q, *scores, *bias, *row, *out;
  RowState* state;
  Workspace(const AttentionParams& p, int thread) {
    const int64_t stretches = p.width ? (p.width + kDepth - 1) / kDepth : 1;
    k = p.scratch + thread * attention_scratch(p.width, p.value_width);
    v = k + kBlockKeys * p.width;
    q = v + kBlockKeys * padded(p.value_width);
    scores = q + kBlockQueries * stretches * kStride;
    bias = scores + kMaxTileRows * kStride;
    row = bias + kStride;
    out = row + padded(p.width);
    state = reinterpret_cast<RowState*>(out + kBlockQueries * padded(p.value_width));
  }
};

/// One sequence of one head, as rows.
struct Task {
  Rows q, k, v, out, mask;
};

Rows head_rows(const Heads& t, DType dtype, int64_t sequence, int64_t head, int64_t first,
               int64_t count, int64_t width, int64_t element_size) {
  Rows r;
  const int64_t at = sequence * t.stride[0] + head * t.stride[1] + first * t.stride[2];
  r.data = t.data ? static_cast<char*>(t.data) + at * element_size : nullptr;
  r.dtype = dtype;
  r.n = width;
  r.step = t.stride[3];
  r.count = count;
  r.ndim = 1;
  r.shape[0] = count;
  r.stride[0] = t.stride[2];
  return r;
}

template <class T>
void pack_queries(const Rows& q, int64_t first, int64_t count, float* tiles) {
  const int64_t stretches = q.n ? (q.n + kDepth - 1) / kDepth : 1;
  for (int64_t i = 0; i < count; ++i) {
    float* tile = tiles + i / kTileRows * stretches * kTileRows * kStride;
    for (int64_t s = 0; s * kDepth < q.n; ++s)
      read_span<T>(q, first + i, s * kDepth, at_most(kDepth, q.n - s * kDepth),
                   tile + (s * kTileRows + i % kTileRows) * kStride);
  }
}

template <class T>
void pack_keys(const Rows& k, int64_t first, int64_t count, float* row, float* panels) {
  for (int64_t j = 0; j < padded(count); ++j) {
    float* to = panels + j / kPanel * k.n * kPanel + j % kPanel;
    if (j < count) read_row<T>(k, first + j, row);
    for (int64_t d = 0; d < k.n; ++d) to[d * kPanel] = j < count ? row[d] : 0.0f;
  }
}

/// Returns whether every value is finite: 0 * v is then 0, and the product P v may be used as it is.
template <class T>
bool pack_values(const Rows& v, int64_t first, int64_t count, float* panels) {
  Vec zero = set(0.0f);
  for (int64_t d = 0; d < v.n; d += kPanel) {
    for (int64_t j = 0; j < count; ++j) {
      float* to = panels + (d * kBlockKeys) + j * kPanel;
      for (int64_t i = 0; i < kPanel; ++i) to[i] = 0.0f;
      read_span<T>(v, first + j, d, at_most(kPanel, v.n - d), to);
      for (int i = 0; i < kPanel; i += Vec::kWidth) zero = fma(load(to + i), set(0.0f), zero);
    }
  }
  return sum(zero) == 0.0f;
}

/// s = scale * s + mask, but -inf where the mask is, even if s is NaN.
void mask_scores(const Rows& mask, int64_t row, int64_t first_key, int64_t n, float scale,
                 float* bias, float* s) {
  if (!mask.data) {
    for_lanes(n, [&](int64_t j, auto k) { store(s + j, load(s + j, k) * set(scale), k); });
  } else if (mask.dtype == DType::boolean) {
    const bool* keep =
        static_cast<const bool*>(mask.data) + row * mask.stride[0] + first_key * mask.step;
    for (int64_t j = 0; j < n; ++j) s[j] = keep[j * mask.step] ? s[j] * scale : -INFINITY;
  } else {
    by_float(mask.dtype,
             [&](auto t) { read_span<decltype(t)>(mask, row, first_key, n, bias); });
    for_lanes(n, [&](int64_t j, auto k) {
      const Vec b = load(bias + j, k);
      const Vec masked = fma(load(s + j, k), set(scale), b);
      store(s + j, where_less(b, set(-__FLT_MAX__), b, masked), k);
    });
  }
}

/// One step of the online softmax: s becomes exp(s - high), the sum and the output so far are rescaled
/// to the new high.
void update_row(float* s, int64_t n, RowState& state, float* out, int64_t width) {
  Vec top = set(state.high);
  for_lanes(n, [&](int64_t j, auto k) { top = max(top, load_or(s + j, k, -INFINITY)); });
  const float highest = max_lane(top);
  const Vec shift = set(highest == -INFINITY ? 0.0f : highest);
  Vec added = set(0.0f);
  for_lanes(n, [&](int64_t j, auto k) {
    const Vec e = exp(load_or(s + j, k, -INFINITY) - shift);
    store(s + j, e, k);
    added = added + e;
  });
  float rescale[Vec::kWidth];
  store(rescale, exp(set(state.high) - shift));
  state.total = state.total * rescale[0] + sum(added);
  if (rescale[0] != 1.0f)
    for (int64_t d = 0; d < width; d += Vec::kWidth)
      store(out + d, load(out + d) * set(rescale[0]));
  state.high = highest;
}

/// out += P v without 0 * inf and 0 * NaN: what a row does not see stays out of it.
void add_visible_values(const float* scores, int64_t rows, int64_t n, const float* panels,
                        int64_t width, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) {
      const float weight = scores[i * kStride + j];
      if (weight == 0.0f) continue;
      for (int64_t d = 0; d < width; d += Vec::kWidth) {
        float* o = out + i * width + d;
        const Vec v = load(panels + d / kPanel * kBlockKeys * kPanel + j * kPanel + d % kPanel);
        store(o, fma(set(weight), v, load(o)));
      }
    }
}

/// The queries [first, first + count) of a task.
template <class T>
void attend(const AttentionParams& p, const Task& task, int64_t first, int64_t count,
            const Workspace& w) {
  const int64_t width = p.width, value_width = padded(p.value_width);
  const int64_t stretches = width ? (width + kDepth - 1) / kDepth : 1;
  for (int64_t i = 0; i < count * value_width; ++i) w.out[i] = 0.0f;
  for (int64_t i = 0; i < count; ++i) w.state[i] = {-INFINITY, 0.0f};
  pack_queries<T>(task.q, first, count, w.q);

  const int64_t keys = p.causal ? at_most(task.k.count, first + count) : task.k.count;
  for (int64_t key = 0; key < keys; key += kBlockKeys) {
    const int64_t block = at_most(kBlockKeys, keys - key);
    pack_keys<T>(task.k, key, block, w.row, w.k);
    const bool finite = pack_values<T>(task.v, key, block, w.v);
    for (int64_t i = 0; i < count; i += kTileRows) {
      const int64_t rows = at_most(kTileRows, count - i);
      const int64_t n = p.causal ? at_most(block, first + i + rows - key) : block;
      if (n <= 0) continue;
      for (int64_t s = 0; s < stretches; ++s)
        gemm(static_cast<int>(rows), padded(n) / kPanel,
             w.q + (i * stretches + s * kTileRows) * kStride,
             {w.k + s * kDepth * kPanel, width * kPanel, kPanel},
             at_most(kDepth, width - s * kDepth), w.scores, kStride, s > 0);
      for (int64_t r = 0; r < rows; ++r) {
        float* s = w.scores + r * kStride;
        const int64_t query = first + i + r;
        mask_scores(task.mask, query, key, n, p.scale, w.bias, s);
        if (p.causal)
          for (int64_t j = query + 1 > key ? query + 1 - key : 0; j < n; ++j) s[j] = -INFINITY;
        update_row(s, n, w.state[i + r], w.out + (i + r) * value_width, value_width);
      }
      float* out = w.out + i * value_width;
      if (finite) {
        for (int64_t j = 0; j < n; j += kChain)
          gemm(static_cast<int>(rows), value_width / kPanel, w.scores + j,
               {w.v + j * kPanel, kBlockKeys * kPanel, kPanel}, at_most(kChain, n - j), out,
               value_width, true);
      } else {
        add_visible_values(w.scores, rows, n, w.v, value_width, out);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    float* out = w.out + i * value_width;
    const Vec factor = set(w.state[i].total == 0.0f ? 0.0f : 1.0f / w.state[i].total);
    for (int64_t d = 0; d < value_width; d += Vec::kWidth) store(out + d, load(out + d) * factor);
    write_row<T>(out, task.out, first + i);
  }
}

}  // namespace

void attention(const AttentionParams& p) {
  const int64_t work = p.sequences * p.heads * p.queries;
  parallel_for(p.threads, work > 16 ? 1 : p.threads, p.threads, [&](int t, int64_t begin, int64_t end) {
    const Workspace w(p, t);
    int64_t number = 0;
    for (int64_t b = 0; b < p.sequences; ++b) {
      const bool packed = p.cu_seqlens_q != nullptr;
      const int64_t batch = packed ? 0 : b;
      const int64_t q_first = packed ? p.cu_seqlens_q[b] : 0;
      const int64_t k_first = packed ? p.cu_seqlens_k[b] : 0;
      const int64_t queries = packed ? p.cu_seqlens_q[b + 1] - q_first : p.queries;
      const int64_t keys = packed ? p.cu_seqlens_k[b + 1] - k_first : p.keys;
      for (int64_t h = 0; h < p.heads; ++h)
        for (int64_t first = 0; first < queries; first += kBlockQueries) {
          const int64_t owner = number++ % p.threads;
          if (owner < begin || owner >= end) continue;
          const int64_t kv = h / (p.heads / p.kv_heads);
          by_float(p.dtype, [&](auto type) {
            using T = decltype(type);
            const int64_t size = sizeof(T);
            Task task;
            task.q = head_rows(p.q, p.dtype, batch, h, q_first, queries, p.width, size);
            task.k = head_rows(p.k, p.dtype, batch, kv, k_first, keys, p.width, size);
            task.v = head_rows(p.v, p.dtype, batch, kv, k_first, keys, p.value_width, size);
            task.out = head_rows(p.out, p.dtype, batch, h, q_first, queries, p.value_width, size);
            const int64_t mask_size = p.mask_dtype == DType::boolean ? 1
                                      : p.mask_dtype == DType::f32   ? 4
                                                                     : 2;
            task.mask = head_rows(p.mask, p.mask_dtype, batch, h, 0, queries, keys, mask_size);
            attend<T>(p, task, first, at_most(kBlockQueries, queries - first), w);
          });
        }
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA

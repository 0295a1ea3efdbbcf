// Forward, and backward without bias gradients: a team a span, everything in registers.
//
//   x + bias, (up + up_bias) --> out              grad, x + bias, (up + up_bias) --> dx, (dup)
//
// Backward with bias gradients: a team takes a span of columns of all rows of a part, two at a time
// so that enough loads are in flight, and keeps the sums of its columns in registers; a second
// kernel adds the parts up in double, 32 columns a block:
//
//   16 rows --> chain, chains --> partial[part];     parts w, w + 32, ... --> warp w --> dbias
#include "activation/op.h"
#include "core/cuda/activation.cuh"
#include "core/cuda/spans.cuh"

namespace warpformer::cuda {
namespace {

using lane::ValueAndSlope;

constexpr int kChunks = 2, kRowsAtOnce = 2;
constexpr int kSumThreads = 1024, kSumWarps = kSumThreads / kWarp;

/// values += biases of this span, where there are any.
template <int kCount>
DEVICE void add_bias(const Rows& bias, const Span& span, float (&values)[kCount][kChunk]) {
  if (!bias.data) return;
  float b[kCount][kChunk];
  load_row(bias, 0, span.first, span.team, 0.0f, b);
#pragma unroll
  for (int c = 0; c < kCount; ++c)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) values[c][j] += b[c][j];
}

KERNEL(kSpanThreads) activation_kernel(ActivationParams p, Spans<kChunks> spans) {
  const Span span(spans);
  float z[kChunks][kChunk], up[kChunks][kChunk];
  load_row(p.x, span.row, span.first, span.team, 0.0f, z);
  if (p.up.data) load_row(p.up, span.row, span.first, span.team, 0.0f, up);
  add_bias(p.bias, span, z);
  lane::by_activation(p.activation, p.out.dtype != DType::f32, [&](auto act) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int j = 0; j < kChunk; ++j) z[c][j] = act.value(z[c][j]);
  });
  if (p.up.data) {
    add_bias(p.up_bias, span, up);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int j = 0; j < kChunk; ++j) z[c][j] *= up[c][j];
  }
  store_row(p.out, span.row, span.first, span.team, z);
}

/// Of a row: g becomes dx, up becomes dup.
template <int kCount>
DEVICE void differentiate(const ActivationBackwardParams& p, const float (&z)[kCount][kChunk],
                          float (&g)[kCount][kChunk], float (&up)[kCount][kChunk]) {
  const bool gated = p.up.data;
  lane::by_activation(p.activation, false, [&](auto act) {
#pragma unroll
    for (int c = 0; c < kCount; ++c)
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const ValueAndSlope both = act.both(z[c][j]);
        const float scaled = gated ? g[c][j] * up[c][j] : g[c][j];
        up[c][j] = g[c][j] * both.value;
        g[c][j] = scaled * both.slope;
      }
  });
}

KERNEL(kSpanThreads) activation_backward_kernel(ActivationBackwardParams p, Spans<1> spans) {
  const Span span(spans);
  float z[1][kChunk], g[1][kChunk], up[1][kChunk];
  load_row(p.grad, span.row, span.first, span.team, 0.0f, g);
  load_row(p.x, span.row, span.first, span.team, 0.0f, z);
  if (p.up.data) load_row(p.up, span.row, span.first, span.team, 0.0f, up);
  add_bias(p.bias, span, z);
  if (p.up.data) add_bias(p.up_bias, span, up);
  differentiate(p, z, g, up);
  if (p.dx.data) store_row(p.dx, span.row, span.first, span.team, g);
  if (p.dup.data) store_row(p.dup, span.row, span.first, span.team, up);
}

DEVICE void add(float (&to)[1][kChunk], const float (&values)[1][kChunk]) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) to[0][j] += values[0][j];
}
DEVICE void clear(float (&values)[1][kChunk]) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) values[0][j] = 0.0f;
}

KERNEL(kSpanThreads) activation_backward_parts_kernel(ActivationBackwardParams p, Spans<1> spans) {
  const Span span(spans);  // its row is the part
  if (span.row >= p.parts) return;
  const Team& team = span.team;
  float bias[1][kChunk], up_bias[1][kChunk];
  clear(bias);
  clear(up_bias);
  add_bias(p.bias, span, bias);
  add_bias(p.up_bias, span, up_bias);
  float chain[2][1][kChunk], total[2][1][kChunk];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    clear(chain[i]);
    clear(total[i]);
  }
  const int64_t begin = p.x.count * span.row / p.parts, end = p.x.count * (span.row + 1) / p.parts;
  for (int64_t r = begin; r < end; r += kRowsAtOnce) {
    float z[kRowsAtOnce][1][kChunk], g[kRowsAtOnce][1][kChunk], up[kRowsAtOnce][1][kChunk];
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = r + k < end ? r + k : p.x.count;  // past the last: zeros
      load_row(p.grad, row, span.first, team, 0.0f, g[k]);
      load_row(p.x, row, span.first, team, 0.0f, z[k]);
      if (p.up.data) load_row(p.up, row, span.first, team, 0.0f, up[k]);
    }
#pragma unroll
    for (int k = 0; k < kRowsAtOnce; ++k) {
      const int64_t row = r + k < end ? r + k : p.x.count;
      add(z[k], bias);
      if (p.up.data) add(up[k], up_bias);
      differentiate(p, z[k], g[k], up[k]);
      if (row == p.x.count) break;
      if (p.dx.data) store_row(p.dx, row, span.first, team, g[k]);
      if (p.dup.data) store_row(p.dup, row, span.first, team, up[k]);
      add(chain[0], g[k]);
      if (p.up.data) add(chain[1], up[k]);
    }
    if ((r + kRowsAtOnce - begin) % kChainRows && r + kRowsAtOnce < end) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      add(total[i], chain[i]);
      clear(chain[i]);
    }
  }
  const int64_t column = span.first + int64_t{kChunk} * team.index;
  float* partial = p.partial + 2 * span.row * p.x.n + column;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    if (column + j >= p.x.n) break;
    store(partial + j, total[0][0][j]);
    store(partial + p.x.n + j, total[1][0][j]);
  }
}

KERNEL(kSumThreads) activation_backward_sum_kernel(ActivationBackwardParams p) {
  const Rows& out = block_index_y() ? p.dup_bias : p.dbias;
  if (!out.data) return;
  const int64_t n = p.x.n, column = block_index() * kWarp + lane_index();
  const float* partial = p.partial + block_index_y() * n + column;
  double sum = 0;
  if (column < n) {
#pragma unroll 4
    for (int64_t part = warp_index(); part < p.parts; part += kSumWarps)
      sum += load(partial + 2 * part * n);
  }
  const Shared<double> sums = shared_memory<double>();
  sums.store(thread_index(), sum);
  sync_block();
  if (warp_index() > 0 || column >= n) return;
  for (int w = 1; w < kSumWarps; ++w) sum += sums.load(w * kWarp + lane_index());
  by_float(out.dtype, [&](auto type) {
    using T = decltype(type);
    store(static_cast<T*>(out.data) + column * out.step, from_float<T>(static_cast<float>(sum)));
  });
}

}  // namespace

void activation(const ActivationParams& p, Stream stream) {
  const Spans<kChunks> spans(p.x.n);
  LAUNCH(activation_kernel, spans.blocks(p.x.count), kSpanThreads, 0, stream, p, spans);
}

void activation_backward(const ActivationBackwardParams& p, Stream stream) {
  const Spans<1> spans(p.x.n);
  if (p.parts == 0) {
    LAUNCH(activation_backward_kernel, spans.blocks(p.x.count), kSpanThreads, 0, stream, p, spans);
    return;
  }
  LAUNCH(activation_backward_parts_kernel, spans.blocks(p.parts), kSpanThreads, 0, stream, p,
         spans);
  const Grid grid((p.x.n + kWarp - 1) / kWarp, 2);
  LAUNCH(activation_backward_sum_kernel, grid, kSumThreads, kSumThreads * sizeof(double), stream,
         p);
}

}  // namespace warpformer::cuda

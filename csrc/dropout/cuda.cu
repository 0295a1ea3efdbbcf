// A team a span (core/cuda/spans.cuh), everything in registers. The 8 elements of a chunk take the
// words of two counters, or of three where the chunk begins within one:
//
//   element    |  i  | i+1 | i+2 | i+3 | ...
//   counter    |-- i/4 -------->|-- i/4 + 1 -->
#include "core/cuda/philox.cuh"
#include "core/cuda/spans.cuh"
#include "dropout/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kChunks = 2;
constexpr int kWords = kChunk + 4;

/// The words of elements first, first + 1, ... first + 7.
DEVICE void draw(uint64_t seed, int64_t first, uint32_t (&words)[kWords]) {
  const uint64_t counter = first / 4;
  const int within = static_cast<int>(first % 4);
  philox(seed, counter, 0, words);
  philox(seed, counter + 1, 0, words + 4);
  if (within == 0) return;
  philox(seed, counter + 2, 0, words + 8);
#pragma unroll
  for (int i = 0; i < kChunk; ++i)  // by constant indices, so that they stay in registers
    words[i] = within == 1 ? words[i + 1] : within == 2 ? words[i + 2] : words[i + 3];
}

KERNEL(kSpanThreads) dropout_kernel(DropoutParams p, Spans<kChunks> spans) {
  const Span span(spans);
  const auto seed = static_cast<uint64_t>(load(p.seed));
  float x[kChunks][kChunk], residual[kChunks][kChunk];
  load_row(p.x, span.row, span.first, span.team, 0.0f, x);
  if (p.residual.data) load_row(p.residual, span.row, span.first, span.team, 0.0f, residual);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t column = span.first + int64_t{kChunk} * (span.team.index + c * span.team.size);
    uint32_t words[kWords];
    draw(seed, span.row * p.x.n + column, words);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) {
      const float kept = words[j] >= p.threshold ? x[c][j] * p.scale : 0.0f;
      x[c][j] = p.residual.data ? residual[c][j] + kept : kept;
    }
  }
  store_row(p.out, span.row, span.first, span.team, x);
}

}  // namespace

void dropout(const DropoutParams& p, Stream stream) {
  const Spans<kChunks> spans(p.x.n);
  LAUNCH(dropout_kernel, spans.blocks(p.x.count), kSpanThreads, 0, stream, p, spans);
}

}  // namespace warpformer::cuda

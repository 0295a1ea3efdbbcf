// A team a span (core/cuda/spans.cuh), everything in registers. The 8 elements of a chunk take the
// words of two counters, or of three where the chunk begins within one:
//
//   element    |  i  | i+1 | i+2 | i+3 | ...
//   counter    |-- i/4 -------->|-- i/4 + 1 -->
#include "core/cuda/spans.cuh"
#include "core/philox.h"
#include "dropout/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kChunks = 2;
constexpr int kWords = kChunk + 4;

DEVICE void philox(uint64_t seed, uint64_t counter, uint32_t* words) {
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32);
  uint32_t c2 = 0, c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t{c0} * kPhiloxMultiplier0, p1 = uint64_t{c2} * kPhiloxMultiplier1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxKeyStep0;
    k1 += kPhiloxKeyStep1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

/// The words of elements first, first + 1, ... first + 7.
DEVICE void draw(uint64_t seed, int64_t first, uint32_t (&words)[kWords]) {
  const uint64_t counter = first / 4;
  const int within = static_cast<int>(first % 4);
  philox(seed, counter, words);
  philox(seed, counter + 1, words + 4);
  if (within == 0) return;
  philox(seed, counter + 2, words + 8);
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

// A thread takes a run of rows of x (or, where they are few, a run of columns of the weight) and goes
// through it in blocks that fit its L2:
//
//   x rows --pack--> block [tiles][stretches of k][rows of a tile][kStride]     (L2)
//   for two panels of W:                                                        (L2, then L1)
//     for each tile of the block:   tile of C += A B, stretch by stretch        (registers)
//                                   + bias, activation, + residual --> out
#include "core/dispatch.h"
#include "core/parallel.h"
#include "linear/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
void pack_rows(const Rows& x, int64_t begin, int64_t count, float* block) {
  const int64_t stretches = linear_stretches(x.n);
  for (int64_t i = 0; i < count; ++i) {
    float* tile = block + i / kTileRows * stretches * kTileRows * kStride;
    for (int64_t s = 0; s * kDepth < x.n; ++s)
      read_span<T>(x, begin + i, s * kDepth, at_most(kDepth, x.n - s * kDepth),
                   tile + (s * kTileRows + i % kTileRows) * kStride);
  }
}

/// c = act(c + bias)
void activate(float* c, const float* bias, int64_t n, Activation activation) {
  const auto map = [&](const auto& function) {
    for_lanes(n, [&](int64_t i, auto k) {
      store(c + i, function(load(c + i, k) + load(bias + i, k)), k);
    });
  };
  switch (activation) {
    case Activation::none: return map([](Vec v) { return v; });
    case Activation::relu: return map([](Vec v) { return max(set(0.0f), v); });
    case Activation::gelu: return map([](Vec v) { return gelu(v); });
    case Activation::gelu_tanh: return map([](Vec v) { return gelu_tanh(v); });
    case Activation::tanh: return map([](Vec v) { return tanh(v); });
  }
}

struct Range {
  int64_t begin, end;
};

/// Part `t` of `parts` of [0, n), cut at multiples of `unit`.
Range part(int64_t n, int64_t unit, int64_t t, int64_t parts) {
  const int64_t units = (n + unit - 1) / unit;
  return {at_most(n, units * t / parts * unit), at_most(n, units * (t + 1) / parts * unit)};
}

void finish_tile(const LinearParams& p, const float* bias, int64_t row, int64_t rows,
                 int64_t column, float* c, float* residual) {
  const int64_t columns = at_most(kTileColumns, p.out.n - column);
  for (int64_t i = 0; i < rows; ++i) {
    float* y = c + i * kTileColumns;
    activate(y, bias + column, columns, p.activation);
    if (p.residual.data) {
      by_float(p.residual.dtype, [&](auto t) {
        read_span<decltype(t)>(p.residual, row + i, column, columns, residual);
      });
      for_lanes(columns, [&](int64_t j, auto k) {
        store(y + j, load(y + j, k) + load(residual + j, k), k);
      });
    }
    by_float(p.out.dtype,
             [&](auto t) { write_span<decltype(t)>(y, p.out, row + i, column, columns); });
  }
}

void multiply_block(const LinearParams& p, const float* bias, int64_t row, int64_t rows,
                    Range panels, const float* block, float* c) {
  const int64_t depth = p.x.n, stretches = linear_stretches(depth);
  for (int64_t panel = panels.begin; panel < panels.end; panel += kTilePanels) {
    const int64_t now = at_most(kTilePanels, panels.end - panel);
    for (int64_t i = 0; i < rows; i += kTileRows) {
      const int64_t tile_rows = at_most(kTileRows, rows - i);
      for (int64_t s = 0; s < stretches; ++s) {
        const float* weight = p.weight + (panel * depth + s * kDepth) * kPanel;
        gemm(static_cast<int>(tile_rows), now, block + (i * stretches + s * kTileRows) * kStride,
             {weight, depth * kPanel, kPanel}, at_most(kDepth, depth - s * kDepth), c,
             kTileColumns, s > 0);
      }
      finish_tile(p, bias, row + i, tile_rows, panel * kPanel, c,
                  c + kMaxTileRows * kMaxTileColumns);
    }
  }
}

}  // namespace

void pack_linear(const PackLinearParams& p) {
  const int64_t depth = p.weight.n, columns = p.weight.count;
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  parallel_for(panels, 1 + 65536 / (depth * kPanel), p.threads,
               [&](int t, int64_t begin, int64_t end) {
    float* rows = p.scratch + t * kPanel * depth;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t used = at_most(kPanel, columns - panel * kPanel);
      for (int64_t j = 0; j < used; ++j)
        by_float(p.weight.dtype, [&](auto type) {
          read_row<decltype(type)>(p.weight, panel * kPanel + j, rows + j * depth);
        });
      float* to = p.packed + panel * depth * kPanel;
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t j = 0; j < kPanel; ++j)
          to[k * kPanel + j] = j < used ? rows[j * depth + k] : 0.0f;
    }
  });
}

void linear(const LinearParams& p) {
  const int64_t rows = p.x.count, panels = (p.out.n + kPanel - 1) / kPanel;
  float* bias = p.scratch;
  for (int64_t j = 0; j < panels * kPanel; ++j) bias[j] = 0.0f;
  if (p.bias.data)
    by_float(p.bias.dtype, [&](auto t) { read_row<decltype(t)>(p.bias, 0, bias); });

  const bool by_rows = rows >= 2 * kTileRows * p.threads;
  const int64_t cost = rows * p.x.n * p.out.n;
  const int64_t grain = 1 + (int64_t{1} << 18) / (1 + cost / p.threads);
  parallel_for(p.threads, grain, p.threads, [&](int t, int64_t begin, int64_t end) {
    float* block = bias + panels * kPanel + t * linear_scratch(p.x.n);
    float* c = block + p.block_rows * linear_stretches(p.x.n) * kStride;
    const Range mine = by_rows ? Range{part(rows, kTileRows, begin, p.threads).begin,
                                       part(rows, kTileRows, end - 1, p.threads).end}
                               : Range{0, rows};
    const Range columns = by_rows ? Range{0, panels}
                                  : Range{part(panels, kTilePanels, begin, p.threads).begin,
                                          part(panels, kTilePanels, end - 1, p.threads).end};
    for (int64_t row = mine.begin; row < mine.end; row += p.block_rows) {
      const int64_t count = at_most(p.block_rows, mine.end - row);
      by_float(p.x.dtype, [&](auto x) { pack_rows<decltype(x)>(p.x, row, count, block); });
      multiply_block(p, bias, row, count, columns, block, c);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA

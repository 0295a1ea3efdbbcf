// A thread takes a run of rows of x (or, where they are few, a run of columns of the weight) and
// goes through it in blocks that fit its L2:
//
//   for a block of columns and of rows:
//     for a block of k:            x --pack--> tiles [rows / tile][stretches of k][tile][kStride]
//       for two panels of W:       (from L3 or memory once, then from L1)
//         for each tile of rows:   tile of C += A B                                 (registers)
//     C row + bias, activation, + residual --> out row
#include "core/activation_functions.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "linear/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

void pack_rows(const Rows& x, int64_t begin, int64_t count, int64_t k, int64_t depth,
               float* block) {
  for (int64_t i = 0; i < count; ++i) {
    float* tile = block + i / kTileRows * stretches(depth) * kTileRows * kStride;
    for (int64_t s = 0; s * kDepth < depth; ++s)
      read_span(x, begin + i, k + s * kDepth, at_most(kDepth, depth - s * kDepth),
                tile + (s * kTileRows + i % kTileRows) * kStride);
  }
}

/// c = act(c + bias)
void activate(float* c, const float* bias, int64_t n, Activation activation) {
  by_activation(activation, false, [&](auto act) {
    for_lanes(n, [&](int64_t i, auto k) {
      store(c + i, act.value(load(c + i, k) + load(bias + i, k)), k);
    });
  });
}

struct Range {
  int64_t begin, end;
};

/// Part `t` of `parts` of [0, n), cut at multiples of `unit`.
Range part(int64_t n, int64_t unit, int64_t t, int64_t parts) {
  const int64_t units = (n + unit - 1) / unit;
  return {at_most(n, units * t / parts * unit), at_most(n, units * (t + 1) / parts * unit)};
}

/// C[rows, kResultStride] (+)= x[row.., k..] W^T for the panels of a block.
void multiply(const LinearParams& p, const float* tiles, int64_t rows, int64_t k, Range panels,
              float* c) {
  const int64_t depth = at_most(kBlockDepth, p.x.n - k);
  for (int64_t panel = panels.begin; panel < panels.end; panel += kTilePanels) {
    const float* weight = p.weight + (panel * p.x.n + k) * kPanel;
    for (int64_t s = 0; s < stretches(depth); ++s)
      for (int64_t i = 0; i < rows; i += kTileRows)
        gemm(static_cast<int>(at_most(kTileRows, rows - i)),
             at_most(kTilePanels, panels.end - panel),
             tiles + (i * stretches(depth) + s * kTileRows) * kStride,
             {weight + s * kDepth * kPanel, p.x.n * kPanel, kPanel},
             at_most(kDepth, depth - s * kDepth), chain(p.x.n),
             c + i * kResultStride + (panel - panels.begin) * kPanel, kResultStride, k + s > 0);
  }
}

/// out[row, column..] = act(c + bias) + residual
void finish(const LinearParams& p, const float* bias, int64_t row, int64_t column, int64_t columns,
            float* c, float* residual) {
  activate(c, bias + column, columns, p.activation);
  if (p.residual.data) {
    read_span(p.residual, row, column, columns, residual);
    for_lanes(columns,
              [&](int64_t j, auto k) { store(c + j, load(c + j, k) + load(residual + j, k), k); });
  }
  write_span(c, p.out, row, column, columns);
}

/// The rows and panels of one thread.
void multiply_part(const LinearParams& p, const float* bias, Range rows, Range panels,
                   float* scratch) {
  float* c = scratch + kBlockRows * kBlockStretches * kStride;
  float* residual = c + kBlockRows * kResultStride;
  for (int64_t panel = panels.begin; panel < panels.end; panel += kBlockColumns / kPanel) {
    const Range block{panel, at_most(panels.end, panel + kBlockColumns / kPanel)};
    const int64_t column = panel * kPanel;
    const int64_t columns = at_most(kBlockColumns, at_most(p.out.n, block.end * kPanel) - column);
    for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
      const int64_t count = at_most(kBlockRows, rows.end - row);
      for (int64_t k = 0; k == 0 || k < p.x.n; k += kBlockDepth) {
        pack_rows(p.x, row, count, k, at_most(kBlockDepth, p.x.n - k), scratch);
        multiply(p, scratch, count, k, block, c);
      }
      for (int64_t i = 0; i < count; ++i)
        finish(p, bias, row + i, column, columns, c + i * kResultStride, residual);
    }
  }
}

}  // namespace

void pack_linear(const PackLinearParams& p, int threads) {
  const int64_t depth = p.weight.n, columns = p.weight.count;
  const int64_t panels = (columns + kPanel - 1) / kPanel;
  float* scratch = scratch_floats(threads * kPanel * depth);
  parallel_for(panels, 1 + 65536 / (depth * kPanel), threads,
               [&](int t, int64_t begin, int64_t end) {
                 float* rows = scratch + t * kPanel * depth;
                 for (int64_t panel = begin; panel < end; ++panel) {
                   const int64_t used = at_most(kPanel, columns - panel * kPanel);
                   for (int64_t j = 0; j < used; ++j)
                     read_span(p.weight, panel * kPanel + j, 0, depth, rows + j * depth);
                   float* to = p.packed + panel * depth * kPanel;
                   for (int64_t k = 0; k < depth; ++k)
                     for (int64_t j = 0; j < kPanel; ++j)
                       to[k * kPanel + j] = j < used ? rows[j * depth + k] : 0.0f;
                 }
               });
}

void linear(const LinearParams& p, int threads) {
  const int64_t rows = p.x.count, panels = (p.out.n + kPanel - 1) / kPanel;
  float* bias = scratch_floats(panels * kPanel + threads * kLinearScratch);
  for (int64_t j = 0; j < panels * kPanel; ++j) bias[j] = 0.0f;
  if (p.bias.data) read_span(p.bias, 0, 0, p.bias.n, bias);

  const bool by_rows = rows >= 2 * kTileRows * threads;
  // A thread is worth waking for some 2^18 multiply-adds.
  const int64_t work = rows * p.x.n * p.out.n >> 18;
  const int parts = static_cast<int>(work < 1 ? 1 : at_most(work, threads));
  parallel(parts, [&](int t) {
    float* scratch = bias + panels * kPanel + t * kLinearScratch;
    const Range all_rows{0, rows}, all_panels{0, panels};
    if (by_rows) {
      multiply_part(p, bias, part(rows, kTileRows, t, parts), all_panels, scratch);
    } else {
      multiply_part(p, bias, all_rows, part(panels, kTilePanels, t, parts), scratch);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA

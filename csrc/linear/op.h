// linear: out = act(x W^T + bias) + residual
//
//   x             [..., K], any strides, f32 f16 bf16
//   W             [N, K], packed by pack_linear into panels [ceil(N / 16), K, 16] of f32:
//                 panel[p][k][j] = W[16 p + j][k], 0 past the last row
//   bias          [N] or none
//   out, residual [..., N], any strides, f32 f16 bf16 each
//   act           none, relu, gelu, gelu_tanh, tanh
//
// Sums are float, over k in ascending order.
// Source: torch.nn.functional.linear; Goto, van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", for packing.
#pragma once

#include "core/gemm.h"
#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

enum class Activation : int { none, relu, gelu, gelu_tanh, tanh };

struct LinearParams {
  Rows x, bias, residual, out;  // data is null where bias or residual is not given
  const float* weight;
  Activation activation;
  int64_t block_rows;  // rows of x that a thread packs at a time
  int threads;
  float* scratch;  // bias [panels, 16], then linear_scratch floats for each thread
};

/// A quarter MiB of rows: they stay in L2 beside the panels of the weight. A multiple of every tile.
inline int64_t linear_block_rows(int64_t depth) {
  const int64_t rows = (int64_t{1} << 16) / (depth + 1) / kMaxTileRows * kMaxTileRows;
  return rows < kMaxTileRows ? kMaxTileRows : rows > 240 ? 240 : rows;
}
/// Stretches of k; one even where K is 0, so that the product is written as 0.
inline int64_t linear_stretches(int64_t depth) { return depth ? (depth + kDepth - 1) / kDepth : 1; }
/// Floats of a thread: the packed block, a tile of the result, and a row of the residual.
inline int64_t linear_scratch(int64_t depth) {
  return linear_block_rows(depth) * linear_stretches(depth) * kStride +
         (kMaxTileRows + 1) * kMaxTileColumns;
}

struct PackLinearParams {
  Rows weight;
  float* packed;
  int threads;
  float* scratch;  // [threads, 16, K]
};

DECLARE_CPU_KERNEL(linear, LinearParams)
DECLARE_CPU_KERNEL(pack_linear, PackLinearParams)

}  // namespace warpformer

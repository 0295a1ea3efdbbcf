// linear: out = act(x W^T + bias) + residual
//
//   x             [..., K], any strides, f32 f16 bf16
//   W             [N, K], packed by pack_linear into panels [ceil(N / 16), K, 16] of f32:
//                 panel[p][k][j] = W[16 p + j][k], 0 past the last row
//   bias          [N] or none
//   out, residual [..., N], any strides, f32 f16 bf16 each
//   act           of core/activation.h
//
// Sums are float, over k in ascending order.
// Source: torch.nn.functional.linear; Goto, van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", for packing.
#pragma once

#include "core/activation.h"
#include "core/gemm.h"
#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

// A block is what a thread works on at a time: as packed rows of x it takes 0.4 MiB at most, as
// result as much, so that both stay in a megabyte of L2 beside the two panels of the weight in use.
constexpr int64_t kBlockRows = 8 * kMaxTileRows, kBlockDepth = 4 * kDepth, kBlockColumns = 1536;
constexpr int64_t kBlockStretches = kBlockDepth / kDepth;
constexpr int64_t kResultStride = kBlockColumns + 16;  // rows of a tile fall into different L1 sets

struct LinearParams {
  Rows x, bias, residual, out;  // data is null where bias or residual is not given
  const float* weight;
  Activation activation;
};

/// Floats of a thread: packed block of x, block of the result, a row of the residual.
constexpr int64_t kLinearScratch =
    kBlockRows * kBlockStretches * kStride + (kBlockRows + 1) * kResultStride;

struct PackLinearParams {
  Rows weight;
  float* packed;
};

DECLARE_CPU_KERNEL(linear, LinearParams)
DECLARE_CPU_KERNEL(pack_linear, PackLinearParams)

}  // namespace warpformer

// linear: out = act(x W^T + bias) + residual            gated: out = act(gate) up + residual, where
//                                                       [gate, up] = x W^T + bias
//   x             [..., K], any strides, f32 f16 bf16
//   W             [N, K], packed; gated: 2 N rows, those of the gate first
//   bias          [N] (gated: 2 N) or none
//   out, residual [..., N], any strides, f32 f16 bf16 each
//   act           of core/activation.h
//
// grouped_linear: the same of rows that are sorted by expert, each with a weight of its own: expert
// e has the rows [offsets[e - 1], offsets[e]); W [E, N, K], bias [E, N].
//
// A packed weight is a row of bytes per panel of 16 rows of W (those of the gate and of `up` begin
// a panel each; 0 past the last row), cut into parts that begin at cache lines:
//
//   values   f32, f16          [K][16]
//            bf16, int8        [K / 2][16][2]
//            int8_dynamic      [K / 4][16][4], each plus 128, as bytes without sign
//            int4, nf4         [K / 8][16] words of 8 codes of 4 bits, k = 0 2 4 6 1 3 5 7 from the
//                              lowest bit on: as 16-bit halves, shifts by 4 give neighbours
//            int4_dynamic      [K / 8][16] words, k = 0 4 1 5 2 6 3 7: as bytes, the low halves are
//                              four neighbours, the high ones the next four
//   scales   f16 [groups][16]  of groups of `group` neighbours along K; none where a group is a
//                              row, as in int8_dynamic it always is. On the CPU those of two
//                              groups lie before their values: one stream from memory
//   zeros    u8 [groups][16]   of int4 with zero points
//   sums     i32 [16]          of the values of int8_dynamic
//   factors  f32 [16]          w = factor scale (code - zero); 2^n where there are scales, so that
//                              scales of 8 to 11 significant bits are kept exactly
//
// On CUDA the values of quantized weights lie otherwise, in tiles of 512 bytes, 16 rows by 64 of K
// (by 32 of 8 bits), of which each lane of a warp has 16 bytes: its part of A of mma, where lane
// 4 g + t has the rows g and g + 8. The last tile is whole, on the CPU too: sizes are the same.
//
//   panel     | tile 0                     | tile 1 ..           four panels are A of a wgmma, one
//             | lane 0 | 1 | .. | lane 31  |                     for each of its warps
//
//   word      | 0 | 1 | 2 | 3 |       m16n8k16: register 0 has row g, k = 2 t, 2 t + 1, register 1
//                                     row g + 8; 2 and 3 the same rows at k + 8
//   int4      word i is fragment i: bits 4 r .. of each 16-bit half are register r
//   nf4       word i is fragment i: byte r is register r, the even k in its low bits
//   int8      words 2 i, 2 i + 1 are fragment i: bytes 0, 2 of word h are register 2 h, bytes 1, 3
//             register 2 h + 1
//
//                                     m16n8k32: register 0 has row g, k = 4 t .. 4 t + 3, register
//                                     1 row g + 8; 2 and 3 the same rows at k + 16
//   int4_dynamic   words 2 i, 2 i + 1 are fragment i: low bits of the bytes of word h are register
//                  2 h, high bits register 2 h + 1, as numbers with a sign: code - 8
//   int8_dynamic   word r is register r, as bytes with a sign
//
// How products are summed belongs to the format, at every number of rows:
//
//   f32 f16         x and W as floats
//   bf16 nf4        x of bf16 by Pairs, with NF4's values rounded to bf16; others as floats
//   int4 int8       x of bf16 as it is, others as the sum of two bf16, by Pairs
//   int8_dynamic    x as s8 per row, by Quads
//   int4_dynamic    x as s8 per 32 of K, by Quads
//
// where the ISA has the instructions; else Pairs become floats, and Quads become Shorts (those of
// int4_dynamic before AVX2 only). x as s8:
//
//   per 32    scale = max |x| / 127                      q = round(x / scale), zero = 0
//   per row   scale = (max(x, 0) - min(x, 0)) / 255      q = min(127, round(x / scale) + zero)
//             zero = round(-min(x, 0) / scale) - 128     sum_k (q - zero) value, as integers
//
// Integer sums are exact; float ones as core/gemm.h has them, in chains that are whole groups where
// there are scales.
//
// Source: torch.nn.functional.linear; Goto, van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", for packing; Dettmers et al., "QLoRA" (NF4), "LLM.int8()" (int8_dynamic).
#pragma once

#include "core/activation.h"
#include "core/gemm.h"
#include "core/isa_list.h"
#include "core/rows.h"

namespace warpformer {

enum class Format : int { f32, f16, bf16, int8, int8_dynamic, int4, int4_dynamic, nf4 };

static constexpr bool is_4_bit(Format f) { return f >= Format::int4; }
/// Whether x is made into integers.
constexpr bool is_dynamic(Format f) {
  return f == Format::int8_dynamic || f == Format::int4_dynamic;
}
/// Bits of an element.
static constexpr int64_t bits_of(Format f) {
  return is_4_bit(f) ? 4 : f >= Format::int8 ? 8 : f == Format::f32 ? 32 : 16;
}

constexpr int64_t kBlock = 32;  // neighbours along K that int4_dynamic quantizes together
constexpr int64_t kMaxInt8Depth = 1 << 16;  // of int8_dynamic: beyond it, 255 * 127 * K overflows

/// Elements along K of a tile on CUDA.
constexpr int64_t tile_depth(Format f) { return is_4_bit(f) ? 64 : 32; }

/// The depth up to whole fetches of packed values, of 8 codes or of 1, 2 or 4 elements, or up to
/// whole blocks.
int64_t padded_depth(Format format, int64_t depth);

/// A packed weight: W [panels * 16, depth].
struct Weight {
  uint8_t* data = nullptr;
  Format format = Format::f32;
  int64_t depth = 0, panels = 0;
  int64_t group = 0, groups = 0;  // elements of a group; 0 groups where it is a whole row
  int64_t scales = 0, zeros = 0, sums = 0, factors = 0,
          size = 0;  // of a panel, in bytes; 0: there are none. `scales` is that of CUDA
};
/// Whether a weight can be quantized in such groups; those of the depth or more are whole rows.
bool is_group(Format format, int64_t group, int64_t depth);
/// With all offsets, from the rest.
Weight weight_layout(Format format, int64_t depth, int64_t panels, int64_t group, bool zeros);

/// What `values` are, in memory of the caller: floats or s8 [N, K], or codes [N, K / 2].
struct PackLinearParams {
  Rows values, scales, zeros;  // data is null where there are none
  Weight weight;
  int64_t half;  // rows of the gate, which end in a panel of their own; 0 without
  // unpack_linear: row i of `values` is row index[i] of W, if given
  const int64_t* index = nullptr;
};

/// grouped_linear on CUDA: where the rows of each expert end. Without there is one weight, of all
/// rows.
struct Experts {
  const void* ends = nullptr;  // i32 or i64 [count], on the device
  bool wide = false;           // i64
  int count = 0;
};

struct LinearParams {
  Rows x, bias, residual, out;  // data is null where bias or residual is not given
  Weight weight;
  bool gated;
  Activation activation;
  int64_t bias_row;
  int64_t first, rows;  // of x and out
  // of CUDA, where `first` is 0 and not read:
  Experts experts;
  void* workspace = nullptr;  // of workspace_size() bytes
};

namespace cuda {
/// Bytes that linear needs beside: x as it multiplies it, where it does not lie so already.
int64_t workspace_size(const Rows& x, Format format);
}  // namespace cuda

/// dx [.., K] = dy [.., N] W
struct LinearBackwardParams {
  Rows dy, dx;
  Weight weight;
  int64_t first, rows;
  Experts experts;  // of CUDA, where `first` is 0
};

DECLARE_KERNEL(linear, LinearParams)
DECLARE_KERNEL(linear_backward, LinearBackwardParams)
DECLARE_KERNEL(pack_linear, PackLinearParams)
DECLARE_KERNEL(unpack_linear, PackLinearParams)

}  // namespace warpformer

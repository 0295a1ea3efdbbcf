// Quantized weights on CUDA: where their codes lie (op.h has the picture), and how a lane makes A
// of mma out of its 16 bytes of a tile.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"
#include "linear/op.h"

namespace warpformer::cuda {

constexpr int kTileBytes = 512, kLaneBytes = 16;

/// 4-bit NormalFloat ("QLoRA", appendix E).
constexpr float kNormalFloat[16] = {
    -1.0f,           -0.69619280099f, -0.52507305145f, -0.39491748809f,
    -0.28444138169f, -0.18477343023f, -0.09105003625f, 0.0f,
    0.07958029955f,  0.16093020141f,  0.24611230195f,  0.33791524171f,
    0.44070982933f,  0.56261700391f,  0.72295683622f,  1.0f};

/// is_4_bit and tile_depth, which are of the host.
DEVICE bool has_4_bits(Format f) { return f >= Format::int4; }
DEVICE int depth_of_tile(Format f) { return has_4_bits(f) ? 64 : 32; }

/// Where the code of an element of a tile lies.
struct Place {
  int lane, word, bit;
};
DEVICE Place place_of(Format format, int row, int k) {
  const bool bytes = format == Format::int8_dynamic || format == Format::int4_dynamic;
  const int depth = bytes ? 32 : 16,
            of_lane = depth / 8;  // of a fragment; neighbours of a register
  const int fragment = k / depth, in = k % depth, half = in / (depth / 2), i = in % of_lane;
  const int lane = row % 8 * 4 + in % (depth / 2) / of_lane, reg = row / 8 + 2 * half;
  switch (format) {
    case Format::int4:
      return {lane, fragment, 4 * reg + 16 * i};
    case Format::nf4:
      return {lane, fragment, 8 * reg + 4 * i};
    case Format::int8:
      return {lane, 2 * fragment + half, 8 * (reg % 2) + 16 * i};
    case Format::int4_dynamic:
      return {lane, 2 * fragment + half, 8 * i + 4 * (reg % 2)};
    default:
      return {lane, reg, 8 * i};
  }
}

// Numbers of a few bits are made into floats by putting them into the low bits of the significand
// of 2^7 (bf16) or 2^10 (f16), which is then subtracted: both are exact.
template <class T>
constexpr uint32_t kMagic = 0x43004300;
template <>
inline constexpr uint32_t kMagic<f16> = 0x64006400;
constexpr uint32_t kSigns = 0x80008000;

/// -(2^7 + zero), or 2^10, twice: what int4 has to be added.
template <class T>
DEVICE uint32_t minus_zero(uint32_t zero) {
  return kMagic<T> | kSigns | zero | zero << 16;
}

/// A fragment of mma_m16n8k16 of int4 codes; `zeros` of rows g and g + 8.
template <class T>
DEVICE void from_int4(uint32_t word, const uint32_t (&zeros)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
    a[r] = add2<T>(mask_xor<0x000f000f, kMagic<T>>(word >> 4 * r), zeros[r % 2]);
}

/// The numbers of two bytes with a sign, the low ones of two halves.
template <class T>
DEVICE uint32_t from_bytes(uint32_t bits) {
  if constexpr (std::is_same_v<T, f16>) {
    return add2<T>(mask_xor<0x00ff00ff, kMagic<T> | 0x00800080>(bits),
                   0xe480e480);  // -(2^10 + 2^7)
  } else {
    // 7 bits in the significand of 2^7; the sign makes -2^7 of what is added to them -2^8.
    return add2<T>(mask_xor<0x007f007f, kMagic<T>>(bits),
                   mask_xor<0x00800080, kMagic<T> | kSigns>(bits));
  }
}

/// The same of the 8 bits of int8.
template <class T>
DEVICE void from_int8(const uint32_t (&words)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = from_bytes<T>(words[r / 2] >> 8 * (r % 2));
}

/// A fragment of mma_m16n8k32 of int4_dynamic codes, less 8, times 16.
DEVICE void from_int4_dynamic(const uint32_t (&words)[2], uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = (r % 2 ? words[r / 2] : words[r / 2] << 4) & 0xf0f0f0f0;
}

// A byte of two codes of nf4 is looked up in a table of pairs. Lanes 0 .. 15 each have one of their
// own, shared with lanes 16 .. 31, so that few lookups wait for the same bank of shared memory.
// What bf16 rounds off the values is a second table.
constexpr int kTables = 16, kTableBytes = 256 * kTables * 4;

/// By the first `threads` of the block.
template <class T>
DEVICE void fill_table(const float (&values)[16], bool low, Shared<uint32_t> table,
                       int threads = block_threads()) {
  for (int i = thread_index(); i < 256 * kTables; i += threads) {
    const int byte = i / kTables;
    float even = values[byte % 16], odd = values[byte / 16];
    if (low) {
      even -= to_float(from_float<T>(even));
      odd -= to_float(from_float<T>(odd));
    }
    table.store(i, pack2<T>(even, odd));
  }
}
DEVICE void from_nf4(uint32_t word, Shared<uint32_t> table, uint32_t (&a)[4]) {
  const int lane = lane_index() % kTables;
#pragma unroll
  for (int r = 0; r < 4; ++r)
    a[r] = table.load(static_cast<int>(word >> 8 * r & 255) * kTables + lane);
}

}  // namespace warpformer::cuda

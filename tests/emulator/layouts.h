// Who holds which element: the register and shared-memory layouts of the matrix instructions and of
// the bulk tensor copies, as pure functions. The emulator runs on them, and tests/emulator checks
// them one element at a time. They follow the PTX ISA; hardware has confirmed those that the golden
// files of tests/conformance cover.
#pragma once

#include <cstdint>

namespace warpformer::emulator {

/// An element of a matrix. Of operand B: row k, column n.
struct Element {
  int row, column;
};

// Fragments of mma.m16n8kK. Registers are 32 bits and hold P = 4 / sizeof(element) elements, lowest
// bits first: P = 1 (tf32, K = 8), 2 (bf16 and f16, K = 16) or 4 (s8, K = 32). Lane l has g = l / 4
// and t = l % 4; "Pt.." stands for the P neighbours Pt, Pt + 1 .. Pt + P - 1.
//
//   A, 16 x K             Pt..      4P + Pt..      B, K x 8              g
//              row g    | r0           r2                   row Pt..   | r0
//              row g+8  | r1           r3                   row 4P+Pt..| r1
//
//   C and D, 16 x 8       2t   2t+1
//              row g    | c0    c1
//              row g+8  | c2    c3

constexpr Element mma_a(int lane, int element, int per_register) {
  int r = element / per_register, i = element % per_register;
  return {lane / 4 + 8 * (r % 2), per_register * (lane % 4) + i + 4 * per_register * (r / 2)};
}

constexpr Element mma_b(int lane, int element, int per_register) {
  int r = element / per_register, i = element % per_register;
  return {per_register * (lane % 4) + i + 4 * per_register * r, lane / 4};
}

constexpr Element mma_c(int lane, int element) {
  return {lane / 4 + 8 * (element / 2), 2 * (lane % 4) + element % 2};
}

// ldmatrix and stmatrix: 8 x 8 matrices of 2-byte elements, one register of each matrix a lane.
// Lane 8m + r gives the address of row r of matrix m (16 bytes). A lane's register holds
//
//   plain        row g, columns 2t and 2t + 1
//   transposed   rows 2t and 2t + 1, column g

constexpr Element matrix_element(int lane, int half, bool transposed) {
  int g = lane / 4, i = 2 * (lane % 4) + half;
  return transposed ? Element{i, g} : Element{g, i};
}

// wgmma.m64nN: warp w (of the four) holds rows 16w .. 16w + 15 of A (in registers) and of D; within
// them A is the fragment of mma, and D is N / 8 fragments of mma side by side:
//
//                8j+2t     8j+2t+1       j = 0 .. N/8 - 1
//     row g    | d[4j]     d[4j+1]
//     row g+8  | d[4j+2]   d[4j+3]

constexpr Element wgmma_a(int thread, int element, int per_register) {
  Element p = mma_a(thread % 32, element, per_register);
  return {p.row + 16 * (thread / 32), p.column};
}

constexpr Element wgmma_d(int thread, int element) {
  Element p = mma_c(thread % 32, element % 4);
  return {p.row + 16 * (thread / 32), p.column + 8 * (element / 4)};
}

// Swizzles exchange the 16-byte chunks of a span of W = 32, 64 or 128 bytes according to the number
// of its 128-byte line: the bits of the address below W, down to 16, are XORed with those from 128
// up. W = 16 is no swizzle. The pattern of W = 128 (a line a row, chunks in the order of memory):
//
//     address bits    9 8 7 | 6 5 4 | 3..0        line 0   0 1 2 3 4 5 6 7
//                     y y y | x x x | byte        line 1   1 0 3 2 5 4 7 6
//                          x ^= y                 line 2   2 3 0 1 6 7 4 5 ..

constexpr uint32_t swizzled(uint32_t address, uint32_t span) {
  return address ^ ((address >> 3) & (span - 16));
}

// The 64-bit descriptor of a wgmma operand in shared memory (addresses and offsets count 16 bytes):
//
//     63 62        51..49        45..32      29..16       13..0
//     swizzle      base offset   stride      leading      start
//     0 none, 1 128 B, 2 64 B, 3 32 B
struct MatrixDescriptor {
  uint32_t start, leading, stride, base_offset, span;
};

constexpr MatrixDescriptor decode(uint64_t bits) {
  constexpr uint32_t spans[] = {16, 128, 64, 32};
  return {uint32_t(bits & 0x3fff) << 4, uint32_t(bits >> 16 & 0x3fff) << 4,
          uint32_t(bits >> 32 & 0x3fff) << 4, uint32_t(bits >> 49 & 7), spans[bits >> 62]};
}

// Where element (i, k) of a wgmma operand lies; i is the row of A or the column of B. Everything is
// made of 16-byte chunks. A unit is eight lines of W bytes, one below the other; W is the swizzle's
// span, or 16 without one: then a line is a chunk.
//
//   K-major: neighbours in memory are neighbours in k
//
//                  k chunk 0, 1                W > 16: chunks lie side by side in the line
//        i = 0    | unit          | unit       W = 16: `leading` bytes from chunk 0 to chunk 1
//        ..   7   |               |
//        i = 8    | unit          | unit       `stride` bytes from the unit above
//
//   MN-major: neighbours in memory are neighbours in i
//
//                  i in a line    i in the next
//        k = 0    | unit        | unit         `leading` bytes from the unit to the left (W > 16)
//        ..   7   |             |
//        k = 8    | unit        | unit         `stride` bytes from the unit above (W > 16)
//
// With W = 16, MN-major takes the two the other way round. The swizzle acts on the bits of the
// final address, counted from where its pattern starts.
constexpr uint32_t operand_address(const MatrixDescriptor& d, bool mn_major, int element_bytes,
                                   int i, int k) {
  uint32_t along = (mn_major ? i : k) * element_bytes, across = mn_major ? k : i;
  uint32_t chunk = along / 16, eight = across / 8, line = across % 8, offset = 0;
  if (mn_major && d.span == 16) {
    offset = line * 16 + eight * d.leading + chunk * d.stride;
  } else if (mn_major || d.span == 16) {
    uint32_t chunks = d.span / 16;
    offset = line * d.span + eight * d.stride + chunk % chunks * 16 + chunk / chunks * d.leading;
  } else {
    offset = line * d.span + eight * d.stride + chunk * 16;
  }
  uint32_t pattern = d.base_offset << 7;
  uint32_t address = d.start + offset + along % 16;
  return swizzled(address - pattern, d.span) + pattern;
}

/// Where a bulk tensor copy puts the byte `inner` of the box's line `line`: lines of `pitch` bytes
/// one after the other, swizzled by the bits of the address itself.
constexpr uint32_t box_address(uint32_t start, uint32_t line, uint32_t inner, uint32_t pitch,
                               uint32_t span) {
  return swizzled(start + line * pitch + inner, span);
}

}  // namespace warpformer::emulator

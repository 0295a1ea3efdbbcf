// ldmatrix, stmatrix, movmatrix and mma: the last of the 32 lanes to come does the work of all.
#include "emulator/matrix.h"

#include <cstring>

#include "emulator/layouts.h"
#include "emulator/widen.h"

namespace warpformer::emulator {
namespace {

constexpr uint32_t kRowBytes = 16;  // of an 8 x 8 matrix of 2-byte elements

struct MatrixLane {
  uint32_t row;
  uint32_t* registers;
  int count;
  const char* op;
  Where where;
};

// Copies between the `count` matrices at the rows that lanes give and the registers of all lanes.
template <bool store, bool transposed>
void move_matrices(MatrixLane* const* lanes) {
  const MatrixLane& first = *lanes[0];
  for (int m = 0; m < first.count; ++m) {
    uint16_t matrix[8][8];
    std::byte* rows[8];
    for (int r = 0; r < 8; ++r) {
      const int lane = 8 * m + r;
      rows[r] = shared_access(store ? Access::write : Access::read, lanes[lane]->row, kRowBytes,
                              kRowBytes, first.op, first.where, thread_of_lane(lane));
      if (!store) std::memcpy(matrix[r], rows[r], kRowBytes);
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint16_t halves[2];
      if (store) std::memcpy(halves, &lanes[lane]->registers[m], 4);
      for (int half = 0; half < 2; ++half) {
        const Element e = matrix_element(lane, half, transposed);
        if (store)
          matrix[e.row][e.column] = halves[half];
        else
          halves[half] = matrix[e.row][e.column];
      }
      if (!store) std::memcpy(&lanes[lane]->registers[m], halves, 4);
    }
    if (store)
      for (int r = 0; r < 8; ++r) std::memcpy(rows[r], matrix[r], kRowBytes);
  }
}

struct TransposedLane {
  uint32_t given, received;
};

void transpose(TransposedLane* const* lanes) {
  uint16_t matrix[8][8], halves[2];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(halves, &lanes[lane]->given, 4);
    for (int half = 0; half < 2; ++half) {
      const Element e = matrix_element(lane, half, false);
      matrix[e.row][e.column] = halves[half];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int half = 0; half < 2; ++half) {
      const Element e = matrix_element(lane, half, true);
      halves[half] = matrix[e.row][e.column];
    }
    std::memcpy(&lanes[lane]->received, halves, 4);
  }
}

struct MmaLane {
  void* d;
  const uint32_t *a, *b;
};

// Registers as rows: a[i] holds row i of A, b[r] all columns of the rows of B that one register
// holds.
struct Fragments {
  uint32_t a[16][8], b[8][8];
  U8 packed_a(int row) const { return load<U8>(a[row]); }
  U8 packed_b(int r) const { return load<U8>(b[r]); }
};

Fragments gather(MmaLane* const* lanes) {
  Fragments f;
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    const uint32_t *a = lanes[lane]->a, *b = lanes[lane]->b;
    f.a[g][t] = a[0], f.a[g + 8][t] = a[1], f.a[g][t + 4] = a[2], f.a[g + 8][t + 4] = a[3];
    f.b[t][g] = b[0], f.b[t + 4][g] = b[1];
  }
  return f;
}

// The 16 x 8 tile of accumulators, from and to the lanes: pairs of neighbours.
template <class T>
struct Tile {
  alignas(32) T rows[16][8];
  explicit Tile(MmaLane* const* lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half)
        std::memcpy(&rows[lane / 4 + 8 * half][lane % 4 * 2],
                    static_cast<const T*>(lanes[lane]->d) + 2 * half, 2 * sizeof(T));
  }
  void scatter(MmaLane* const* lanes) const {
    for (int lane = 0; lane < 32; ++lane)
      for (int half = 0; half < 2; ++half)
        std::memcpy(static_cast<T*>(lanes[lane]->d) + 2 * half,
                    &rows[lane / 4 + 8 * half][lane % 4 * 2], 2 * sizeof(T));
  }
};

// In floats: products and (of s8) their sums are exact. Four rows at once hide the latency of a
// sum.
template <MatrixType type>
[[gnu::always_inline]] inline void multiply(MmaLane* const* lanes) {
  constexpr bool integer = type == MatrixType::s8;
  constexpr int per_register = 4 / element_bytes(type), depth = 8 * per_register, together = 4;
  using Accumulator = std::conditional_t<integer, int32_t, float>;
  const Fragments f = gather(lanes);
  F8 b[depth];
  alignas(32) float a[16][depth];
  for (int i = 0; i < per_register; ++i) {
    for (int r = 0; r < 8; ++r) b[8 * i + r] = widen<type>(f.packed_b(r), i);
    for (int row = 0; row < 16; ++row) store(&a[row][8 * i], widen<type>(f.packed_a(row), i));
  }
  Tile<Accumulator> tile(lanes);
  for (int row = 0; row < 16; row += together) {
    F8 sum[together] = {};
    if (!integer)
      for (int i = 0; i < together; ++i) sum[i] = load<F8>(tile.rows[row + i]);
    for (int k = 0; k < depth; ++k)
      for (int i = 0; i < together; ++i) sum[i] += a[row + i][k] * b[k];
    for (int i = 0; i < together; ++i) {
      if constexpr (integer) {
        const U8 old = load<U8>(tile.rows[row + i]);
        store(tile.rows[row + i], old + reinterpret_cast<U8>(__builtin_convertvector(sum[i], I8)));
      } else {
        store(tile.rows[row + i], sum[i]);
      }
    }
  }
  tile.scatter(lanes);
}

FOR_EACH_CPU void multiply_bf16(MmaLane* const* lanes) { multiply<MatrixType::bf16>(lanes); }
FOR_EACH_CPU void multiply_f16(MmaLane* const* lanes) { multiply<MatrixType::f16>(lanes); }
FOR_EACH_CPU void multiply_tf32(MmaLane* const* lanes) { multiply<MatrixType::tf32>(lanes); }
FOR_EACH_CPU void multiply_s8(MmaLane* const* lanes) { multiply<MatrixType::s8>(lanes); }

}  // namespace

void ldmatrix(uint32_t* registers, int count, bool transposed, uint32_t row, Where where) {
  const char* op = transposed ? "ldmatrix_transposed" : "ldmatrix";
  MatrixLane lane{row, registers, count, op, where};
  if (transposed)
    warp_collective(op, where, lane, [](auto lanes) { move_matrices<false, true>(lanes); });
  else
    warp_collective(op, where, lane, [](auto lanes) { move_matrices<false, false>(lanes); });
}

void stmatrix(uint32_t row, const uint32_t* registers, int count, bool transposed, Where where) {
  const char* op = transposed ? "stmatrix_transposed" : "stmatrix";
  MatrixLane lane{row, const_cast<uint32_t*>(registers), count, op, where};
  if (transposed)
    warp_collective(op, where, lane, [](auto lanes) { move_matrices<true, true>(lanes); });
  else
    warp_collective(op, where, lane, [](auto lanes) { move_matrices<true, false>(lanes); });
}

uint32_t movmatrix_transposed(uint32_t matrix, Where where) {
  TransposedLane lane{matrix, 0};
  warp_collective("movmatrix_transposed", where, lane, [](auto lanes) { transpose(lanes); });
  return lane.received;
}

void mma(MatrixType type, void* d, const uint32_t* a, const uint32_t* b, Where where) {
  MmaLane lane{d, a, b};
  switch (type) {
    case MatrixType::bf16:
      return warp_collective("mma_m16n8k16", where, lane, [](auto all) { multiply_bf16(all); });
    case MatrixType::f16:
      return warp_collective("mma_m16n8k16", where, lane, [](auto all) { multiply_f16(all); });
    case MatrixType::tf32:
      return warp_collective("mma_m16n8k8", where, lane, [](auto all) { multiply_tf32(all); });
    case MatrixType::s8:
      return warp_collective("mma_m16n8k32", where, lane, [](auto all) { multiply_s8(all); });
  }
}

}  // namespace warpformer::emulator

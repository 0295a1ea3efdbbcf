// Tiles of q, k, v and their like in shared memory, and the fragments of mma that a warp reads from
// them. A row of a tile is kWidth elements; the 16-byte chunks of row r lie at (chunk XOR r % 8),
// so that eight rows of a column of chunks, which is what ldmatrix reads, lie in different banks.
#pragma once

#include "core/cuda/math.cuh"
#include "core/cuda/matrix.cuh"
#include "core/cuda/memory.cuh"
#include "core/heads.h"

namespace warpformer::cuda::attend {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;

/// Rows of one head of one sequence in global memory.
template <class T>
struct Source {
  T* data;
  int64_t stride, step;
  int count, width;
  bool is_vector;  // whether 16-byte accesses can walk every row

  DEVICE Source(const Heads& t, int64_t batch, int64_t head, int64_t first, int count, int width)
      : data(reinterpret_cast<T*>(t.data) + batch * t.stride[0] + head * t.stride[1] +
             first * t.stride[2]),
        stride(t.stride[2]),
        step(t.stride[3]),
        count(count),
        width(width) {
    constexpr int kChunk = Vector<T>::size;
    is_vector = step == 1 && stride % kChunk == 0 && width % kChunk == 0 &&
                reinterpret_cast<uintptr_t>(data) % 16 == 0;
  }
};

template <class T, int kRows, int kWidth>
struct Tile {
  static constexpr int kChunk = Vector<T>::size, kChunks = kWidth / kChunk;
  static constexpr int kBytes = kRows * kWidth * static_cast<int>(sizeof(T));
  static constexpr int kRowsAtOnce = kThreads / kChunks;
  Shared<T> data;

  /// Element 0 of a chunk.
  DEVICE Shared<T> at(int row, int chunk) const {
    return data + (row * kWidth + (chunk ^ row % 8) * kChunk);
  }

  /// f(row, chunk, its element 0) for the chunks of this thread. Warps share rows.
  template <class F>
  DEVICE void each_chunk(F f) const {
    const int chunk = thread_index() % kChunks, first = opaque(thread_index() / kChunks);
    const int offset = first * kWidth + (chunk ^ first % 8) * kChunk;
#pragma unroll 4  // not all at once, for the registers
    for (int r = 0; r < kRows; r += kRowsAtOnce)
      f(first + r, chunk, data + ((offset ^ r % 8 * kChunk) + r * kWidth));
  }

  /// Rows from `row` and columns from `column` on, zeros where there are none; they are there after
  /// the wait for this thread's copies and a barrier.
  DEVICE void load(const Source<T>& from, int row, int column = 0) const {
    if (from.is_vector) {
      const T* next = nullptr;
      each_chunk([&](int r, int chunk, Shared<T> to) {
        const int c = column + chunk * kChunk;
        next = next ? next + kRowsAtOnce * from.stride : from.data + (row + r) * from.stride + c;
        copy_async16(to, next, row + r < from.count && c < from.width);
      });
      return;
    }
    const int chunk = thread_index() % kChunks, c = column + chunk * kChunk;
#pragma unroll 1
    for (int r = thread_index() / kChunks; r < kRows; r += kRowsAtOnce) {
      const Shared<T> to = at(r, chunk);
#pragma unroll 1  // few registers count more here than speed
      for (int i = 0; i < kChunk; ++i)
        to.store(i, row + r < from.count && c + i < from.width
                        ? cuda::load(from.data + (row + r) * from.stride + (c + i) * from.step)
                        : T{});
    }
  }
};

/// What mma takes of T: products of 16-bit elements are of depth 16; those of floats of depth 8, in
/// terms of tf32.
template <class T>
constexpr int kDepth = sizeof(T) == 2 ? 16 : 8;

/// Where a lane's part of the fragments of a tile lies: the element for those at row 0 and chunk 0.
/// From there fragments are a XOR of chunks and a sum of rows away, both known at compile time.
template <class T, int kRows, int kWidth>
struct Fragments {
  using Tile = attend::Tile<T, kRows, kWidth>;
  Tile tile;
  int offset;

  DEVICE Fragments(const Tile& tile, int row, int chunk)
      : tile(tile), offset(opaque(row * kWidth + (chunk ^ row % 8) * Tile::kChunk)) {}
  /// `row` is a multiple of 8.
  DEVICE Shared<T> at(int row, int chunk) const {
    return tile.data + ((offset ^ chunk * Tile::kChunk) + row * kWidth);
  }
};
/// A: rows [row, row + 16) of a tile, kDepth columns.
template <class T, int kRows, int kWidth>
DEVICE Fragments<T, kRows, kWidth> a_of(const Tile<T, kRows, kWidth>& tile, int row) {
  return {tile, row + lane_index() % 16, lane_index() / 16};
}
template <class T, int kRows, int kWidth>
DEVICE void load_a(uint32_t (&a)[4], const Fragments<T, kRows, kWidth>& x, int row, int column) {
  ldmatrix(a, x.at(row, column / Vector<T>::size));
}
/// B of two neighbouring mmas, whose columns are rows [row, row + 16) of a tile.
template <class T, int kRows, int kWidth>
DEVICE Fragments<T, kRows, kWidth> b_of(const Tile<T, kRows, kWidth>& tile) {
  return {tile, lane_index() / 16 * 8 + lane_index() % 8, lane_index() / 8 % 2};
}
template <class T, int kRows, int kWidth>
DEVICE void load_b(uint32_t (&b)[2][2], const Fragments<T, kRows, kWidth>& x, int row, int column) {
  ldmatrix(b, x.at(row, column / Vector<T>::size));
}
/// B of two neighbouring mmas: kDepth rows from `row` and columns [column, column + 16) of a tile.
/// Those of floats come in the order of Weights: 0 2 4 6 1 3 5 7.
template <class T, int kRows, int kWidth>
DEVICE Fragments<T, kRows, kWidth> b_rows_of(const Tile<T, kRows, kWidth>& tile) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) return {tile, lane % 16, lane / 16};
  return {tile, 2 * (lane % 4), lane / 16};
}
template <class T, int kRows, int kWidth>
DEVICE void load_b_rows(uint32_t (&b)[2][2], const Fragments<T, kRows, kWidth>& x, int row,
                        int column) {
  if constexpr (sizeof(T) == 2) {
    ldmatrix_transposed(b, x.at(row, column / Vector<T>::size));
  } else {
    Fragments<T, kRows, kWidth> lane = x;
    lane.offset = opaque(x.offset);  // so that it is not read long before
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // an odd row has its chunks one place aside
      const int odd = i % 2, chunk = column / 4 + i / 2 * 2;
      const Shared<T> from = lane.at(row, chunk ^ odd) + (odd * kWidth + lane_index() / 4 % 4);
      b[i / 2][odd] = bits_as<uint32_t>(from.load());
    }
  }
}
/// Accumulators as A of a product whose depth is their columns.
template <class T, int kBlocks, int kCount>
struct Weights {
  uint32_t a[kBlocks][8 * kCount / kDepth<T>][4];

  DEVICE explicit Weights(const float (&p)[kBlocks][kCount][4]) {
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int j = 0; j < 8 * kCount / kDepth<T>; ++j) {
        if constexpr (sizeof(T) == 2) {
          a[m][j][0] = pack2<T>(p[m][2 * j][0], p[m][2 * j][1]);
          a[m][j][1] = pack2<T>(p[m][2 * j][2], p[m][2 * j][3]);
          a[m][j][2] = pack2<T>(p[m][2 * j + 1][0], p[m][2 * j + 1][1]);
          a[m][j][3] = pack2<T>(p[m][2 * j + 1][2], p[m][2 * j + 1][3]);
        } else {
          a[m][j][0] = bits_as<uint32_t>(p[m][j][0]);
          a[m][j][1] = bits_as<uint32_t>(p[m][j][2]);
          a[m][j][2] = bits_as<uint32_t>(p[m][j][1]);
          a[m][j][3] = bits_as<uint32_t>(p[m][j][3]);
        }
      }
  }
};

/// x = high + low but for 22 bits of it, and x itself but for 33 with what is left.
template <int kCount>
DEVICE void split(const uint32_t (&x)[kCount], uint32_t (&high)[kCount], uint32_t (&low)[kCount],
                  uint32_t (&left)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float value = bits_as<float>(x[i]);
    high[i] = to_tf32(value);
    const float rest = value - bits_as<float>(high[i]);
    low[i] = to_tf32(rest);
    left[i] = to_tf32(rest - bits_as<float>(low[i]));
  }
}
DEVICE void add(float (&d)[4], const float (&x)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) d[e] += x[e];
}
/// d += a b. Terms of tf32, the small ones first, have the error of float; they are a sum of their
/// own, so that d is rounded once. Of weights 22 bits count, which leaves registers.
template <class T, bool kWeights = false>
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(d, a, b);
  } else {
    uint32_t a_high[4], a_low[4], a_left[4], b_high[2], b_low[2], b_left[2];
    split(a, a_high, a_low, a_left);
    split(b, b_high, b_low, b_left);
    float sum[4] = {};
    if constexpr (!kWeights) mma_m16n8k8(sum, a_left, b_high);
    mma_m16n8k8(sum, a_high, b_left);
    mma_m16n8k8(sum, a_low, b_high);
    mma_m16n8k8(sum, a_high, b_low);
    mma_m16n8k8(sum, a_high, b_high);
    add(d, sum);
  }
}

/// s[m][n] += x y^T: kBlocks times 16 rows of x from `row` on, all rows of y.
template <class T, int kBlocks, int kCount, class X, class Y>
DEVICE void multiply_rows(float (&s)[kBlocks][kCount][4], const X& x, int row, const Y& y) {
  const auto from = a_of(x, row);
  const auto to = b_of(y);
#pragma unroll(sizeof(T) == 2 ? 2 : 1)  // what is read ahead takes registers
  for (int d = 0; d < X::kChunks * X::kChunk; d += kDepth<T>) {
    uint32_t a[kBlocks][4];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m) load_a(a[m], from, 16 * m, d);
#pragma unroll
    for (int n = 0; n < kCount; n += 2) {
      uint32_t b[2][2];
      load_b(b, to, 8 * n, d);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) multiply<T>(s[m][n + i], a[m], b[i]);
    }
  }
}

/// o[m][n] += p y, of all rows of y.
template <class T, int kBlocks, int kCount, int kColumns, class Y>
DEVICE void multiply_weights(float (&o)[kBlocks][kColumns][4], const Weights<T, kBlocks, kCount>& p,
                             const Y& y) {
  const auto from = b_rows_of(y);
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j)
#pragma unroll
      for (int n = 0; n < kColumns; n += 2) {
        uint32_t b[2][2];
        load_b_rows(b, from, 16 * j, 8 * n);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) multiply<T>(o[m][n + i], p.a[m][j], b[i]);
      }
  } else {  // summed per call first: a sum of many keys then rounds less
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      float sum[kBlocks][2][4] = {};
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        uint32_t a[kBlocks][4];
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int r = 0; r < 4; ++r) a[m][r] = opaque(p.a[m][j][r]);  // terms are not kept
        uint32_t b[2][2];
        load_b_rows(b, from, 8 * j, 8 * n);
#pragma unroll
        for (int m = 0; m < kBlocks; ++m)
#pragma unroll
          for (int i = 0; i < 2; ++i) multiply<T, true>(sum[m][i], a[m], b[i]);
      }
#pragma unroll
      for (int m = 0; m < kBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) add(o[m][n + i], sum[m][i]);
    }
  }
}

/// f(block, half, row from the warp's first one on) for the rows that this thread has a part of.
template <int kBlocks, class F>
DEVICE void each_row(F f) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h) f(m, h, 16 * m + 8 * h + lane_index() / 4);
}
/// Accumulators of 16 kBlocks rows from `row` on -> a tile of the same width.
template <class T, int kRows, int kWidth, int kBlocks>
DEVICE void store_accumulators(const float (&o)[kBlocks][kWidth / 8][4],
                               const Tile<T, kRows, kWidth>& tile, int row) {
  constexpr int kChunk = Vector<T>::size;
  const int lane = lane_index(), column = 2 * (lane % 4);
  const Fragments<T, kRows, kWidth> to(tile, row + lane / 4, column / kChunk);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < kWidth / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        to.at(16 * m + e / 2 * 8, n * 8 / kChunk)
            .store(column % kChunk + e % 2, from_float<T>(o[m][n][e]));
}
/// f(register, row, column) for the elements of this thread, from the warp's first ones on.
template <int kBlocks, int kCount, class F>
DEVICE void each_element(float (&s)[kBlocks][kCount][4], F f) {
#pragma unroll
  for (int m = 0; m < kBlocks; ++m)
#pragma unroll
    for (int n = 0; n < kCount; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        f(s[m][n][e], 16 * m + 8 * (e / 2) + lane_index() / 4,
          8 * n + 2 * (lane_index() % 4) + e % 2);
}

}  // namespace warpformer::cuda::attend

// Products of a warp's 16 rows with a tile of 32 slots in shared memory, and of their weights with
// its values: by mma where queries are bf16 or f16, in float where they are float. Scores and sums
// lie in a warp as mma has them, lane = 4 g + t, whichever does it:
//
//                 slots 8n + 2t, + 1                           columns (column_of) of fragment n
//   row g       | s[n][0]  s[n][1] |   n = 0 .. 3            | o[n][0]  o[n][1] |   n = 0 .. 15
//   row g + 8   | s[n][2]  s[n][3] |                         | o[n][2]  o[n][3] |
//
// int8 becomes the type of the queries in registers, exactly for keys, times its scale for values.
#pragma once

#include "core/cuda/matrix.cuh"
#include "core/cuda/memory.cuh"

namespace warpformer::cuda {

constexpr int kTile = 32;         // slots
constexpr int kScores = 4;        // fragments of 8 slots
constexpr int kOutputs = 16;      // fragments of 8 columns
constexpr int kHalf = 64;         // columns that are worked on, or not, together
constexpr int kWeightPitch = 36;  // floats of a row of weights in shared memory
using Scores = float[kScores][4];
using Outputs = float[kOutputs][4];

/// Of a lane: the scales of slots 8n + 2t + i, 1 where the cache has none; and what its rows g and
/// g + 8 see of the tile.
struct TileScales {
  float own;  // of the slot of the lane's number
  float values[kScores][2];
};
struct Sight {
  int begin[2], end[2];
};

/// Rows of a tile in shared memory, `pitch` elements apart: an odd number of 16 bytes, so that 8
/// neighbours do not share banks.
template <class E>
struct TileRows {
  Shared<E> data;
  int pitch, width;  // columns from `data` on
};

/// Byte i of a word whose bytes were offset by 128.
DEVICE float byte_at(uint32_t word, int i) {
  return bits_as<float>(0x4B000000u | (word >> 8 * i & 0xFF)) - 0x1.0001p23f;
}
constexpr uint32_t kByteOffset = 0x80808080u;

template <class T, class E>
class Products {
 public:
  /// The column, of the warp's 128, of element i of row g (or g + 8) in fragment n of Outputs.
  DEVICE static int column_of(int n, int i) {
    const int t = lane_index() % 4;
    return kBytes ? n / 2 * 16 + 4 * t + 2 * i + n % 2 : n * 8 + 2 * t + i;
  }

  /// query(r, column): of row g + 8 r.
  template <class F>
  DEVICE void read_queries(int column, F query) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      // Which columns of a step a lane has is free: those that it reads of a key together.
      const int low = column + 16 * k + (kBytes ? 4 : 2) * t, high = low + (kBytes ? 2 : 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        q_[k][r] = pack2<T>(query(r, low), query(r, low + 1));
        q_[k][2 + r] = pack2<T>(query(r, high), query(r, high + 1));
      }
    }
  }

  DEVICE void score(const TileRows<E>& keys, Scores& s) const {
    constexpr int kRead = kBytes ? 4 : 2;  // steps that 64 bytes of a key are
    const int lane = lane_index();
    const Shared<E> from = keys.data + (lane % 8 * keys.pitch + lane / 8 * Vector<E>::size);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * kHalf >= keys.width) break;
#pragma unroll
      for (int first = 4 * half; first < 4 * half + 4; first += kRead) {
        uint32_t read[kScores][4];
#pragma unroll
        for (int n = 0; n < kScores; ++n)
          ldmatrix(read[n], from + (8 * n * keys.pitch + 16 * first));
#pragma unroll
        for (int k = 0; k < kRead; ++k)
#pragma unroll
          for (int n = 0; n < kScores; ++n) {
            uint32_t b[2];
            if constexpr (kBytes) {
              const uint32_t word = read[n][k] ^ kByteOffset;
              b[0] = pack2<T>(byte_at(word, 0), byte_at(word, 1));
              b[1] = pack2<T>(byte_at(word, 2), byte_at(word, 3));
            } else {
              b[0] = read[n][2 * k], b[1] = read[n][2 * k + 1];
            }
            mma_m16n8k16<T>(s[n], q_[first + k], b);
          }
      }
    }
  }

  /// o += w v.
  DEVICE void add_values(const Scores& w, const TileRows<E>& values, const TileScales& scales,
                         Outputs& o) const {
    uint32_t p[2][4];
    pack_weights(w, p);
    each_pair(values, scales, [&](int pair, const uint32_t (&b)[2][2][2]) {
#pragma unroll
      for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int n = 0; n < 2; ++n) mma_m16n8k16<T>(o[2 * pair + n], p[k], b[k][n]);
    });
  }

  /// The same sums, without what a row does not see: 0 times NaN is NaN.
  DEVICE void add_seen_values(const Scores& w, const TileRows<E>& values, const TileScales& scales,
                              const Sight& sight, Outputs& o) const {
    uint32_t p[2][4];
    pack_weights(w, p);
    const int lane = lane_index();
#pragma unroll 1
    for (int row = 0; row < 16; ++row) {
      const int begin = shuffle(row < 8 ? sight.begin[0] : sight.begin[1], row % 8 * 4);
      const int end = shuffle(row < 8 ? sight.end[0] : sight.end[1], row % 8 * 4);
      const bool low = lane / 4 == row, high = lane / 4 + 8 == row;
      each_pair(values, scales, [&](int pair, const uint32_t (&b)[2][2][2]) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float (&to)[4] = o[2 * pair + n];
          float sum[4] = {to[0], to[1], to[2], to[3]};
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            uint32_t seen[2];
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int slot = 16 * k + 8 * j + lane % 4 * 2;
              const uint32_t first = begin <= slot && slot < end ? 0xFFFF : 0;
              const uint32_t second = begin <= slot + 1 && slot + 1 < end ? 0xFFFF0000 : 0;
              seen[j] = b[k][n][j] & (first | second);
            }
            mma_m16n8k16<T>(sum, p[k], seen);
          }
          if (low) to[0] = sum[0], to[1] = sum[1];
          if (high) to[2] = sum[2], to[3] = sum[3];
        }
      });
    }
  }

 private:
  static constexpr bool kBytes = sizeof(E) == 1;
  static constexpr int kSteps = 8;  // of 16 columns

  DEVICE static void pack_weights(const Scores& w, uint32_t (&p)[2][4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &w[2 * k + i / 2][i % 2 * 2];
        p[k][i] = pack2<T>(pair[0], pair[1]);
      }
  }

  /// f(pair, b): b[k][n] is the operand of slots 16k .. 16k + 15 for fragment 2 pair + n.
  template <class F>
  DEVICE static void each_pair(const TileRows<E>& values, const TileScales& scales, F f) {
    const int lane = lane_index();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half * kHalf >= values.width) break;
#pragma unroll
      for (int pair = 4 * half; pair < 4 * half + 4; ++pair) {
        uint32_t b[2][2][2];
        if constexpr (kBytes) {
          // Pairs of bytes, transposed: of slots 8m + 2t and 8m + 2t + 1 columns 2g and 2g + 1.
          uint32_t read[4];
          ldmatrix_transposed(read, values.data + (lane * values.pitch + 16 * pair));
#pragma unroll
          for (int m = 0; m < 4; ++m) {
            const uint32_t word = read[m] ^ kByteOffset;
            const float first = scales.values[m][0], second = scales.values[m][1];
#pragma unroll
            for (int n = 0; n < 2; ++n)
              b[m / 2][n][m % 2] =
                  pack2<T>(byte_at(word, n) * first, byte_at(word, 2 + n) * second);
          }
        } else {
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            const int row = 16 * k + lane % 16, column = 16 * pair + lane / 16 * 8;
            ldmatrix_transposed(b[k], values.data + (row * values.pitch + column));
          }
        }
        f(pair, b);
      }
    }
  }

  uint32_t q_[kSteps][4];
};

/// In float, element by element. Queries lie in shared memory, and so do the weights of the warp.
template <class E>
class Products<float, E> {
 public:
  DEVICE static int column_of(int n, int i) {
    return n / 2 * 16 + 4 * (lane_index() % 4) + 2 * i + n % 2;
  }

  /// queries: the row g = 0 of the warp, from its first column on.
  DEVICE Products(Shared<float> queries, int pitch, Shared<float> weights)
      : queries_(queries), weights_(weights), pitch_(pitch) {}

  DEVICE void score(const TileRows<E>& keys, Scores& s) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll 1
    for (int c = 0; c < keys.width; c += 4) {
      const Vector<float> q[2] = {queries_.load16(g * pitch_ + c),
                                  queries_.load16((g + 8) * pitch_ + c)};
#pragma unroll
      for (int n = 0; n < kScores; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Vector<float> key = four(keys.data + ((8 * n + 2 * t + i) * keys.pitch + c));
#pragma unroll
          for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int j = 0; j < 4; ++j) s[n][2 * r + i] = fma(q[r][j], key[j], s[n][2 * r + i]);
        }
    }
  }

  DEVICE void add_values(const Scores& w, const TileRows<E>& values, const TileScales& scales,
                         Outputs& o) const {
    add<false>(w, values, scales, {}, o);
  }
  DEVICE void add_seen_values(const Scores& w, const TileRows<E>& values, const TileScales& scales,
                              const Sight& sight, Outputs& o) const {
    add<true>(w, values, scales, sight, o);
  }

 private:
  DEVICE static Vector<float> four(Shared<E> from) {
    if constexpr (sizeof(E) == 4) {
      return from.load16();
    } else {
      const uint32_t word = from.template as<uint32_t>().load() ^ kByteOffset;
      return {byte_at(word, 0), byte_at(word, 1), byte_at(word, 2), byte_at(word, 3)};
    }
  }

  template <bool kSeen>
  DEVICE void add(const Scores& w, const TileRows<E>& values, const TileScales& scales,
                  const Sight& sight, Outputs& o) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    sync_warp();
#pragma unroll
    for (int n = 0; n < kScores; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weights_.store((g + i / 2 * 8) * kWeightPitch + 8 * n + 2 * t + i % 2,
                       sizeof(E) == 1 ? w[n][i] * scales.values[n][i % 2] : w[n][i]);
    sync_warp();
#pragma unroll 4
    for (int slot = 0; slot < kTile; ++slot) {
      const float p[2] = {weights_.load(g * kWeightPitch + slot),
                          weights_.load((g + 8) * kWeightPitch + slot)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (half * kHalf >= values.width) break;
#pragma unroll
        for (int pair = 4 * half; pair < 4 * half + 4; ++pair) {
          const Vector<float> v = four(values.data + (slot * values.pitch + 16 * pair + 4 * t));
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (kSeen && (slot < sight.begin[r] || slot >= sight.end[r])) continue;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              float& sum = o[2 * pair + j % 2][2 * r + j / 2];
              sum = fma(p[r], v[j], sum);
            }
          }
        }
      }
    }
  }

  Shared<float> queries_, weights_;
  int pitch_;
};

}  // namespace warpformer::cuda

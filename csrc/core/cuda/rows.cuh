// Rows (core/rows.h) as floats in registers. A team of threads owns a row and walks it in steps of
// `team * kChunks * 8` elements; in one step a thread holds kChunks chunks of 8 neighbours:
//
//             thread 0   thread 1        thread team-1
//   chunk 0   |0 .. 7|   |8 .. 15|  ...  |.. 8 team - 1|
//   chunk 1   |8 team ..|           ...
//
// A warp so reads whole cache lines, in 16-byte accesses where dtype, step and address allow, and
// element by element otherwise. Teams of a warp or less lie several to a block; a larger team is
// the block, which team_sum and team_max rely on.
#pragma once

#include <initializer_list>

#include "core/cuda/math.cuh"
#include "core/cuda/memory.cuh"
#include "core/cuda/reduce.cuh"
#include "core/rows.h"

namespace warpformer::cuda {

constexpr int kChunk = 8;
constexpr int kMaxTeam = 512;
constexpr int64_t kAll = INT64_MAX;
constexpr int kTeamScratch = kWarp * sizeof(float);  // bytes, of team_sum and team_max

/// Threads that hold a row of n elements in kChunks chunks each: a power of two, at most kMaxTeam.
template <int kChunks>
int team_size(int64_t n) {
  int size = 1;
  while (size < kMaxTeam && int64_t{size} * kChunks * kChunk < n) size *= 2;
  return size;
}
/// Threads of a block of such teams.
inline int team_threads(int team) { return team > kWarp ? team : 128; }
/// Blocks for one team a row.
inline int64_t team_blocks(int64_t rows, int team) {
  const int64_t per_block = team_threads(team) / team;
  return (rows + per_block - 1) / per_block;
}

/// This thread's place: thread `index` of the team that owns row `row` in the block's first round.
struct Team {
  int size, index;
  int64_t row;
  DEVICE explicit Team(int size)
      : size(size),
        index(thread_index() % size),
        row(block_index() * (block_threads() / size) + thread_index() / size) {}
  /// Rows from one round of a persistent grid to the next.
  DEVICE int64_t stride() const { return grid_blocks() * (block_threads() / size); }
};

/// Over the team, in a fixed order; every thread gets it. `scratch` has 32 floats. All threads of
/// the block call it together.
DEVICE float team_sum(float x, int team, Shared<float> scratch, WHERE) {
  if (team > kWarp) return block_sum(x, scratch, where);
  for (int step = team / 2; step; step /= 2) x += shuffle_xor(x, step, where);
  return x;
}
DEVICE float team_max(float x, int team, Shared<float> scratch, WHERE) {
  if (team > kWarp) return block_max(x, scratch, where);
  for (int step = team / 2; step; step /= 2) x = nan_max(x, shuffle_xor(x, step, where));
  return x;
}

/// Offset of row r, in elements.
DEVICE int64_t row_offset(const Rows& rows, int64_t r) {
  if (rows.ndim == 1) return r * rows.stride[0];
  int64_t offset = 0;
  for (int i = rows.ndim - 1; i >= 0; --i) {
    offset += r % rows.shape[i] * rows.stride[i];
    r /= rows.shape[i];
  }
  return offset;
}

/// f(value of the type that dtype names); op.cpp has CHECKed that it is one of them.
template <class F>
DEVICE void by_float(DType dtype, F&& f) {
  if (dtype == DType::f32) f(float{});
  if (dtype == DType::bf16) f(bf16{});
  if (dtype == DType::f16) f(f16{});
}

/// Whether 16-byte accesses can walk a row that begins at p.
template <class T>
DEVICE bool is_vector_row(const T* p, int64_t step) {
  return step == 1 && reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

template <class T>
DEVICE void load_chunk(const T* p, float (&values)[kChunk], Cache cache, Where where) {
#pragma unroll
  for (int i = 0; i < kChunk; i += Vector<T>::size) {
    const Vector<T> v = load16(p + i, cache, where);
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) values[i + j] = to_float(v[j]);
  }
}
template <class T>
DEVICE void store_chunk(T* p, const float (&values)[kChunk], Cache cache, Where where) {
#pragma unroll
  for (int i = 0; i < kChunk; i += Vector<T>::size) {
    Vector<T> v;
#pragma unroll
    for (int j = 0; j < Vector<T>::size; ++j) v[j] = from_float<T>(values[i + j]);
    store16(p + i, v, cache, where);
  }
}

/// values = this thread's elements of row r in the step that begins at element `first`; `other`
/// past the end of the row or element `end`, and in all of a row past the last.
template <int kChunks>
DEVICE void load_row(const Rows& rows, int64_t r, int64_t first, const Team& team, float other,
                     float (&values)[kChunks][kChunk], Cache cache = Cache::normal,
                     int64_t end = kAll, WHERE) {
  const int64_t n = r >= rows.count ? 0 : end < rows.n ? end : rows.n;
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    const T* row = static_cast<const T*>(rows.data) + (n ? row_offset(rows, r) : 0);
    const bool vector = is_vector_row(row, rows.step);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t i = first + int64_t{kChunk} * (team.index + c * team.size);
      if (vector && i + kChunk <= n) {
        load_chunk(row + i, values[c], cache, where);
      } else {
#pragma unroll
        for (int j = 0; j < kChunk; ++j)
          values[c][j] = i + j < n ? to_float(load(row + (i + j) * rows.step, where)) : other;
      }
    }
  });
}

/// Writes what load_row would read.
template <int kChunks>
DEVICE void store_row(const Rows& rows, int64_t r, int64_t first, const Team& team,
                      const float (&values)[kChunks][kChunk], Cache cache = Cache::normal, WHERE) {
  if (r >= rows.count) return;
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    T* row = static_cast<T*>(rows.data) + row_offset(rows, r);
    const bool vector = is_vector_row(row, rows.step);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int64_t i = first + int64_t{kChunk} * (team.index + c * team.size);
      if (vector && i + kChunk <= rows.n) {
        store_chunk(row + i, values[c], cache, where);
      } else {
#pragma unroll
        for (int j = 0; j < kChunk; ++j)
          if (i + j < rows.n) store(row + (i + j) * rows.step, from_float<T>(values[c][j]), where);
      }
    }
  });
}

// ---- Rows evenly apart of which every access can be of 16 bytes, a chunk inside or outside: less
// code, fewer registers, and the loads of several rows under way together.

/// Whether `rows`, if it is there, is like that.
inline bool is_vector(const Rows& rows) {
  if (!rows.data) return true;
  const int per_access = rows.dtype == DType::f32 ? 4 : 8;
  const bool even = rows.ndim == 0 || (rows.ndim == 1 && rows.stride[0] % per_access == 0);
  return even && rows.step == 1 && rows.n % kChunk == 0 &&
         reinterpret_cast<uintptr_t>(rows.data) % 16 == 0;
}

/// This thread's elements of a row as they lie in memory. Nothing waits for them before values().
template <class T, int kChunks>
struct FetchedRow {
  static constexpr int kVectors = kChunk / Vector<T>::size;
  Vector<T> vectors[kChunks][kVectors];

  DEVICE void values(float (&values)[kChunks][kChunk]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        values[c][j] = to_float(vectors[c][j / Vector<T>::size][j % Vector<T>::size]);
  }
};

/// A step of row r of elements of T, from element `first` on; 0 past its end, in chunks past
/// element `end`, and in all of a row past the last.
template <class T, int kChunks>
DEVICE FetchedRow<T, kChunks> fetch_row(const Rows& rows, int64_t r, const Team& team,
                                        int64_t first = 0, int64_t end = kAll, WHERE) {
  FetchedRow<T, kChunks> fetched = {};
  const int64_t n = r >= rows.count ? 0 : end < rows.n ? end : rows.n;
  const T* row = static_cast<const T*>(rows.data) + (n ? r * rows.stride[0] : 0);
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t i = first + int64_t{kChunk} * (team.index + c * team.size);
    if (i >= n) continue;
#pragma unroll
    for (int v = 0; v < FetchedRow<T, kChunks>::kVectors; ++v)
      fetched.vectors[c][v] = load16(row + i + v * Vector<T>::size, Cache::normal, where);
  }
  return fetched;
}

/// Writes what fetch_row would read.
template <class T, int kChunks>
DEVICE void store_vector_row(const Rows& rows, int64_t r, const Team& team,
                             const float (&values)[kChunks][kChunk], int64_t first = 0, WHERE) {
  if (r >= rows.count) return;
  T* row = static_cast<T*>(rows.data) + r * rows.stride[0];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    const int64_t i = first + int64_t{kChunk} * (team.index + c * team.size);
    if (i < rows.n) store_chunk(row + i, values[c], Cache::normal, where);
  }
}

// ---- One kernel for all layouts: rows held in registers, which are read once, and rows walked in
// steps, which every pass reads again. A kernel is a template of one of the policies below.
// Elements belong to the same threads in the same order under each, so that sums have the same
// bits.

template <int kCount>
using Chunks = float[kCount][kChunk];

/// f(c, j, whether the element lies before element n) for all of a step.
template <int kCount, class F>
DEVICE void each_element(int64_t first, int64_t n, const Team& team, F f) {
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    const int64_t left = n - first - int64_t{kChunk} * (team.index + c * team.size);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) f(c, j, j < left);
  }
}
template <int kCount>
DEVICE void fill(Chunks<kCount>& values, float value) {
#pragma unroll
  for (int c = 0; c < kCount; ++c)
#pragma unroll
    for (int j = 0; j < kChunk; ++j) values[c][j] = value;
}

/// How a held row is read and written: at once, `first` is 0. Activations are of T, parameters of
/// any dtype.
template <class T, int kChunks>
struct HeldRow {
  static constexpr int count = kChunks;
  static constexpr bool again = false;  // whether a pass has to read it again
  DEVICE static int64_t step(int64_t n, const Team&) { return n; }
  DEVICE static FetchedRow<T, count> fetch(const Rows& rows, int64_t r, int64_t, const Team& team) {
    return fetch_row<T, count>(rows, r, team);
  }
  DEVICE static void parameter(const Rows& rows, int64_t, const Team& team, Chunks<count>& values) {
    by_float(rows.dtype,
             [&](auto type) { fetch_row<decltype(type), count>(rows, 0, team).values(values); });
  }
  DEVICE static void store(const Rows& rows, int64_t r, int64_t, const Team& team,
                           const Chunks<count>& values) {
    store_vector_row<T>(rows, r, team, values);
  }
};
/// Rows of T of any length: held where they are one step, of kChunks chunks, else walked.
template <class T, int kChunks>
struct VectorRow {
  static constexpr int count = kChunks;
  DEVICE static int64_t step(int64_t, const Team& team) {
    return int64_t{kChunk} * kChunks * team.size;
  }
  DEVICE static FetchedRow<T, count> fetch(const Rows& rows, int64_t r, int64_t first,
                                           const Team& team, int64_t end = kAll) {
    return fetch_row<T, count>(rows, r, team, first, end);
  }
  DEVICE static void store(const Rows& rows, int64_t r, int64_t first, const Team& team,
                           const Chunks<count>& values) {
    store_vector_row<T>(rows, r, team, values, first);
  }
};
/// How any other row is read and written: step by step.
template <int kChunks>
struct WalkedRows {
  static constexpr int count = kChunks;
  static constexpr bool again = true;
  struct Step {
    Chunks<count> read;
    DEVICE void values(Chunks<count>& to) const {
#pragma unroll
      for (int c = 0; c < count; ++c)
#pragma unroll
        for (int j = 0; j < kChunk; ++j) to[c][j] = read[c][j];
    }
  };
  DEVICE static int64_t step(int64_t, const Team& team) {
    return int64_t{kChunk} * kChunks * team.size;
  }
  DEVICE static Step fetch(const Rows& rows, int64_t r, int64_t first, const Team& team,
                           int64_t end = kAll) {
    Step step;
    load_row(rows, r, first, team, 0.0f, step.read, Cache::normal, end);
    return step;
  }
  DEVICE static void parameter(const Rows& rows, int64_t first, const Team& team,
                               Chunks<count>& values) {
    load_row(rows, 0, first, team, 0.0f, values);
  }
  DEVICE static void store(const Rows& rows, int64_t r, int64_t first, const Team& team,
                           const Chunks<count>& values) {
    store_row(rows, r, first, team, values);
  }
};
using WalkedRow = WalkedRows<1>;

/// Whether every one of these that is there is of `dtype` and serves as vectors.
inline bool are_vectors(DType dtype, std::initializer_list<const Rows*> all) {
  bool vectors = true;
  for (const Rows* rows : all)
    vectors = vectors && is_vector(*rows) && (!rows->data || rows->dtype == dtype);
  return vectors;
}
/// Whether they are also short enough to be held.
template <int kChunks>
bool can_hold(DType dtype, int64_t n, std::initializer_list<const Rows*> all) {
  return n <= int64_t{kMaxTeam} * kChunks * kChunk && are_vectors(dtype, all);
}

}  // namespace warpformer::cuda

// Row ops (softmax, norms, elementwise) see a tensor as rows of n elements with any strides: the
// last dimension, or the one given, is the row, the others are collapsed where memory allows.
#pragma once

#include <cstdint>

#include "core/types.h"

namespace warpformer {

struct Rows {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t n = 0;  // elements of a row, `step` elements of memory apart
  int64_t step = 0;
  int64_t count = 0;  // rows
  int ndim = 0;       // outer dimensions, the first one slowest
  int64_t shape[7] = {};
  int64_t stride[7] = {};
};

struct Tensor;
/// View of `t` as rows along dimension `dim` (negative from the end). `t` has at least one.
Rows rows(const Tensor& t, int dim = -1);
/// Every element of t, of at most 7 dimensions, a row of its own.
Rows elements(const Tensor& t);
/// All of a contiguous tensor as one row.
Rows flat(const Tensor& t);

/// How many neighbouring rows, counted from row 0, are evenly apart in both of these views of equal
/// shape; the same holds for every next so many.
int64_t common_run(const Rows& a, const Rows& b);

}  // namespace warpformer

#if defined(WF_ISA)
#include "core/dispatch.h"
#include "core/parallel.h"
#include "core/simd.h"

namespace warpformer::cpu::WF_ISA {

/// Bytes of all rows.
inline int64_t bytes(const Rows& rows) {
  return rows.data ? rows.count * rows.n * (rows.dtype == DType::f32 ? 4 : 2) : 0;
}
/// Elements of memory from a row to the next one of a run.
inline int64_t row_step(const Rows& rows) { return rows.ndim ? rows.stride[rows.ndim - 1] : 0; }

/// Offset of row `r`, in elements.
inline int64_t row_offset(const Rows& rows, int64_t r) {
  if (rows.ndim == 1) return r * rows.stride[0];
  int64_t offset = 0;
  for (int i = rows.ndim - 1; i >= 0; --i) {
    offset += r % rows.shape[i] * rows.stride[i];
    r /= rows.shape[i];
  }
  return offset;
}

/// dst[0..n) = elements [begin, begin + n) of row r, converted to T.
template <class T>
inline void read_span(const Rows& rows, int64_t r, int64_t begin, int64_t n, T* dst) {
  by_float(rows.dtype, [&](auto type) {
    using S = decltype(type);
    const S* src = static_cast<const S*>(rows.data) + row_offset(rows, r) + begin * rows.step;
    if (rows.step == 1) {
      for_lanes(n, [&](int64_t i, auto k) { store(dst + i, load(src + i, k), k); });
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i] = from_float<T>(to_float(src[i * rows.step]));
    }
  });
}
/// Elements [begin, begin + n) of row r = src[0..n), converted to its dtype.
template <class T>
inline void write_span(const T* src, const Rows& rows, int64_t r, int64_t begin, int64_t n) {
  by_float(rows.dtype, [&](auto type) {
    using D = decltype(type);
    D* dst = static_cast<D*>(rows.data) + row_offset(rows, r) + begin * rows.step;
    if (rows.step == 1) {
      for_lanes(n, [&](int64_t i, auto k) { store(dst + i, load(src + i, k), k); });
    } else {
      for (int64_t i = 0; i < n; ++i) dst[i * rows.step] = from_float<D>(to_float(src[i]));
    }
  });
}

/// The same of rows [r, r + count), from and to rows of floats `step` apart; read ones are added.
inline void add_spans(const Rows& rows, int64_t r, int64_t begin, int64_t n, int64_t count,
                      float* dst, int64_t step) {
  by_float(rows.dtype, [&](auto type) {
    using S = decltype(type);
    for (int64_t i = 0; i < count; ++i, dst += step) {
      const S* src = static_cast<const S*>(rows.data) + row_offset(rows, r + i) + begin * rows.step;
      if (rows.step == 1) {
        for_lanes(
            n, [&](int64_t j, auto k) { store(dst + j, load(dst + j, k) + load(src + j, k), k); });
      } else {
        for (int64_t j = 0; j < n; ++j) dst[j] += to_float(src[j * rows.step]);
      }
    }
  });
}
inline void write_spans(const float* src, int64_t step, const Rows& rows, int64_t r, int64_t begin,
                        int64_t n, int64_t count) {
  by_float(rows.dtype, [&](auto type) {
    using D = decltype(type);
    for (int64_t i = 0; i < count; ++i, src += step) {
      D* dst = static_cast<D*>(rows.data) + row_offset(rows, r + i) + begin * rows.step;
      if (rows.step == 1) {
        for_lanes(n, [&](int64_t j, auto k) { store(dst + j, load(src + j, k), k); });
      } else {
        for (int64_t j = 0; j < n; ++j) dst[j * rows.step] = from_float<D>(src[j]);
      }
    }
  });
}

/// Row r as elements of T (its dtype, or float): the row itself where it is that already, else a
/// copy in `buffer`.
template <class T>
inline const T* row_in(const Rows& rows, int64_t r, T* buffer) {
  if (rows.dtype == kDType<T> && rows.step == 1)
    return static_cast<const T*>(rows.data) + row_offset(rows, r);
  read_span(rows, r, 0, rows.n, buffer);
  return buffer;
}
/// Where to write row r as elements of T: the row itself where that is possible, else `buffer`.
template <class T>
inline T* row_out(const Rows& rows, int64_t r, T* buffer) {
  return rows.dtype == kDType<T> && rows.step == 1
             ? static_cast<T*>(rows.data) + row_offset(rows, r)
             : buffer;
}
/// Ends the writing of row r: `written` is what row_out gave.
template <class T>
inline void finish_row(const Rows& rows, int64_t r, const T* written) {
  if (rows.dtype != kDType<T> || rows.step != 1) write_span(written, rows, r, 0, rows.n);
}

// Where the elements of a row are far apart but rows are neighbours, kernels work on tiles of rows
// as columns of vectors: element i of row r + j is tile[i * kTile + j].
constexpr int kTile = 64;

/// Whether that reads `rows` better than row by row.
inline bool is_columns(const Rows& rows) { return rows.step != 1 && row_step(rows) == 1; }

/// tile = elements of rows [r, r + width), which lie in one run; whole registers, 0 past `width`.
inline void read_tile(const Rows& rows, int64_t r, int64_t width, float* tile) {
  const int64_t across = row_step(rows);
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    const T* src = static_cast<const T*>(rows.data) + row_offset(rows, r);
    for (int64_t i = 0; i < rows.n; ++i, src += rows.step, tile += kTile) {
      if (across == 1) {
        for_lanes(width, [&](int64_t j, auto k) { store(tile + j, load(src + j, k)); });
      } else {
        for (int64_t j = 0; j < width; ++j) tile[j] = to_float(src[j * across]);
      }
    }
  });
}
inline void write_tile(const float* tile, const Rows& rows, int64_t r, int64_t width) {
  const int64_t across = row_step(rows);
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    T* dst = static_cast<T*>(rows.data) + row_offset(rows, r);
    for (int64_t i = 0; i < rows.n; ++i, dst += rows.step, tile += kTile) {
      if (across == 1) {
        for_lanes(width, [&](int64_t j, auto k) { store(dst + j, load(tile + j, k), k); });
      } else {
        for (int64_t j = 0; j < width; ++j) dst[j * across] = from_float<T>(tile[j]);
      }
    }
  });
}

/// Calls f(thread, r, width) for tiles of at most kTile rows of one run, on `threads` threads.
template <class F>
void for_tiles(int64_t count, int64_t run, int64_t grain, int threads, const F& f) {
  const int64_t tiles = (run + kTile - 1) / kTile;
  parallel_for(count / run * tiles, grain, threads, [&](int t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * kTile;
      f(t, i / tiles * run + first, run - first < kTile ? run - first : kTile);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA
#endif

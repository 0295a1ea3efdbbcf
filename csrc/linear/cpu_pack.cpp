// Packs a weight into panels, and unpacks it; op.h has the layout.
//
//   W [N, K], scales, zeros [N, groups]  <-->  panels of 16 rows
//
// Quantized weights are packed, and all are unpacked, element by element: that is done once for a
// weight. Dense ones are packed at every step of a training:
//
//   16 rows of 16 words              --transpose-->  16 k of a panel       of contiguous rows
//   16 neighbouring rows at one k    --copy, zip-->  one k, or two of them    of contiguous columns
#include "core/parallel.h"
#include "core/transpose.h"
#include "linear/words.h"

namespace warpformer::cpu::WF_ISA {
namespace {

/// Where element k of row j of a panel lies, in elements, for values of whole bytes.
int64_t place(Format format, int64_t k, int64_t j) {
  const int64_t together = format == Format::bf16 || format == Format::int8 ? 2
                           : format == Format::int8_dynamic                 ? 4
                                                                            : 1;
  return (k / together * kPanel + j) * together + k % together;
}

/// The row of W that is row j of a panel; those past the end, or past the gate, are -1.
int64_t row_of(const PackLinearParams& p, int64_t panel, int64_t j) {
  const int64_t rows = p.half ? p.half : p.values.count;
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  const int64_t row = panel % panels * kPanel + j;
  return row < rows ? panel / panels * rows + row : -1;
}

template <class T>
T* row_at(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + row_offset(rows, r);
}

/// f(k, end, values) of elements [k, end) between which there are no scales: two groups, or all.
template <class T, class F>
void for_parts(const Weight& w, T* panel, const F& f) {
  const int64_t part = w.groups ? 2 * w.group : w.depth;
  for (int64_t k = 0; k < w.depth; k += part)
    f(k, at_most(w.depth, k + part), panel + values_at(w, k));
}

/// Elements [begin, end) of a row; the panel has them from `first` on.
template <class T>
void pack_values(const PackLinearParams& p, int64_t row, int64_t j, int64_t begin, int64_t end,
                 uint8_t* values, int64_t first = 0) {
  const T* from = row_at<T>(p.values, row);
  T* to = reinterpret_cast<T*>(values);
  for (int64_t k = begin; k < end; ++k)
    to[place(p.weight.format, k - first, j)] = from[k * p.values.step];
}
template <class T>
void unpack_values(const PackLinearParams& p, int64_t row, int64_t j, int64_t begin, int64_t end,
                   const uint8_t* values) {
  const T* from = reinterpret_cast<const T*>(values);
  T* to = row_at<T>(p.values, row);
  for (int64_t k = begin; k < end; ++k)
    to[k * p.values.step] = from[place(p.weight.format, k - begin, j)];
}

template <class F>
void by_value(Format format, const F& f) {
  switch (format) {
    case Format::f32:
      return f(float{});
    case Format::f16:
      return f(f16{});
    case Format::bf16:
      return f(bf16{});
    default:
      return f(int8_t{});
  }
}

void pack_codes(const PackLinearParams& p, int64_t row, int64_t j, int64_t begin, int64_t end,
                uint8_t* values) {
  const uint8_t* from = row_at<uint8_t>(p.values, row);
  auto* words = reinterpret_cast<uint32_t*>(values);
  for (int64_t k = begin; k < end; ++k) {
    const uint32_t code = from[k / 2 * p.values.step] >> k % 2 * 4 & 15;
    words[(k - begin) / 8 * kPanel + j] |= code << code_shift(p.weight.format, k);
  }
}
void unpack_codes(const PackLinearParams& p, int64_t row, int64_t j, int64_t begin, int64_t end,
                  const uint8_t* values) {
  const auto* words = reinterpret_cast<const uint32_t*>(values);
  uint8_t* to = row_at<uint8_t>(p.values, row);
  for (int64_t k = begin; k < end; k += 2) {
    const uint32_t word = words[(k - begin) / 8 * kPanel + j];
    const uint32_t low = word >> code_shift(p.weight.format, k) & 15;
    const uint32_t high = k + 1 < end ? word >> code_shift(p.weight.format, k + 1) & 15 : 0;
    to[k / 2 * p.values.step] = static_cast<uint8_t>(low | high << 4);
  }
}

/// The power of two that brings the largest of n scales into [1, 2); 1 where all are 0.
float power_of_two(const Rows& scales, int64_t row, int64_t n) {
  float high = 0.0f;
  for (int64_t g = 0; g < n; ++g) {
    float scale;
    read_span(scales, row, g, 1, &scale);
    high = fabsf(scale) > high ? fabsf(scale) : high;
  }
  return high > 0.0f ? exp2f(floorf(log2f(high))) : 1.0f;
}

void pack_row(const PackLinearParams& p, int64_t row, int64_t j, uint8_t* panel) {
  const Weight& w = p.weight;
  for_parts(w, panel, [&](int64_t k, int64_t end, uint8_t* values) {
    if (is_4_bit(w.format)) {
      pack_codes(p, row, j, k, end, values);
    } else {
      pack_values<int8_t>(p, row, j, k, end, values, k);
    }
  });
  if (w.format == Format::int8_dynamic) {
    int32_t sum = 0;
    for (int64_t k = 0; k < w.depth; ++k) {
      uint8_t& byte = panel[place(w.format, k, j)];
      sum += static_cast<int8_t>(byte);
      byte ^= 0x80;
    }
    reinterpret_cast<int32_t*>(panel + w.sums)[j] = sum;
  }
  float* factor = reinterpret_cast<float*>(panel + w.factors) + j;
  if (w.groups) {
    *factor = power_of_two(p.scales, row, w.groups);
  } else {
    read_span(p.scales, row, 0, 1, factor);
  }
  for (int64_t g = 0; g < w.groups; ++g) {
    float scale;
    read_span(p.scales, row, g, 1, &scale);
    const_cast<f16*>(scales_of(w, panel, g))[j] = from_float<f16>(scale / *factor);
  }
  for (int64_t g = 0; p.zeros.data && g < p.zeros.n; ++g)
    panel[w.zeros + g * kPanel + j] = row_at<uint8_t>(p.zeros, row)[g * p.zeros.step];
}

void unpack_row(const PackLinearParams& p, int64_t row, int64_t j, const uint8_t* panel) {
  const Weight& w = p.weight;
  for_parts(w, panel, [&](int64_t k, int64_t end, const uint8_t* values) {
    if (is_4_bit(w.format)) {
      unpack_codes(p, row, j, k, end, values);
    } else {
      by_value(w.format,
               [&](auto type) { unpack_values<decltype(type)>(p, row, j, k, end, values); });
    }
  });
  if (w.format == Format::int8_dynamic)
    for (int64_t k = 0; k < w.depth; ++k) row_at<uint8_t>(p.values, row)[k * p.values.step] ^= 0x80;
  if (!p.scales.data) return;
  const float factor = reinterpret_cast<const float*>(panel + w.factors)[j];
  for (int64_t g = 0; g < p.scales.n; ++g) {
    const float scale = w.groups ? factor * to_float(scales_of(w, panel, g)[j]) : factor;
    write_span(&scale, p.scales, row, g, 1);
  }
  for (int64_t g = 0; p.zeros.data && g < p.zeros.n; ++g)
    row_at<uint8_t>(p.zeros, row)[g * p.zeros.step] = panel[w.zeros + g * kPanel + j];
}

/// 16 rows of 16 words, `row` bytes apart -> [16][16].
void transpose_square(const char* from, int64_t row, float* to) {
  constexpr int kWidth = Vec::kWidth;
  for (int64_t j = 0; j < kPanel; j += kWidth)
    for (int64_t k = 0; k < kPanel; k += kWidth) {
      Vec v[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i)
        v[i] = load(reinterpret_cast<const float*>(from + (j + i) * row) + k);
      transpose(v);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) store(to + (k + i) * kPanel + j, v[i]);
    }
}

/// Pairs of halves in 16 columns -> [32][16] halves.
void split_pairs(const uint32_t* pairs, f16* to) {
  for (int64_t k = 0; k < kPanel; ++k, pairs += kPanel, to += 2 * kPanel)
    for (int64_t j = 0; j < kPanel; ++j) {
      to[j].bits = static_cast<uint16_t>(pairs[j]);
      to[kPanel + j].bits = static_cast<uint16_t>(pairs[j] >> 16);
    }
}

/// Elements from `begin` on of 16 contiguous rows that lie `row` elements apart, as far as whole
/// squares reach; returns where they end.
template <class T>
int64_t pack_rows(const T* from, int64_t row, int64_t begin, int64_t end, T* to) {
  constexpr int64_t kSquare = kPanel * sizeof(float) / sizeof(T);
  for (; begin + kSquare <= end; begin += kSquare) {
    const char* at = reinterpret_cast<const char*>(from + begin);
    const auto bytes = static_cast<int64_t>(row * sizeof(T));
    if constexpr (__is_same(T, f16)) {
      float pairs[kPanel * kPanel];
      transpose_square(at, bytes, pairs);
      split_pairs(reinterpret_cast<const uint32_t*>(pairs), to + begin * kPanel);
    } else {
      transpose_square(at, bytes, reinterpret_cast<float*>(to + begin * kPanel));
    }
  }
  return begin;
}

/// The same of 16 neighbours every `step` elements.
template <class T>
int64_t pack_columns(const T* from, int64_t step, int64_t begin, int64_t end, T* to) {
  for (; begin < end; ++begin) memcpy(to + begin * kPanel, from + begin * step, kPanel * sizeof(T));
  return begin;
}
int64_t pack_columns(const bf16* from, int64_t step, int64_t begin, int64_t end, bf16* to) {
  for (; begin + 2 <= end; begin += 2) {
    uint16_t even[kPanel], odd[kPanel];
    uint32_t pairs[kPanel];
    memcpy(even, from + begin * step, sizeof even);
    memcpy(odd, from + (begin + 1) * step, sizeof odd);
    for (int64_t j = 0; j < kPanel; ++j) pairs[j] = even[j] | static_cast<uint32_t>(odd[j]) << 16;
    memcpy(to + begin * kPanel, pairs, sizeof pairs);
  }
  return begin;
}

/// Elements [begin, end) of the rows of a panel.
template <class T>
void pack_panel(const PackLinearParams& p, int64_t panel, int64_t begin, int64_t end) {
  constexpr int64_t kBytes = kPanel * sizeof(T);  // of one k
  const Weight& w = p.weight;
  uint8_t* to = w.data + panel * w.size;
  int64_t done = begin;
  if (row_of(p, panel, kPanel - 1) >= 0) {
    const T* from = row_at<T>(p.values, row_of(p, panel, 0));
    const int64_t row = row_step(p.values), step = p.values.step;
    if (step == 1) {
      done = pack_rows(from, row, begin, end, reinterpret_cast<T*>(to));
    } else if (row == 1) {
      done = pack_columns(from, step, begin, end, reinterpret_cast<T*>(to));
    }
  }
  if (done == end && end < w.depth) return;
  memset(to + done * kBytes, 0, (end < w.depth ? end * kBytes : w.size) - done * kBytes);
  for (int64_t j = 0; j < kPanel; ++j)
    if (row_of(p, panel, j) >= 0) pack_values<T>(p, row_of(p, panel, j), j, done, end, to);
}

/// Contiguous columns are read across panels, so that each is one stretch of memory.
template <class T>
void pack_dense(const PackLinearParams& p, int threads) {
  const Weight& w = p.weight;
  const bool across = p.values.step != 1;
  const int64_t width = across ? 16 : 1, length = across ? 16 : w.depth;
  const int64_t groups = (w.panels + width - 1) / width;
  const int64_t spans = w.depth ? (w.depth + length - 1) / length : 1;
  parallel_for(groups * spans, 1 + 65536 / (1 + width * kPanel * length), threads,
               [&](int, int64_t first, int64_t last) {
                 for (int64_t unit = first; unit < last; ++unit) {
                   const int64_t panel = unit / spans * width, begin = unit % spans * length;
                   for (int64_t i = panel; i < at_most(w.panels, panel + width); ++i)
                     pack_panel<T>(p, i, begin, at_most(w.depth, begin + length));
                 }
               });
}

template <class F>
void for_rows(const PackLinearParams& p, int threads, const F& f) {
  parallel_for(p.weight.panels, 1 + 4096 / (1 + p.weight.depth), threads,
               [&](int, int64_t begin, int64_t end) {
                 for (int64_t panel = begin; panel < end; ++panel)
                   for (int64_t j = 0; j < kPanel; ++j)
                     f(row_of(p, panel, j), j, p.weight.data + panel * p.weight.size);
               });
}

}  // namespace

void pack_linear(const PackLinearParams& p, int threads) {
  if (!p.scales.data)
    return by_float(p.values.dtype, [&](auto type) { pack_dense<decltype(type)>(p, threads); });
  for_rows(p, threads, [&](int64_t row, int64_t j, uint8_t* panel) {
    if (j == 0) memset(panel, 0, p.weight.size);
    if (row >= 0) pack_row(p, row, j, panel);
  });
}

void unpack_linear(const PackLinearParams& p, int threads) {
  if (p.index) {
    parallel_for(p.values.count, 1 + 4096 / (1 + p.weight.depth), threads,
                 [&](int, int64_t begin, int64_t end) {
                   for (int64_t i = begin; i < end; ++i)
                     unpack_row(p, i, p.index[i] % kPanel,
                                p.weight.data + p.index[i] / kPanel * p.weight.size);
                 });
    return;
  }
  for_rows(p, threads, [&](int64_t row, int64_t j, const uint8_t* panel) {
    if (row >= 0) unpack_row(p, row, j, panel);
  });
}

}  // namespace warpformer::cpu::WF_ISA

// x as the product reads it, where it does not lie so already: rows of elements of mma, padded with
// 0, of floats two of bf16, of the dynamic formats s8 and what they are scaled by.
#pragma once

#include "core/cuda/reduce.cuh"
#include "core/cuda/rows.cuh"
#include "linear/input.h"
#include "linear/op.h"

namespace warpformer::cuda {

constexpr float kInfinity = __builtin_inff();
constexpr int kInputThreads = 256;
constexpr int64_t kTokenPadding = 64;  // of scales: tokens of the largest tile

/// Elements of a row.
inline int64_t input_row(Format format, int64_t depth) {
  const int64_t unit = is_dynamic(format) ? 64 : 8;
  return (depth + unit - 1) / unit * unit;
}

/// A row of x as two rows of bf16, whose sum is x to 2^-17, or as one of T.
template <class T>
KERNEL(kInputThreads)
spread_kernel(Rows x, T* to, int64_t row, int parts) {
  to += block_index() * parts * row;
  by_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    const X* from = static_cast<const X*>(x.data) + row_offset(x, block_index());
    for (int64_t k = thread_index(); k < row; k += kInputThreads) {
      const float value = k < x.n ? to_float(load(from + k * x.step)) : 0.0f;
      const T high = from_float<T>(value);
      store(to + k, high);
      const float rest = value - to_float(high);
      if (parts == 2) store(to + row + k, from_float<T>(abs(rest) < kInfinity ? rest : 0.0f));
    }
  });
}

/// The nearest integer, ties to even, of |x| < 2^22.
DEVICE float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }
DEVICE bool is_scale(float scale) { return scale > 0x1p-120f && scale < kInfinity; }

DEVICE float input_at(const Rows& x, int64_t r, int64_t k) {
  float value = 0;
  if (k >= x.n) return value;
  by_float(x.dtype, [&](auto type) {
    using X = decltype(type);
    value = to_float(load(static_cast<const X*>(x.data) + row_offset(x, r) + k * x.step));
  });
  return value;
}

/// A block of threads a row.
KERNEL(kInputThreads) quantize_tokens_kernel(Rows x, Quantized to) {
  const Shared<float> scratch = shared_memory<float>();
  const int64_t token = block_index();
  float high = 0, low = 0;
  for (int64_t k = thread_index(); k < x.n; k += kInputThreads) {
    const float value = input_at(x, token, k);
    high = nan_max(high, value);
    low = nan_max(low, -value);
  }
  high = block_max(high, scratch);
  low = block_max(low, scratch);
  const float scale = (0.5f * high + 0.5f * low) / 127.5f, factor = 1.0f / scale;
  const bool any = is_scale(scale);
  const float zero = any ? round_even(low * factor) - 128.0f : 0.0f;
  for (int64_t k = thread_index(); k < to.row; k += kInputThreads) {
    const float q = min(round_even(input_at(x, token, k) * factor) + zero, 127.0f);
    store(to.values + token * to.row + k, static_cast<int8_t>(any && k < x.n ? q : 0.0f));
  }
  if (thread_index() > 0) return;
  store(to.scales + token, scale);
  store(to.offsets + token, static_cast<int32_t>(zero));
}

/// A warp a block of 32.
KERNEL(kInputThreads) quantize_blocks_kernel(Rows x, Quantized to) {
  const int64_t token = block_index();
  const int lane = lane_index();
  for (int64_t block = warp_index(); block < to.row / kWarp; block += kInputThreads / kWarp) {
    const float value = input_at(x, token, block * kWarp + lane);
    const float scale = warp_max(abs(value)) / 127.0f;
    const float q = is_scale(scale) ? round_even(value * (1.0f / scale)) : 0.0f;
    const float sum = warp_sum(q);
    store(to.values + token * to.row + block * kWarp + lane, static_cast<int8_t>(q));
    if (lane > 0) continue;
    store(to.scales + block * to.tokens + token, scale / 16.0f);
    store(to.offsets + block * to.tokens + token, static_cast<int32_t>(sum));
  }
}

}  // namespace warpformer::cuda

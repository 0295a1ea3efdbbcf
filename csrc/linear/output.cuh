// What becomes of the sums of a block: factor, zero point of x, bias, activation, gate, residual.
#pragma once

#include "core/cuda/activation.cuh"
#include "core/cuda/rows.cuh"
#include "linear/experts.cuh"
#include "linear/input.h"

namespace warpformer::cuda {

/// The sums of a block in shared memory: those of chain c, token i and feature f are at
/// c * chain + i * token + f.
struct Slots {
  Shared<float> sums;
  int chains, chain, token;
};

/// The columns of out that a block has, and their features: 16 neighbours are a panel. A gated
/// column has a second feature, `up` further.
struct Columns {
  int64_t first;
  int count, panel, up;
};

/// The sum of the chains of a feature and token, in their order.
template <class Sum>
DEVICE Sum sum_of(const Slots& slots, int at) {
  const Shared<Sum> sums = slots.sums.as<Sum>();
  Sum sum = slots.chains ? sums.load(at) : Sum{0};
  for (int c = 1; c < slots.chains; ++c) sum += sums.load(c * slots.chain + at);
  return sum;
}

/// Of a tile of `tokens`. This thread, one of `threads`, has one column.
template <class Sum>
DEVICE void write_out(const LinearParams& p, const Input& x, const Expert& expert, int tokens,
                      const Columns& columns, const Slots& slots, int threads) {
  const int halves = p.gated ? 2 : 1, column = thread_index() % columns.count;
  const int64_t n = columns.first + column;
  if (n >= p.out.n) return;
  const int feature = column / kPanel * columns.panel + column % kPanel;
  float factor[2] = {}, bias[2] = {};
  [[maybe_unused]] int32_t weight_sum[2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (half >= halves) break;
    const int64_t panel = n / kPanel + half * (p.weight.panels / 2);
    const uint8_t* data = expert.weight + panel * p.weight.size;
    factor[half] = load(reinterpret_cast<const float*>(data + p.weight.factors) + n % kPanel);
    if constexpr (std::is_same_v<Sum, int32_t>)
      weight_sum[half] = load(reinterpret_cast<const int32_t*>(data + p.weight.sums) + n % kPanel);
    if (p.bias.data)
      by_float(p.bias.dtype, [&](auto type) {
        using B = decltype(type);
        const B* row = static_cast<const B*>(p.bias.data) + row_offset(p.bias, expert.index);
        bias[half] = to_float(load(row + (half * p.out.n + n) * p.bias.step));
      });
  }
  for (int i = thread_index() / columns.count; i < tokens / x.parts; i += threads / columns.count) {
    const int64_t row = expert.first + i;
    if (row >= expert.end) break;
    float z[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half >= halves) break;
      const int at = i * x.parts * slots.token + feature + half * columns.up;
      Sum sum = sum_of<Sum>(slots, at);
      if (x.parts == 2) sum += sum_of<Sum>(slots, at + slots.token);
      float scale = factor[half];
      if constexpr (std::is_same_v<Sum, int32_t>) {
        sum -= load(x.quantized.offsets + row) * weight_sum[half];
        scale *= load(x.quantized.scales + row);
      }
      z[half] = fma(scale, static_cast<float>(sum), bias[half]);
    }
    float y = z[0];
    lane::by_activation(p.activation, p.out.dtype != DType::f32,
                        [&](auto act) { y = act.value(y); });
    if (p.gated) y *= z[1];
    if (p.residual.data)
      by_float(p.residual.dtype, [&](auto type) {
        using R = decltype(type);
        const R* from = static_cast<const R*>(p.residual.data) + row_offset(p.residual, row);
        y += to_float(load(from + n * p.residual.step));
      });
    by_float(p.out.dtype, [&](auto type) {
      using O = decltype(type);
      store(static_cast<O*>(p.out.data) + row_offset(p.out, row) + n * p.out.step,
            from_float<O>(y));
    });
  }
}

}  // namespace warpformer::cuda

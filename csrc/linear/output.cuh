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

constexpr int kEach = 2;  // columns of a thread, neighbours

/// The sums of the chains of a token and kEach features, in their order, are added to `sums`.
template <class Sum>
DEVICE void add_chains(const Slots& slots, int at, Sum (&sums)[kEach]) {
  struct Pair {
    Sum of[kEach];
  };
  Pair total{};
  for (int c = 0; c < slots.chains; ++c) {
    const auto chain =
        bits_as<Pair>(slots.sums.as<uint64_t>().load((c * slots.chain + at) / kEach));
#pragma unroll
    for (int j = 0; j < kEach; ++j) total.of[j] = c ? total.of[j] + chain.of[j] : chain.of[j];
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) sums[j] += total.of[j];
}

/// What the features of a thread have, the gate's first.
struct Features {
  float factor[2][kEach], bias[2][kEach];
  int32_t sum[2][kEach];  // of the values of int8_dynamic

  DEVICE Features(const LinearParams& p, const Expert& expert, int64_t column)
      : factor{}, bias{}, sum{} {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t n = column + j;
        if ((half == 1 && !p.gated) || n >= p.out.n) break;
        const uint8_t* panel =
            expert.weight + (n / kPanel + half * (p.weight.panels / 2)) * p.weight.size;
        factor[half][j] =
            load(reinterpret_cast<const float*>(panel + p.weight.factors) + n % kPanel);
        if (p.weight.sums)
          sum[half][j] = load(reinterpret_cast<const int32_t*>(panel + p.weight.sums) + n % kPanel);
        if (!p.bias.data) continue;
        by_float(p.bias.dtype, [&](auto type) {
          using B = decltype(type);
          const B* row = static_cast<const B*>(p.bias.data) + row_offset(p.bias, expert.index);
          bias[half][j] = to_float(load(row + (half * p.out.n + n) * p.bias.step));
        });
      }
  }
};

/// Whether kEach neighbours of rows lie in one access.
DEVICE bool are_paired(const Rows& rows) {
  const bool even = rows.ndim == 0 || (rows.ndim == 1 && rows.stride[0] % kEach == 0);
  return even && rows.step == 1 && reinterpret_cast<uintptr_t>(rows.data) % 8 == 0;
}

template <class O>
DEVICE void store_pair(O* to, const float (&y)[kEach]) {
  if constexpr (std::is_same_v<O, float>) {
    store(reinterpret_cast<uint64_t*>(to), bits_as<uint64_t>(y));
  } else {
    store(reinterpret_cast<uint32_t*>(to), pack2<O>(y[0], y[1]));
  }
}

/// A tile of `tokens`, by the first `threads` of the block.
template <class Sum>
DEVICE void write_out(const LinearParams& p, const Input& x, const Expert& expert, int tokens,
                      const Columns& columns, const Slots& slots, int threads) {
  const int across = columns.count / kEach, column = thread_index() % across * kEach;
  const int64_t n = columns.first + column;
  if (n >= p.out.n) return;
  const int feature = column / kPanel * columns.panel + column % kPanel;
  const Features features(p, expert, n);
  const bool paired = n + kEach <= p.out.n && are_paired(p.out);
  for (int i = thread_index() / across; i < tokens / x.parts; i += threads / across) {
    const int64_t row = expert.first + i;
    if (row >= expert.end) break;
    float z[2][kEach];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (half == 1 && !p.gated) break;
      const int at = i * x.parts * slots.token + feature + half * columns.up;
      Sum sums[kEach] = {};
      add_chains<Sum>(slots, at, sums);
      if (x.parts == 2) add_chains<Sum>(slots, at + slots.token, sums);
      float scale = 1.0f;
      if constexpr (std::is_same_v<Sum, int32_t>) {
        const int32_t zero = load(x.quantized.offsets + row);
        scale = load(x.quantized.scales + row);
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[j] -= zero * features.sum[half][j];
      }
#pragma unroll
      for (int j = 0; j < kEach; ++j)
        z[half][j] = fma(features.factor[half][j] * scale, static_cast<float>(sums[j]),
                         features.bias[half][j]);
    }
    float (&y)[kEach] = z[0];
    lane::by_activation(p.activation, p.out.dtype != DType::f32, [&](auto act) {
#pragma unroll
      for (float& value : y) value = act.value(value);
    });
    if (p.gated)
#pragma unroll
      for (int j = 0; j < kEach; ++j) y[j] *= z[1][j];
    if (p.residual.data)
      by_float(p.residual.dtype, [&](auto type) {
        using R = decltype(type);
        const R* from = static_cast<const R*>(p.residual.data) + row_offset(p.residual, row);
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          if (n + j < p.out.n) y[j] += to_float(load(from + (n + j) * p.residual.step));
      });
    by_float(p.out.dtype, [&](auto type) {
      using O = decltype(type);
      O* to = static_cast<O*>(p.out.data) + row_offset(p.out, row) + n * p.out.step;
      if (paired) {
        store_pair(to, y);
      } else {
#pragma unroll
        for (int j = 0; j < kEach; ++j)
          if (n + j < p.out.n) store(to + j * p.out.step, from_float<O>(y[j]));
      }
    });
  }
}

}  // namespace warpformer::cuda

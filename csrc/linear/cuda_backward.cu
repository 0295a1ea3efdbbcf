// The gradient of linear's x, dx = dy W, in float32: a block has 64 rows by 64 columns of dx, a
// thread 4 by 4 of them, and walks N in steps of 128.
//
//   codes of 8 panels --number, scale--> W [128][64]  --\ shared memory
//   dy ------------------------------> dy [64][128] ----> sums in registers --> dx
//
// N is added up in ascending order, whatever the rows beside.
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "core/cuda/tensor_map.cuh"
#include "linear/codes.cuh"

namespace warpformer::cuda {
namespace {

constexpr int kThreads = 256, kSide = 64, kStep = 128, kEach = 4;
constexpr int kPitch = kStep + 1;  // of dy: rows fall into different banks
constexpr int kShared = (kStep * kSide + kSide * kPitch) * 4;

struct Numbers {
  float values[16];  // of nf4
};

/// An element of W, row j of a panel.
DEVICE float weight_at(const Weight& w, const uint8_t* panel, int j, int64_t k,
                       const Numbers& nf4) {
  const int depth = depth_of_tile(w.format);
  const int64_t group = w.groups ? k / w.group : 0;
  const Place place = place_of(w.format, j, static_cast<int>(k % depth));
  const auto* words = reinterpret_cast<const uint32_t*>(panel + k / depth * kTileBytes);
  const uint32_t bits = load(words + 4 * place.lane + place.word) >> place.bit;
  float number;
  if (w.format == Format::nf4) {
    number = nf4.values[bits & 15];
  } else if (has_4_bits(w.format)) {
    const uint32_t code = (bits & 15) ^ (w.format == Format::int4_dynamic ? 8u : 0u);
    const int zero = w.zeros ? load(panel + w.zeros + group * kPanel + j) : 8;
    number = static_cast<float>(static_cast<int>(code) - zero);
  } else {
    number = static_cast<float>(static_cast<int8_t>(bits));
  }
  const float factor = load(reinterpret_cast<const float*>(panel + w.factors) + j);
  if (!w.groups) return factor * number;
  const f16 scale = load(reinterpret_cast<const f16*>(panel + w.scales) + group * kPanel + j);
  return factor * to_float(scale) * number;
}

KERNEL(kThreads, 1)
linear_backward_kernel(LinearBackwardParams p, const GRID_CONSTANT Numbers nf4) {
  const Weight& w = p.weight;
  const Shared<float> weight = shared_memory<float>(), dy = weight + kStep * kSide;
  const int64_t k0 = block_index() * kSide, m0 = block_index_y() * kSide;
  const int thread = thread_index(), row = thread / 16 * kEach, column = thread % 16;
  float sums[kEach][kEach] = {};
  for (int64_t n0 = 0; n0 < p.dy.n; n0 += kStep) {
    for (int i = thread; i < kStep * kSide; i += kThreads) {
      const int64_t n = n0 + i / kSide, k = k0 + i % kSide;
      const uint8_t* panel = w.data + n / kPanel * w.size;
      const bool inside = n < p.dy.n && k < w.depth;
      weight.store(i, inside ? weight_at(w, panel, static_cast<int>(n % kPanel), k, nf4) : 0.0f);
    }
    by_float(p.dy.dtype, [&](auto type) {
      using T = decltype(type);
      for (int i = thread; i < kStep * kSide; i += kThreads) {
        const int m = i / kStep;
        const int64_t n = n0 + i % kStep;
        float value = 0;
        if (m0 + m < p.rows && n < p.dy.n) {
          const T* from = static_cast<const T*>(p.dy.data) + row_offset(p.dy, p.first + m0 + m);
          value = to_float(load(from + n * p.dy.step));
        }
        dy.store(m * kPitch + i % kStep, value);
      }
    });
    sync_block();
    for (int n = 0; n < kStep; ++n) {
      float a[kEach], b[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        a[i] = dy.load((row + i) * kPitch + n);
        b[i] = weight.load(n * kSide + column + 16 * i);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) sums[i][j] = fma(a[i], b[j], sums[i][j]);
    }
    sync_block();
  }
  by_float(p.dx.dtype, [&](auto type) {
    using T = decltype(type);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (m0 + row + i >= p.rows) break;
      T* to = static_cast<T*>(p.dx.data) + row_offset(p.dx, p.first + m0 + row + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int64_t k = k0 + column + 16 * j;
        if (k < w.depth) store(to + k * p.dx.step, from_float<T>(sums[i][j]));
      }
    }
  });
}

}  // namespace

void linear_backward(const LinearBackwardParams& p, Stream stream) {
  Numbers nf4;
  for (int i = 0; i < 16; ++i) nf4.values[i] = kNormalFloat[i];
  const Grid grid((p.weight.depth + kSide - 1) / kSide, (p.rows + kSide - 1) / kSide);
  LAUNCH(linear_backward_kernel, grid, kThreads, kShared, stream, p, nf4);
}

}  // namespace warpformer::cuda

// The gradient of linear's x, dx = dy W. dy of 16 bits is multiplied by mma: a warp has 64 rows by
// 64 columns of dx, a block two warps side by side, and walks N in stages of 32.
//
//   dy [64][32] ------cp.async--> stage --ldmatrix-----------------------> A, 16 of N --mma--> sums
//   W, two panels ----cp.async--> stage --16 bytes a lane--> codes --number, factor scale-->
//     W, 16 of N by 16 of K, rounded to the dtype of dy --movmatrix------> B ---------/
//
// Codes lie as A of the forward product has them, a register 8 of N by 8 of K: transposed, it is a
// register of B. dy of float32 has a kernel in float32: 64 rows by 64 columns a block, 4 by 4 a
// thread, in steps of 128 of N.
//
//   codes of 8 panels --number, scale--> W [128][64]  --\ shared memory
//   dy ------------------------------> dy [64][128] ----> sums in registers --> dx
//
// N is added up in ascending order, whatever the rows beside. Blocks of grouped_linear find their
// rows and weight (experts.cuh).
#include "core/cuda/launch.cuh"
#include "core/cuda/matrix.cuh"
#include "core/cuda/rows.cuh"
#include "core/cuda/swizzle.cuh"
#include "linear/codes.cuh"
#include "linear/experts.cuh"

namespace warpformer::cuda {
namespace {

struct Numbers {
  float values[16];  // of nf4
};

constexpr int kSide = 64;  // rows, and columns of a warp or of the kernel in float32

// ---- dy of 16 bits

constexpr int kWarps = 2, kStages = 4, kDepth = 32;  // of N
constexpr int kPanels = kDepth / kPanel, kRowTiles = kSide / 16, kColumnTiles = kSide / 8;
constexpr int kRowBytes = kDepth * 2, kGradBytes = kSide * kRowBytes;
constexpr Swizzle kSwizzle = Swizzle::bytes64;
constexpr int kNumbersBytes = 128;  // in front of the stages

/// A warp's part of a panel in a stage: codes; scales of two groups, their zeros; factors.
template <Format kFormat>
struct Part {
  static constexpr int kTileDepth = tile_depth(kFormat), kTiles = kSide / kTileDepth;
  static constexpr int kScales = kTiles * kTileBytes, kZeros = kScales + 2 * kPanel * 2,
                       kFactors = kZeros + 2 * kPanel, kBytes = kFactors + kPanel * 4;
  static constexpr int kStageBytes = (kGradBytes + kWarps * kPanels * kBytes + 127) / 128 * 128;
};

template <Format kFormat, class T>
class Warp {
 public:
  using Parts = Part<kFormat>;

  DEVICE Warp(const LinearBackwardParams& p, const Expert& expert, bool vector)
      : p_(p),
        w_(p.weight),
        expert_(expert),
        vector_(vector),
        column_((block_index() * kWarps + warp_index()) * kSide),
        group_(w_.groups ? column_ / w_.group : 0),
        numbers_(shared_memory<float>()),
        stages_(shared_memory<uint8_t>(kNumbersBytes)) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
      for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][c][i] = 0.0f;
  }

  DEVICE void run() {
    const auto steps = static_cast<int>((p_.dy.n + kDepth - 1) / kDepth);
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (s < steps) fetch(s, s);
      copy_async_commit();
    }
    for (int step = 0, stage = 0; step < steps; ++step, stage = (stage + 1) % kStages) {
      copy_async_wait<kStages - 2>();
      sync_block();
      const int next = step + kStages - 1;
      if (next < steps) fetch(next, (stage + kStages - 1) % kStages);
      copy_async_commit();
#pragma unroll 1
      for (int panel = 0; panel < kPanels; ++panel)
        multiply(stages_ + stage * Parts::kStageBytes, panel);
    }
  }

  DEVICE void write() const {
    const int g = lane_index() / 4;
    by_float(p_.dx.dtype, [&](auto type) {
      using D = decltype(type);
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int64_t row = expert_.first + 8 * i + g;
        if (row >= expert_.end) break;
        D* to = static_cast<D*>(p_.dx.data) + row_offset(p_.dx, row);
#pragma unroll
        for (int c = 0; c < kColumnTiles; ++c)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int64_t k = column_ + neighbours_of(c) + j;
            if (k < w_.depth)
              store(to + k * p_.dx.step, from_float<D>(sums_[i / 2][c][i % 2 * 2 + j]));
          }
      }
    });
  }

 private:
  /// The first of this lane's two neighbours in column tile c. Formats of bytes have four
  /// neighbours of K in a lane, which are two tiles.
  DEVICE static int neighbours_of(int c) {
    constexpr bool kOfBytes = kFormat == Format::int8_dynamic || kFormat == Format::int4_dynamic;
    const int t = lane_index() % 4;
    return kOfBytes ? 16 * (c / 2) + 4 * t + 2 * (c % 2) : 8 * c + 2 * t;
  }
  DEVICE static Shared<uint8_t> part_of(Shared<uint8_t> stage, int panel) {
    return stage + kGradBytes + (warp_index() * kPanels + panel) * Parts::kBytes;
  }

  DEVICE void fetch(int step, int stage) {
    const Shared<uint8_t> to = stages_ + stage * Parts::kStageBytes;
    fetch_gradient(int64_t{step} * kDepth, to.template as<T>());
    const int64_t first = int64_t{step} * kPanels;
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
#pragma unroll
      for (int tile = 0; tile < Parts::kTiles; ++tile) {
        const bool valid = first + i < w_.panels && column_ + tile * Parts::kTileDepth < w_.depth;
        const int64_t at =
            (first + i) * w_.size + (column_ / Parts::kTileDepth + tile) * kTileBytes;
        copy_async16(part_of(to, i) + tile * kTileBytes + lane * kLaneBytes,
                     expert_.weight + (valid ? at + lane * kLaneBytes : 0), valid);
      }
    // 4 chunks of scales, 2 of zeros and 4 of factors, half a warp for each panel.
    const int i = lane / 16, chunk = lane % 16;
    const int64_t kind = chunk < 4 ? w_.scales : chunk < 6 ? w_.zeros : w_.factors;
    const int64_t at = chunk < 4   ? group_at(chunk / 2) * 32 + chunk % 2 * 16
                       : chunk < 6 ? group_at(chunk - 4) * 16
                                   : (chunk - 6) * 16;
    const bool valid = kind && first + i < w_.panels;
    if (chunk < 10)
      copy_async16(part_of(to, i) + Parts::kScales + chunk * 16,
                   expert_.weight + (valid ? (first + i) * w_.size + kind + at : 0), valid);
  }
  /// The last group again past the end.
  DEVICE int64_t group_at(int i) const {
    const int64_t last = w_.groups ? w_.groups - 1 : 0;
    return group_ + i < last ? group_ + i : last;
  }

  DEVICE void fetch_gradient(int64_t n0, Shared<T> to) const {
    const Rows& dy = p_.dy;
    constexpr int kChunks = kRowBytes / 16;
    for (int c = thread_index(); c < kSide * kChunks; c += kWarps * kWarp) {
      const int row = c / kChunks, chunk = c % kChunks;
      const int64_t r = expert_.first + row, n = n0 + chunk * 8;
      const auto at = static_cast<int>(swizzle<kSwizzle>(row * kRowBytes + chunk * 16) / 2);
      const T* from = static_cast<const T*>(dy.data);
      const bool valid = r < expert_.end && n < dy.n;
      if (valid) from += row_offset(dy, r) + n * dy.step;
      if (vector_) {
        copy_async16(to + at, from, valid);
      } else {
        Vector<T> values;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          values[i] = valid && n + i < dy.n ? load(from + i * dy.step) : from_float<T>(0.0f);
        to.store16(at, values);
      }
    }
  }

  DEVICE void multiply(Shared<uint8_t> stage, int panel) {
    const int lane = lane_index(), g = lane / 4;
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      const uint32_t offset = (m * 16 + lane % 16) * kRowBytes + (panel * 2 + lane / 16) * 16;
      ldmatrix(a[m], (stage + static_cast<int>(swizzle<kSwizzle>(offset))).template as<T>());
    }
    const Shared<uint8_t> part = part_of(stage, panel);
    Vector<uint32_t> codes[Parts::kTiles];
#pragma unroll
    for (int tile = 0; tile < Parts::kTiles; ++tile)
      codes[tile] = (part + tile * kTileBytes + lane * kLaneBytes).template as<uint32_t>().load16();
    float scale[2];
    uint32_t zeros[2];
#pragma unroll
    for (int f = 0; f < kColumnTiles / 2; ++f) {
      if (f == 0 || (f == 2 && w_.group == 32)) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = g + 8 * half, at = f / 2 * kPanel + row;
          scale[half] = (part + Parts::kFactors).template as<float>().load(row);
          if (w_.groups)
            scale[half] *= to_float((part + Parts::kScales).template as<f16>().load(at));
          zeros[half] = minus_zero<T>(w_.zeros ? part.load(Parts::kZeros + at) : 8);
        }
      }
      uint32_t b[2][2];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float low, high;
        numbers(codes, f, r, zeros[r % 2], low, high);
        b[r / 2][r % 2] = movmatrix_transposed(pack2<T>(scale[r % 2] * low, scale[r % 2] * high));
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_m16n8k16<T>(sums_[m][2 * f + i], a[m], b[i]);
    }
  }

  /// Register r of 16 columns: row g or, odd r, g + 8, two neighbours in column tile r / 2.
  DEVICE void numbers(const Vector<uint32_t> (&codes)[Parts::kTiles], int f, int r, uint32_t zeros,
                      float& low, float& high) const {
    const Vector<uint32_t>& words = codes[Parts::kTiles == 1 ? 0 : f / 2];
    if constexpr (kFormat == Format::nf4) {
      const uint32_t byte = words[f] >> 8 * r;
      low = numbers_.load(static_cast<int>(byte & 15));
      high = numbers_.load(static_cast<int>(byte >> 4 & 15));
    } else if constexpr (kFormat == Format::int4) {
      unpack2<T>(add2<T>((words[f] >> 4 * r & 0x000f000f) | kMagic<T>, zeros), low, high);
    } else if constexpr (kFormat == Format::int4_dynamic) {
      const uint32_t bits = two_bytes((words[f] >> 4 * (r % 2) & 0x0f0f0f0f) ^ 0x08080808, r / 2);
      unpack2<T>(add2<T>(bits | kMagic<T>, zeros), low, high);
    } else if constexpr (kFormat == Format::int8_dynamic) {
      unpack2<T>(from_bytes<T>(two_bytes(words[2 * (f % 2) + r % 2], r / 2)), low, high);
    } else {
      unpack2<T>(from_bytes<T>(words[2 * (f % 2) + r / 2] >> 8 * (r % 2)), low, high);
    }
  }
  /// The low or the high two of four bytes, as the low ones of two halves.
  DEVICE static uint32_t two_bytes(uint32_t bytes, int pair) {
    bytes >>= 16 * pair;
    return (bytes & 0xff) | (bytes << 8 & 0xff0000);
  }

  const LinearBackwardParams& p_;
  const Weight& w_;
  const Expert expert_;
  const bool vector_;
  const int64_t column_, group_;
  const Shared<float> numbers_;
  const Shared<uint8_t> stages_;
  float sums_[kRowTiles][kColumnTiles][4];
};

template <Format kFormat, class T>
KERNEL(kWarps* kWarp, 1)
linear_backward_mma_kernel(const GRID_CONSTANT LinearBackwardParams p,
                           const GRID_CONSTANT Numbers nf4, bool vector) {
  constexpr int kColumns = kWarps * kSide;
  Expert expert;
  if (!find_expert(p.experts, p.weight, p.rows, kSide, block_index_y(), expert)) return;
  if (!expert.weight) return write_zeros(p.dx, expert, kSide, block_index() * kColumns, kColumns);
  if constexpr (kFormat == Format::nf4) {
    if (thread_index() < 16)
      shared_memory<float>().store(thread_index(), nf4.values[thread_index()]);
  }
  Warp<kFormat, T> warp(p, expert, vector);
  warp.run();
  warp.write();
}

template <Format kFormat, class T>
void launch_mma(const LinearBackwardParams& p, const Numbers& nf4, Stream stream) {
  constexpr int kColumns = kWarps * kSide;
  const Grid grid((p.weight.depth + kColumns - 1) / kColumns, most_tiles(p.experts, p.rows, kSide));
  LAUNCH((linear_backward_mma_kernel<kFormat, T>), grid, kWarps * kWarp,
         kNumbersBytes + kStages * Part<kFormat>::kStageBytes, stream, p, nf4, is_vector(p.dy));
}

template <class T>
void choose_format(const LinearBackwardParams& p, const Numbers& nf4, Stream stream) {
  switch (p.weight.format) {
    case Format::int4:
      return launch_mma<Format::int4, T>(p, nf4, stream);
    case Format::int4_dynamic:
      return launch_mma<Format::int4_dynamic, T>(p, nf4, stream);
    case Format::int8:
      return launch_mma<Format::int8, T>(p, nf4, stream);
    case Format::int8_dynamic:
      return launch_mma<Format::int8_dynamic, T>(p, nf4, stream);
    default:
      return launch_mma<Format::nf4, T>(p, nf4, stream);
  }
}

// ---- dy of float32

constexpr int kThreads = 256, kStep = 128, kEach = 4;
constexpr int kPitch = kStep + 1;  // of dy: rows fall into different banks
constexpr int kShared = (kStep * kSide + kSide * kPitch) * 4;

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
  const int64_t k0 = block_index() * kSide;
  Expert expert;
  if (!find_expert(p.experts, w, p.rows, kSide, block_index_y(), expert)) return;
  if (!expert.weight) return write_zeros(p.dx, expert, kSide, k0, kSide);
  const int64_t m0 = expert.first;
  const int thread = thread_index(), row = thread / 16 * kEach, column = thread % 16;
  float sums[kEach][kEach] = {};
  for (int64_t n0 = 0; n0 < p.dy.n; n0 += kStep) {
    for (int i = thread; i < kStep * kSide; i += kThreads) {
      const int64_t n = n0 + i / kSide, k = k0 + i % kSide;
      const uint8_t* panel = expert.weight + n / kPanel * w.size;
      const bool inside = n < p.dy.n && k < w.depth;
      weight.store(i, inside ? weight_at(w, panel, static_cast<int>(n % kPanel), k, nf4) : 0.0f);
    }
    by_float(p.dy.dtype, [&](auto type) {
      using T = decltype(type);
      for (int i = thread; i < kStep * kSide; i += kThreads) {
        const int m = i / kStep;
        const int64_t n = n0 + i % kStep;
        float value = 0;
        if (m0 + m < expert.end && n < p.dy.n) {
          const T* from = static_cast<const T*>(p.dy.data) + row_offset(p.dy, m0 + m);
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
      if (m0 + row + i >= expert.end) break;
      T* to = static_cast<T*>(p.dx.data) + row_offset(p.dx, m0 + row + i);
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
  if (p.dy.dtype == DType::bf16) return choose_format<bf16>(p, nf4, stream);
  if (p.dy.dtype == DType::f16) return choose_format<f16>(p, nf4, stream);
  const Grid grid((p.weight.depth + kSide - 1) / kSide, most_tiles(p.experts, p.rows, kSide));
  LAUNCH(linear_backward_kernel, grid, kThreads, kShared, stream, p, nf4);
}

}  // namespace warpformer::cuda

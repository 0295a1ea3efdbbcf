// Packs quantized weights, and unpacks them: a thread has 16 bytes of a tile (pack) or a byte of
// the values (unpack), and a row of 16 its scales, zeros and factor. codes.cuh has the layout.
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "linear/codes.cuh"

namespace warpformer::cuda {
namespace {

constexpr int kThreads = 128;

int64_t blocks_of(int64_t items) { return (items + kThreads - 1) / kThreads; }
DEVICE int64_t item_index() { return block_index() * kThreads + thread_index(); }
DEVICE int64_t tiles_of(const Weight& w) {
  const int64_t depth = depth_of_tile(w.format);
  return (w.depth + depth - 1) / depth;
}

/// The row of W that is row j of a panel; those past the end, or past the gate, are -1.
DEVICE int64_t row_of(const PackLinearParams& p, int64_t panel, int64_t j) {
  const int64_t rows = p.half ? p.half : p.values.count, panels = (rows + kPanel - 1) / kPanel;
  const int64_t row = panel % panels * kPanel + j;
  return row < rows ? panel / panels * rows + row : -1;
}
template <class T>
DEVICE T* row_at(const Rows& rows, int64_t r) {
  return static_cast<T*>(rows.data) + row_offset(rows, r);
}
DEVICE float float_at(const Rows& rows, int64_t r, int64_t i) {
  float value = 0;
  by_float(rows.dtype, [&](auto type) {
    value = to_float(load(row_at<decltype(type)>(rows, r) + i * rows.step));
  });
  return value;
}
DEVICE void set_float(const Rows& rows, int64_t r, int64_t i, float value) {
  by_float(rows.dtype, [&](auto type) {
    using T = decltype(type);
    store(row_at<T>(rows, r) + i * rows.step, from_float<T>(value));
  });
}

/// The bits of an element as they are packed.
DEVICE uint32_t code_at(const PackLinearParams& p, int64_t row, int64_t k) {
  const Format format = p.weight.format;
  if (!has_4_bits(format))
    return static_cast<uint8_t>(load(row_at<int8_t>(p.values, row) + k * p.values.step));
  const uint8_t both = load(row_at<uint8_t>(p.values, row) + k / 2 * p.values.step);
  return (both >> k % 2 * 4 & 15u) ^ (format == Format::int4_dynamic ? 8u : 0u);
}

KERNEL(kThreads) pack_values_kernel(PackLinearParams p) {
  const Weight& w = p.weight;
  const int64_t tiles = tiles_of(w), item = item_index() / kWarp;
  if (item >= w.panels * tiles) return;
  const int lane = lane_index(), depth = depth_of_tile(w.format);
  const int64_t panel = item / tiles, tile = item % tiles;
  const bool bytes = w.format == Format::int8_dynamic || w.format == Format::int4_dynamic;
  const int neighbours = bytes ? 4 : 2;
  Vector<uint32_t> words{};
  for (int j = lane / 4; j < kPanel; j += 8) {
    const int64_t row = row_of(p, panel, j);
    for (int first = lane % 4 * neighbours; first < depth; first += 4 * neighbours)
      for (int i = first; i < first + neighbours; ++i) {
        const int64_t k = tile * depth + i;
        const Place place = place_of(w.format, j, i);
        if (row >= 0 && k < w.depth) words[place.word] |= code_at(p, row, k) << place.bit;
      }
  }
  store16(reinterpret_cast<uint32_t*>(w.data + panel * w.size + tile * kTileBytes) + 4 * lane,
          words);
}

/// The power of two that brings the largest scale of a row into [1, 2); 1 where all are 0.
DEVICE float power_of_two(const Rows& scales, int64_t row, int64_t n) {
  float high = 0;
  for (int64_t g = 0; g < n; ++g) high = max(high, abs(float_at(scales, row, g)));
  const float power = bits_as<float>(bits_as<uint32_t>(high) & 0x7f800000u);
  return high == 0.0f ? 1.0f : max(power, bits_as<float>(0x00800000u));
}

KERNEL(kThreads) pack_scales_kernel(PackLinearParams p) {
  const Weight& w = p.weight;
  const int64_t panel = item_index() / kPanel, j = item_index() % kPanel;
  if (panel >= w.panels) return;
  uint8_t* to = w.data + panel * w.size;
  const int64_t row = row_of(p, panel, j);
  float factor = 0;
  if (row >= 0)
    factor = w.groups ? power_of_two(p.scales, row, w.groups) : float_at(p.scales, row, 0);
  store(reinterpret_cast<float*>(to + w.factors) + j, factor);
  for (int64_t g = 0; g < w.groups; ++g) {
    const float scale = row < 0 ? 0.0f : float_at(p.scales, row, g) / factor;
    store(reinterpret_cast<f16*>(to + w.scales) + g * kPanel + j, from_float<f16>(scale));
  }
  for (int64_t g = 0; p.zeros.data && g < p.zeros.n; ++g) {
    const uint8_t zero =
        row < 0 ? uint8_t{0} : load(row_at<uint8_t>(p.zeros, row) + g * p.zeros.step);
    store(to + w.zeros + g * kPanel + j, zero);
  }
  if (!w.sums) return;
  int32_t sum = 0;
  for (int64_t k = 0; row >= 0 && k < w.depth; ++k) sum += static_cast<int8_t>(code_at(p, row, k));
  store(reinterpret_cast<int32_t*>(to + w.sums) + j, sum);
}

/// The row of W that goes to row i of the values; -1 where an index is none.
DEVICE int64_t source_row(const PackLinearParams& p, int64_t i) {
  if (!p.index) return i;
  const int64_t row = load(p.index + i);
  return 0 <= row && row < p.weight.panels * kPanel ? row : -1;
}
/// What a thread unpacks: element `column` of row i of the values or of the scales, of which row j
/// of a panel is the source; the panel is null where there is none.
struct Unpacked {
  int64_t i, column;
  const uint8_t* panel = nullptr;
  int j = 0;

  DEVICE Unpacked(const PackLinearParams& p, const Rows& rows)
      : i(item_index() / rows.n), column(item_index() % rows.n) {
    const int64_t row = i < rows.count ? source_row(p, i) : -1;
    if (row < 0) return;
    const bool second = p.half && row >= p.half;
    const int64_t in_half = second ? row - p.half : row;
    const int64_t n = in_half / kPanel + (second ? (p.half + kPanel - 1) / kPanel : 0);
    panel = p.weight.data + n * p.weight.size;
    j = static_cast<int>(in_half % kPanel);
  }
};

KERNEL(kThreads) unpack_values_kernel(PackLinearParams p) {
  const Weight& w = p.weight;
  const auto [i, byte, panel, j] = Unpacked(p, p.values);
  if (i >= p.values.count) return;
  const int64_t depth = depth_of_tile(w.format);
  const int codes = has_4_bits(w.format) ? 2 : 1, bits = 8 / codes;
  uint32_t value = 0;
  for (int c = 0; panel && c < codes; ++c) {
    const int64_t k = byte * codes + c;
    if (k >= w.depth) break;
    const Place place = place_of(w.format, j, static_cast<int>(k % depth));
    const uint32_t* words = reinterpret_cast<const uint32_t*>(panel + k / depth * kTileBytes);
    uint32_t code = load(words + 4 * place.lane + place.word) >> place.bit & ((1u << bits) - 1);
    if (w.format == Format::int4_dynamic) code ^= 8;
    value |= code << c * bits;
  }
  store(row_at<uint8_t>(p.values, i) + byte * p.values.step, static_cast<uint8_t>(value));
}

KERNEL(kThreads) unpack_scales_kernel(PackLinearParams p) {
  const Weight& w = p.weight;
  const auto [i, g, panel, j] = Unpacked(p, p.scales);
  if (i >= p.scales.count) return;
  float scale = __builtin_nanf("");
  if (panel) scale = load(reinterpret_cast<const float*>(panel + w.factors) + j);
  if (panel && w.groups)
    scale *= to_float(load(reinterpret_cast<const f16*>(panel + w.scales) + g * kPanel + j));
  set_float(p.scales, i, g, scale);
  if (p.zeros.data)
    store(row_at<uint8_t>(p.zeros, i) + g * p.zeros.step,
          panel ? load(panel + w.zeros + g * kPanel + j) : uint8_t{0});
}

}  // namespace

void pack_linear(const PackLinearParams& p, Stream stream) {
  const Weight& w = p.weight;
  const int64_t tiles = (w.depth + tile_depth(w.format) - 1) / tile_depth(w.format);
  LAUNCH(pack_values_kernel, blocks_of(w.panels * tiles * kWarp), kThreads, 0, stream, p);
  LAUNCH(pack_scales_kernel, blocks_of(w.panels * kPanel), kThreads, 0, stream, p);
}

void unpack_linear(const PackLinearParams& p, Stream stream) {
  LAUNCH(unpack_values_kernel, blocks_of(p.values.count * p.values.n), kThreads, 0, stream, p);
  LAUNCH(unpack_scales_kernel, blocks_of(p.scales.count * p.scales.n), kThreads, 0, stream, p);
}

}  // namespace warpformer::cuda

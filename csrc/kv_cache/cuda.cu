// append_to_cache_: a team takes a head of a new token, a thread 8 of its columns at a time.
//
//   x row --max |x|--> scale --> round(x / scale) --> slot        int8: the row is read twice
//   x row -----------------------------------------> slot         other caches: once
//
// copy_blocks_: a thread takes the same 16 bytes of all blocks, and reads those of kAtOnce copies
// before it writes them; what one of these has written and another reads is passed on in registers.
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "kv_cache/cuda_slots.cuh"

namespace warpformer::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kAtOnce = 8;

/// 8 elements of a row from column i on, 0 from `width` on.
template <class T>
DEVICE void read(const T* row, int64_t step, int64_t i, int64_t width, float (&values)[kChunk]) {
  if (i + kChunk <= width && is_vector_row(row + i, step)) {
    load_chunk(row + i, values, Cache::normal, Where::here());
    return;
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    values[j] = i + j < width ? to_float(load(row + (i + j) * step)) : 0.0f;
}

/// A head of a new token, its slot in the cache, and the scale of that.
template <class T>
struct NewRow {
  const T* x;
  int64_t step, width;

  DEVICE void copy(const Team& team, const Heads& cache, Slot slot, int64_t head) const {
    by_float(cache.dtype, [&](auto type) {
      using To = decltype(type);
      To* to = at<To>(cache, slot, head);
      for (int64_t i = kChunk * team.index; i < width; i += kChunk * team.size) {
        float values[kChunk];
        read(x, step, i, width, values);
        To* out = to + i;
        if (i + kChunk <= width && is_vector_row(out, 1)) {
          store_chunk(out, values, Cache::normal, Where::here());
        } else {
#pragma unroll
          for (int j = 0; j < kChunk; ++j)
            if (i + j < width) store(out + j, from_float<To>(values[j]));
        }
      }
    });
  }

  /// The maximum of |x| over the row; NaN where an element is.
  DEVICE float highest(const Team& team) const {
    float high = 0.0f;
    for (int64_t i = kChunk * team.index; i < width; i += kChunk * team.size) {
      float values[kChunk];
      read(x, step, i, width, values);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) high = nan_max(high, abs(values[j]));
    }
    for (int lane = team.size / 2; lane; lane /= 2) {
      const float other = shuffle_xor(high, lane);
      high = nan_max(high, other);
    }
    return high;
  }

  /// As the CPU's kernel does it, bit by bit: to nearest even; a head of zeros has scale 0, and NaN
  /// and infinity become a scale that is NaN.
  template <class Scale>
  DEVICE void quantize(const Team& team, float high, int8_t* to, Scale* scale) const {
    constexpr float kRound = 0x1.8p23f;  // adding it leaves a whole number in the low bits
    const bool finite = high - high == 0.0f, zero = high < 0x1p-110f;
    const Scale rounded = from_float<Scale>(!finite ? __builtin_nanf("")
                                            : zero  ? 0.0f
                                                    : high / 127.0f);
    if (team.index == 0) store(scale, rounded);
    const float inverse = finite && !zero ? 1.0f / to_float(rounded) : 0.0f;
    for (int64_t i = kChunk * team.index; i < width; i += kChunk * team.size) {
      float values[kChunk];
      read(x, step, i, width, values);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const float whole = values[j] * inverse + kRound;
        if (i + j < width)
          store(to + i + j, static_cast<int8_t>(finite ? bits_as<uint32_t>(whole) : 0));
      }
    }
  }
};

/// Blocks (x, y): teams for the heads of tokens; keys, values.
KERNEL(kThreads) append_kernel(AppendParams p, int size) {
  const Team team(size);
  const KvCache& c = p.cache;
  const bool is_key = block_index_y() == 0;
  const Heads &x = is_key ? p.k : p.v, &cache = is_key ? c.k : c.v;
  const Heads& scales = is_key ? c.k_scales : c.v_scales;
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : c.batch);
  const int64_t token = team.row / c.kv_heads, head = team.row % c.kv_heads;
  const bool is_row = token < tokens;
  const int64_t sequence = is_row ? sequence_of(p.tokens, c.batch, token) : 0;
  const Part part = part_of(p.tokens, sequence);
  const int64_t t = token - (p.tokens.cu_seqlens ? part.first : sequence * p.tokens.count);
  const int64_t number = load(c.lengths + sequence) + t;
  Slot slot{-1, 0};
  if (is_row && t >= 0 && t < part.count && number >= 0 && number < c.max_blocks * c.block_size)
    slot = slot_of(c, sequence, number);
  by_float(x.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_there = slot.block >= 0;
    const Slot from{static_cast<int32_t>(part.batch), static_cast<int32_t>(part.first + t)};
    const NewRow<T> row{is_there ? at<const T>(x, from, head) : nullptr, x.stride[3],
                        is_there ? (is_key ? c.width : c.value_width) : 0};
    if (cache.dtype != DType::i8) {
      if (is_there) row.copy(team, cache, slot, head);
      return;
    }
    const float high = row.highest(team);  // all of a warp together
    if (!is_there) return;
    by_float(scales.dtype, [&](auto scale) {
      row.quantize(team, high, at<int8_t>(cache, slot, head),
                   at<decltype(scale)>(scales, slot, head));
    });
  });
}

KERNEL(kThreads) positions_kernel(AppendPositionsParams p) {
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.batch);
  const int64_t token = block_index() * kThreads + thread_index();
  if (token >= tokens) return;
  const int64_t sequence = sequence_of(p.tokens, p.batch, token);
  const int64_t first =
      p.tokens.cu_seqlens ? part_of(p.tokens, sequence).first : sequence * p.tokens.count;
  store(p.positions + token, static_cast<int32_t>(load(p.lengths + sequence) + token - first));
}

/// What a thread moves at once: 16 bytes, or one where blocks do not begin at multiples of 16.
struct Bytes16 {
  using Value = Vector<uint8_t>;
  static constexpr int size = 16;
  DEVICE static Value read(const char* p) { return load16(reinterpret_cast<const uint8_t*>(p)); }
  DEVICE static void write(char* p, const Value& v) { store16(reinterpret_cast<uint8_t*>(p), v); }
};
struct Bytes1 {
  using Value = char;
  static constexpr int size = 1;
  DEVICE static Value read(const char* p) { return load(p); }
  DEVICE static void write(char* p, Value v) { store(p, v); }
};

template <class Unit>
KERNEL(kThreads)
copy_kernel(CopyBlocksParams p) {
  const int64_t at = (block_index() * kThreads + thread_index()) * Unit::size;
  if (at >= p.bytes) return;
  for (int64_t first = 0; first < p.copies; first += kAtOnce) {
    int64_t from[kAtOnce], to[kAtOnce];
    typename Unit::Value values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      from[i] = to[i] = -1;
      if (first + i >= p.copies) continue;
      from[i] = load(p.old_blocks + first + i);
      to[i] = load(p.new_blocks + first + i);
      const bool are_there = from[i] >= 0 && from[i] < p.blocks && to[i] >= 0 && to[i] < p.blocks;
      if (!are_there) from[i] = to[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = {};
      if (from[i] >= 0) values[i] = Unit::read(p.data + from[i] * p.block + at);
    }
#pragma unroll
    for (int i = 1; i < kAtOnce; ++i)
#pragma unroll
      for (int before = 0; before < i; ++before)
        if (from[i] >= 0 && from[i] == to[before]) values[i] = values[before];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (to[i] >= 0) Unit::write(p.data + to[i] * p.block + at, values[i]);
  }
}

template <class Unit>
void copy(const CopyBlocksParams& p, Stream stream) {
  const int64_t of_block = int64_t{kThreads} * Unit::size;
  LAUNCH(copy_kernel<Unit>, (p.bytes + of_block - 1) / of_block, kThreads, 0, stream, p);
}

}  // namespace

void append_to_cache_(const AppendParams& p, Stream stream) {
  const KvCache& c = p.cache;
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : c.batch);
  int size = team_size<1>(c.width > c.value_width ? c.width : c.value_width);
  if (size > kWarp) size = kWarp;
  LAUNCH(append_kernel, Grid(team_blocks(tokens * c.kv_heads, size), 2), kThreads, 0, stream, p,
         size);
}

void append_positions(const AppendPositionsParams& p, Stream stream) {
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.batch);
  LAUNCH(positions_kernel, (tokens + kThreads - 1) / kThreads, kThreads, 0, stream, p);
}

void copy_blocks_(const CopyBlocksParams& p, Stream stream) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && p.block % 16 == 0 && p.bytes % 16 == 0;
  if (aligned) return copy<Bytes16>(p, stream);
  copy<Bytes1>(p, stream);
}

}  // namespace warpformer::cuda

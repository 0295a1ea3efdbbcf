// Forward of attention on Hopper: tensor copies fetch tiles, wgmma multiplies them, softmax runs in
// registers. A block takes tiles of 128 queries of a head, one after the other; its 3 warpgroups:
//
//   producer (1 warp)     per tile     wait q_empty, copy Q           -> q_full
//                         per 128 keys wait k_empty[s], copy K        -> k_full[s]    s = 0, 1
//                                      wait v_empty[s], copy V        -> v_full[s]
//   consumers 0 and 1     64 queries each, keys from the last tile to the first:
//
//       wait my turn   S = Q K[n]^T  starts        (k_full)
//                      O += P V[n+1] starts        (v_full)     P: of the tile before, in registers
//       pass the turn
//       S is done    -> k_empty    m, P' = exp2(c S - c m): runs while O += P V does,
//                                  and while the other consumer's products do
//       O is done    -> v_empty    O *= exp2(c m_old - c m), P = P'
//
// Taking turns keeps one consumer in softmax while the tensor cores work for the other.
//
//   tile            shared memory: boxes of 64 columns, rows of 128 bytes, swizzled
//   Q [128, D]      16 KiB a box
//   K [128, D] x 2  16 KiB a box: K-major operand
//   V [128, D] x 2  16 KiB a box: the other operand's MN-major form, so that nothing is transposed
//
// Copies fill rows and columns beyond the tensor with zeros. Where a tile holds keys that a row
// does not see, the consumers clean V together, before they take their turns (cuda_sm90.cuh).
//
// Blocks walk the tiles forwards and backwards in turn, which evens out their work.
//
// Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and
// Low-precision" (2024).
#include <algorithm>

#include "attention/cuda_sm90.cuh"
#include "attention/cuda_sm90.h"
#include "core/cuda/bulk.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/wgmma.cuh"

namespace warpformer::cuda {
namespace {

using namespace sm90;

constexpr int kStages = 2;
constexpr int kWarpgroup = 128, kConsumers = 2;
constexpr int kBox = 64;  // columns: 128 bytes
constexpr int kBoxBytes = kKeys * 128;

/// Where things lie in shared memory.
template <int width>
struct Layout {
  static constexpr int kTileBytes = width / kBox * kBoxBytes;
  static constexpr int kBarriers = 2 + 4 * kStages;
  static constexpr int kBytes = 1024 + (1 + 2 * kStages) * kTileBytes + kBarriers * Barrier::bytes +
                                4 * kConsumers * kWarpgroup / kWarp;

  /// Tiles begin at multiples of 1024, where the swizzle's pattern does.
  DEVICE static uint32_t tiles() { return (shared_memory<char>().address() + 1023) / 1024 * 1024; }
  template <class T>
  DEVICE static Shared<T> q() {
    return Shared<T>(tiles());
  }
  template <class T>
  DEVICE static Shared<T> k(int stage) {
    return Shared<T>(tiles() + (1 + stage) * kTileBytes);
  }
  template <class T>
  DEVICE static Shared<T> v(int stage) {
    return Shared<T>(tiles() + (1 + kStages + stage) * kTileBytes);
  }
  DEVICE static Barrier barrier(int i) {
    return Barrier(Shared<uint64_t>(tiles() + (1 + 2 * kStages) * kTileBytes + i * Barrier::bytes));
  }
  /// For each warp of the consumers, whether it had to clean V.
  DEVICE static Shared<int> poisoned() { return Shared<int>(barrier(kBarriers).address()); }
  DEVICE static Barrier q_full() { return barrier(0); }
  DEVICE static Barrier q_empty() { return barrier(1); }
  DEVICE static Barrier k_full(int stage) { return barrier(2 + stage); }
  DEVICE static Barrier k_empty(int stage) { return barrier(2 + kStages + stage); }
  DEVICE static Barrier v_full(int stage) { return barrier(2 + 2 * kStages + stage); }
  DEVICE static Barrier v_empty(int stage) { return barrier(2 + 3 * kStages + stage); }
};

/// A stage of the ring, and in which parity its barriers complete.
struct Slot {
  int stage = 0, phase = 0;
  DEVICE void next() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

struct Problem {
  AttentionParams p;
  Order order;
  bool q_boxed, k_boxed, v_boxed;  // whether the copy engine can fetch it
  bool out_paired;                 // whether pairs of columns lie at multiples of 4 bytes
};

/// Calls f(queries) for the tiles of this block.
template <class F>
DEVICE void for_each_tile(const Problem& a, const F& f) {
  const int64_t blocks = grid_blocks(), tiles = a.order.tiles * a.order.heads;
  for (int64_t begin = 0, round = 0; begin < tiles; begin += blocks, ++round) {
    const int64_t index = begin + (round % 2 ? blocks - 1 - block_index() : block_index());
    if (index >= tiles) continue;
    const Place at = place(a.p, a.order, false, kRows, index);
    if (at.exists && at.tile * kRows < at.sequence.queries) f(Queries(a.p, at));
  }
}

/// An operand, how it is fetched, and how far it goes.
struct Source {
  const Heads& x;
  const TensorMap& map;
  bool boxed;
  int64_t rows, columns;
};

/// A tile of `width` columns from a row of a head on, by a warp: box after box or, with strides
/// that the copy engine does not take, chunk by chunk.
template <int width, class T>
DEVICE void copy_tile(Shared<T> to, const Source& from, int row, int64_t head, int64_t batch,
                      Barrier full) {
  if (from.boxed) {
    if (!elect()) return;
    full.arrive_expect(Layout<width>::kTileBytes);
#pragma unroll
    for (int box = 0; box < width / kBox; ++box)
      tensor_load(to + box * kBoxBytes / 2, from.map,
                  {box * kBox, row, static_cast<int>(head), static_cast<int>(batch)}, full);
    return;
  }
  constexpr int kChunk = Vector<T>::size, kChunks = width / kChunk;
#pragma unroll 1
  for (int i = lane_index(); i < kKeys * kChunks; i += kWarp) {
    const int r = i / kChunks, c = i % kChunks;
    const T* at = row_of<T>(from.x, batch, head, row + r) + c * kChunk * from.x.stride[3];
    Vector<T> values;
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      values[j] =
          row + r < from.rows && c * kChunk < from.columns ? load(at + j * from.x.stride[3]) : T{};
    const auto offset = swizzle<Swizzle::bytes128>(r * 128 + c % 8 * 16);
    to.store16((c / 8 * kBoxBytes + static_cast<int>(offset)) / 2, values);
  }
  fence_proxy_async();
  sync_warp();
  if (lane_index() == 0) full.arrive();
}

template <class T, int width>
DEVICE void produce(const TensorMap& q_map, const TensorMap& k_map, const TensorMap& v_map,
                    const Problem& a) {
  using At = Layout<width>;
  const Source q{a.p.q, q_map, a.q_boxed, a.p.queries, a.p.width};
  const Source k{a.p.k, k_map, a.k_boxed, a.p.keys, a.p.width};
  const Source v{a.p.v, v_map, a.v_boxed, a.p.keys, a.p.value_width};
  Slot slot;
  int q_phase = 0;
  for_each_tile(a, [&](const Queries& tile) {
    const Sequence& at = tile.s;
    const int first = tile.first(), last = tile.last();
    for (int n = last; n >= first; --n, slot.next()) {
      const int s = slot.stage, key = at.first_key + n * kKeys;
      At::k_empty(s).wait(slot.phase ^ 1);
      copy_tile<width>(At::template k<T>(s), k, key, tile.kv_head(), at.batch, At::k_full(s));
      if (n == last) {
        At::q_empty().wait(q_phase ^ 1);
        copy_tile<width>(At::template q<T>(), q, at.first_query + tile.row, tile.head, at.batch,
                         At::q_full());
        q_phase ^= 1;
      }
      At::v_empty(s).wait(slot.phase ^ 1);
      copy_tile<width>(At::template v<T>(s), v, key, tile.kv_head(), at.batch, At::v_full(s));
    }
  });
}

/// The threads of the two consumers take turns at starting products.
struct Turn {
  int consumer;
  DEVICE void wait() const { barrier_sync(1 + consumer, kConsumers * kWarpgroup); }
  DEVICE void pass() const { barrier_arrive(2 - consumer, kConsumers * kWarpgroup); }
};

/// 64 queries of a warpgroup. This thread has rows `row` and `row` + 8, of a tile of keys the
/// columns 8 j + column and the one after it: values 4 j, 4 j + 1 of the first row, then two of the
/// second.
template <class T, int width>
struct Consumer {
  using At = Layout<width>;

  const Problem& a;
  Turn turn;
  Slot slot;  // of the tile of keys whose scores come next
  int q_phase = 0;
  float s[kKeys / 2], o[width / 2];
  uint32_t p[kKeys / 16][4];
  bool poisoned = false;    // V had to be cleaned
  float high[2], total[2];  // the highest score of a row, and the sum of exp2(c (s - high))

  DEVICE explicit Consumer(const Problem& a) : a(a), turn{warp_index() / 4 - 1} {}

  /// Of this thread, in a tile that begins at `first`.
  DEVICE int own_row(int first) const {
    return first + turn.consumer * 64 + warp_index() % 4 * 16 + lane_index() / 4;
  }
  DEVICE int column() const { return 2 * (lane_index() % 4); }

  /// Tells the producer, once a warp, that this warp is done with what the barrier guards.
  DEVICE void release(Barrier empty) const {
    if (lane_index() == 0) empty.arrive();
  }

  /// Starts S = Q K^T.
  DEVICE void start_scores() {
    const auto q = At::template q<T>() + turn.consumer * 64 * kBox;
    const auto k = At::template k<T>(slot.stage);
    wgmma_fence(s);
#pragma unroll
    for (int i = 0; i < width / 16; ++i) {
      const int offset = i / 4 * kBoxBytes + i % 4 * 32;
      wgmma<T>(s, make_descriptor(q, 16, 1024, Swizzle::bytes128) + offset,
               make_descriptor(k, 16, 1024, Swizzle::bytes128) + offset, i > 0);
    }
    wgmma_commit();
  }

  /// Starts O += P V, or O = P V.
  DEVICE void start_output(int stage, bool accumulate) {
    const auto v = At::template v<T>(stage);
    wgmma_fence(o);
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
      wgmma<T, Major::mn>(o, p[i],
                          make_descriptor(v, kBoxBytes, 1024, Swizzle::bytes128) + i * 16 * 128,
                          accumulate || i > 0);
    wgmma_commit();
  }

  /// Hides what a row does not see, where the tile holds such keys.
  DEVICE void mask(const Queries& tile, int n) {
    const int top = tile.row + turn.consumer * 64, begin = n * kKeys;
    if (!tile.hides(begin, top, 64)) return;
    uint32_t kept = ~0u;  // of this thread's columns
    if (a.p.mask.data) {
      kept = 0;
#pragma unroll 1
      for (int j = 0; j < kKeys / 4; ++j) {
        const int key = begin + column() + j / 2 * 8 + j % 2;
        if (key < tile.s.keys) kept |= uint32_t{tile.keeps(key)} << j;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Range seen = tile.seen(own_row(tile.row) + 8 * half);
      const int first = seen.begin - begin - column(), end = seen.end - begin - column();
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (8 * j + i < first || 8 * j + i >= end || !(kept >> (2 * j + i) & 1))
            s[4 * j + 2 * half + i] = -kInfinity;
    }
  }

  /// Waits for V, and with the other consumer cleans it if some of the keys are hidden.
  DEVICE void receive_values(const Queries& tile, int n, const Slot& at) {
    At::v_full(at.stage).wait(at.phase);
    if (!tile.hides(n * kKeys, tile.row, kRows)) return;
    constexpr int kThreads = kConsumers * kWarpgroup, kWarps = kThreads / kWarp, kBarrier = 3;
    const bool found = any(
        clean(At::template v<T>(at.stage), kKeys * width, thread_index() - kWarpgroup, kThreads));
    if (lane_index() == 0) At::poisoned().store(warp_index() - kWarpgroup / kWarp, found);
    fence_proxy_async();
    barrier_sync(kBarrier, kThreads);
#pragma unroll 1
    for (int i = 0; i < kWarps; ++i) poisoned |= At::poisoned().load(i) != 0;
    barrier_sync(kBarrier, kThreads);
  }

  /// S becomes exp2(c (s - high)); returns what O and the sums so far are multiplied by.
  DEVICE void softmax(float (&factor)[2]) {
    const float c = a.p.scale * kLog2E;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = high[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
        top = max(top, max(s[4 * j + 2 * half], s[4 * j + 2 * half + 1]));
      top = max(top, shuffle_xor(top, 1));
      top = max(top, shuffle_xor(top, 2));
      const float base = top == -kInfinity ? 0.0f : top * c;  // of a row that sees nothing yet
      factor[half] = exp2_approx(fma(high[half], c, -base));
      high[half] = top;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& value = s[4 * j + 2 * half + i];
          value = exp2_approx(fma(value, c, -base));
          sum += value;
        }
      total[half] = fma(total[half], factor[half], sum);
    }
  }

  /// P = S, as the operand of O += P V.
  DEVICE void pack() {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) p[i][j] = pack2<T>(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
  }

  DEVICE void multiply_output(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < width / 2; ++i) o[i] *= factor[i / 2 % 2];
  }

  DEVICE void attend(const Queries& tile) {
    const int first = tile.first(), last = tile.last();
    float factor[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) high[half] = -kInfinity, total[half] = 0.0f;
    if (last < first) {
#pragma unroll
      for (float& value : o) value = 0.0f;
      return;
    }
    At::q_full().wait(q_phase);
    q_phase ^= 1;
    At::k_full(slot.stage).wait(slot.phase);
    turn.wait();
    start_scores();
    turn.pass();
    wgmma_wait<0>(s);
    release(At::k_empty(slot.stage));
    mask(tile, last);
    softmax(factor);
    pack();
    Slot before = slot;  // of the tile of keys whose P is there
    slot.next();
    for (int n = last - 1; n >= first; --n) {
      At::k_full(slot.stage).wait(slot.phase);
      receive_values(tile, n + 1, before);
      turn.wait();
      start_scores();
      start_output(before.stage, n < last - 1);
      turn.pass();
      wgmma_wait<1>(s);
      release(At::k_empty(slot.stage));
      mask(tile, n);
      softmax(factor);
      wgmma_wait<0>(o);
      release(At::v_empty(before.stage));
      multiply_output(factor);
      pack();
      before = slot;
      slot.next();
    }
    release(At::q_empty());
    receive_values(tile, first, before);
    turn.wait();
    start_output(before.stage, first < last);
    turn.pass();
    wgmma_wait<0>(o);
    release(At::v_empty(before.stage));
  }

  /// Sinks join the sums; a row of none stays 0. Then out and lse are written.
  DEVICE void finish(const Queries& tile) {
    const Sequence& at = tile.s;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = total[half];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      const int row = own_row(tile.row) + 8 * half;
      if (row >= at.queries) continue;
      float top = high[half] * a.p.scale, factor = 1.0f;
      if (a.p.sinks && sum != 0.0f) {
        const float sink = load(a.p.sinks + tile.head), higher = max(top, sink);
        factor = exp(top - higher);
        sum = sum * factor + exp(sink - higher);
        top = higher;
      }
      write(half, sum == 0.0f ? 0.0f : factor / sum,
            row_of<T>(a.p.out, at.batch, tile.head, at.first_query + row));
      if (a.p.lse.data && column() == 0)
        store(row_of<float>(a.p.lse, at.batch, tile.head, at.first_query + row),
              sum == 0.0f ? -kInfinity : top + log(sum));
    }
    if (!poisoned) return;
#pragma unroll 1
    for (int half = 0; half < 2; ++half)
      if (const int row = own_row(tile.row) + 8 * half; row < at.queries)
        attend_row<T, width / 4>(tile, row, column());
  }

  DEVICE void write(int half, float share, T* to) const {
    const int64_t step = a.p.out.stride[3];
#pragma unroll
    for (int j = 0; j < width / 8; ++j) {
      const int c = 8 * j + column();
      if (c >= a.p.value_width) continue;
      const uint32_t pair = pack2<T>(o[4 * j + 2 * half] * share, o[4 * j + 2 * half + 1] * share);
      if (a.out_paired) {
        store(reinterpret_cast<uint32_t*>(to + c), pair);
      } else {
        store(to + c * step, T{static_cast<uint16_t>(pair)});
        store(to + (c + 1) * step, T{static_cast<uint16_t>(pair >> 16)});
      }
    }
  }
};

template <class T, int width>
KERNEL((1 + kConsumers) * kWarpgroup, 1)
attend_tiles(const GRID_CONSTANT TensorMap q, const GRID_CONSTANT TensorMap k,
             const GRID_CONSTANT TensorMap v, const GRID_CONSTANT Problem a) {
  using At = Layout<width>;
  if (thread_index() == 0) {
    constexpr int kWarps = kConsumers * kWarpgroup / kWarp;
    At::q_full().init(1);
    At::q_empty().init(kWarps);
    for (int s = 0; s < kStages; ++s) {
      At::k_full(s).init(1), At::v_full(s).init(1);
      At::k_empty(s).init(kWarps), At::v_empty(s).init(kWarps);
    }
    fence_barrier_init();
  }
  sync_block();
  if (warp_index() < kWarpgroup / kWarp) {
    decrease_registers<40>();
    if (warp_index() == 0) produce<T, width>(q, k, v, a);
  } else {
    increase_registers<232>();
    Consumer<T, width> consumer(a);
    if (consumer.turn.consumer == 1) consumer.turn.pass();
    for_each_tile(a, [&](const Queries& tile) {
      consumer.attend(tile);
      consumer.finish(tile);
    });
    if (consumer.turn.consumer == 0) consumer.turn.wait();
  }
}

/// Whether the copy engine takes an operand's strides.
bool is_boxed(const Heads& x, const int64_t (&sizes)[3]) {
  bool result = x.stride[3] == 1 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int i = 0; i < 3; ++i)
    result &= sizes[i] == 1 ||
              (x.stride[i] > 0 && x.stride[i] % 8 == 0 && x.stride[i] < int64_t{1} << 38);
  return result;
}

template <class T>
TensorMap boxes_of(const Heads& x, bool boxed, int64_t width, const int64_t (&outer)[3]) {
  if (!boxed) return {};
  const int64_t sizes[] = {width, outer[2], outer[1], outer[0]};
  int64_t strides[] = {1, x.stride[2], x.stride[1], x.stride[0]};
  for (int i = 1; i < 4; ++i)
    if (sizes[i] == 1) strides[i] = 8;  // of no consequence, but the driver looks at it
  return make_tensor_map(reinterpret_cast<const T*>(x.data), sizes, strides, {kBox, kKeys, 1, 1},
                         Swizzle::bytes128);
}

template <class T, int width>
void attention(const AttentionParams& p, Stream stream) {
  const int64_t batches = p.cu_seqlens_q ? 1 : p.sequences;
  const int64_t queries[] = {batches, p.heads, p.queries}, keys[] = {batches, p.kv_heads, p.keys};
  const Heads& out = p.out;
  const Problem a{p,
                  order_of(p, false, kRows),
                  is_boxed(p.q, queries),
                  is_boxed(p.k, keys),
                  is_boxed(p.v, keys),
                  out.stride[3] == 1 && out.stride[0] % 2 == 0 && out.stride[1] % 2 == 0 &&
                      out.stride[2] % 2 == 0 && reinterpret_cast<uintptr_t>(out.data) % 4 == 0};
  const int64_t blocks =
      std::min<int64_t>(multiprocessors(stream.device), a.order.tiles * a.order.heads);
  LAUNCH((attend_tiles<T, width>), blocks, (1 + kConsumers) * kWarpgroup, Layout<width>::kBytes,
         stream, boxes_of<T>(p.q, a.q_boxed, p.width, queries),
         boxes_of<T>(p.k, a.k_boxed, p.width, keys),
         boxes_of<T>(p.v, a.v_boxed, p.value_width, keys), a);
}

/// None, or a boolean mask of keys that all heads and queries share.
bool is_padding(const Heads& mask) {
  return !mask.data || (mask.dtype == DType::boolean && !mask.stride[1] && !mask.stride[2]);
}

}  // namespace

// By shapes and options, not by strides: these do not decide about bits.
bool fits_sm90(const AttentionParams& p) {
  return p.q.dtype != DType::f32 && p.width <= 128 && p.value_width <= 128 && p.width % 8 == 0 &&
         p.value_width % 8 == 0 && p.keys > 0 && p.scale > 0.0f && p.softcap == 0.0f && !p.slopes &&
         !p.position_bias.table.data && !p.dropout.seed && is_padding(p.mask) &&
         p.queries + p.keys < int64_t{1} << 30;
}

void attention_sm90(const AttentionParams& p, Stream stream) {
  const bool narrow = p.width <= 64 && p.value_width <= 64;
  if (p.q.dtype == DType::bf16) {
    narrow ? attention<bf16, 64>(p, stream) : attention<bf16, 128>(p, stream);
  } else {
    narrow ? attention<f16, 64>(p, stream) : attention<f16, 128>(p, stream);
  }
}

}  // namespace warpformer::cuda

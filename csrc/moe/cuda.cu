// sort_by_expert: one block. Each warp has a run of the places, and walks it twice, 32 at a time.
//
//   places      | warp 0 | warp 1 |  ..  |         a run: whole 32s
//   --count-->  per warp and expert, in shared memory: how many places
//   --add up, down the warps, then over the experts--> before: the rows of an expert that earlier
//                      warps have; begin: where those of an expert begin; offsets
//   --lanes of one expert find each other by a vote on every bit of its number-->
//               row = begin + before + lanes before this one; then before += all of these lanes
//
// Counts are whole numbers, added by atomics in any order; everything else has one order. What
// bounds it is latency, not bytes: in a step of decoding, of a warp or two, that of the launch, of
// two reads and of three barriers; in a long prompt that of load, votes and row, one after the
// other for every 32 places of a warp, on a single multiprocessor (65536 places: 64 times).
//
// spread_rows: a team of threads copies a row, 16 bytes a thread at a time.
//
// sum_rows: a team owns a range of columns of a token; a thread holds 8, and asks for those of four
// rows before it adds the first of them.
//   places[n, j], weights[n, j] --> rows --times weight, j after j--> total --> out[n]
#include <algorithm>

#include "core/cuda/atomic.cuh"
#include "core/cuda/launch.cuh"
#include "core/cuda/rows.cuh"
#include "moe/op.h"

namespace warpformer::cuda {
namespace {

// ---- sort_by_expert

constexpr int kMaxWarps = 32, kMaxThreads = kMaxWarps * kWarp;
constexpr int kCounts = 12 << 10;  // in shared memory: the 48 KiB that every GPU has

/// The expert of a place; one more than the last where there is no such one.
DEVICE int expert_of(const SortByExpertParams& p, int64_t place) {
  const int64_t offset = row_offset(p.ids, place);
  const int64_t id = p.ids.dtype == DType::i64
                         ? load(static_cast<const int64_t*>(p.ids.data) + offset)
                         : load(static_cast<const int32_t*>(p.ids.data) + offset);
  return id >= 0 && id < p.experts ? static_cast<int>(id) : p.experts;
}

/// The lanes whose value, of so many bits, is that of this one.
DEVICE uint32_t lanes_of_same(int value, int bits) {
  uint32_t same = ~0u;
  for (int b = 0; b < bits; ++b) {
    const bool bit = value >> b & 1;
    const uint32_t lanes = ballot(bit);
    same &= bit ? lanes : ~lanes;
  }
  return same;
}

/// Each of n numbers becomes the sum of those before it; f(i, the sum with it). By one warp.
template <class F>
DEVICE void sum_before(Shared<int32_t> numbers, int n, F f) {
  const int each = (n + kWarp - 1) / kWarp, first = lane_index() * each;
  const int end = first + each < n ? first + each : n;
  int32_t own = 0;
  for (int i = first; i < end; ++i) own += numbers.load(i);
  int32_t sum = own;
#pragma unroll
  for (int delta = 1; delta < kWarp; delta *= 2) {
    const int32_t before = shuffle_up(sum, delta);
    if (lane_index() >= delta) sum += before;
  }
  sum -= own;
  for (int i = first; i < end; ++i) {
    const int32_t number = numbers.load(i);
    numbers.store(i, sum);
    sum += number;
    f(i, sum);
  }
}

KERNEL(kMaxThreads) sort_by_expert_kernel(SortByExpertParams p, int bits) {
  const int bins = p.experts + 1, warps = block_threads() / kWarp, lane = lane_index();
  const Shared<int32_t> counts = shared_memory<int32_t>(), begin = counts + warps * bins;
  const Shared<int32_t> before = counts + warp_index() * bins;
  const int64_t run = (p.ids.count + warps * kWarp - 1) / (warps * kWarp) * kWarp;
  const int64_t first = warp_index() * run;
  const int64_t end = first + run < p.ids.count ? first + run : p.ids.count;

  for (int e = lane; e < bins; e += kWarp) before.store(e, 0);
  sync_warp();
  for (int64_t i = first + lane; i < end; i += kWarp) atomic_add(before + expert_of(p, i), 1);
  sync_block();
  for (int e = thread_index(); e < bins; e += block_threads()) {
    int32_t sum = 0;
    for (int at = e; at < warps * bins; at += bins) {
      const int32_t count = counts.load(at);
      counts.store(at, sum);
      sum += count;
    }
    begin.store(e, sum);
  }
  sync_block();
  if (warp_index() == 0) {
    sum_before(begin, bins, [&](int e, int32_t rows) {
      if (e < p.experts) store(p.offsets + e, rows);
    });
  }
  sync_block();
  for (int64_t i = first; i < end; i += kWarp) {
    const int64_t place = i + lane;
    const bool inside = place < end;
    const int e = inside ? expert_of(p, place) : bins;
    const uint32_t same = lanes_of_same(e, bits);
    const int32_t rows = inside ? before.load(e) : 0;
    if (inside) {
      const int64_t row = begin.load(e) + rows + count_lanes(same & ((1u << lane) - 1));
      store(p.places + place, row);
      store(p.order + row, place);
    }
    sync_warp();
    if (inside && lane == first_lane(same)) before.store(e, rows + count_lanes(same));
    sync_warp();
  }
}

// ---- spread_rows

constexpr int kThreads = 128;

DEVICE void copy(uint16_t* to, const uint16_t* from) { store(to, load(from)); }
DEVICE void copy(uint32_t* to, const uint32_t* from) { store(to, load(from)); }
using Bytes16 = Vector<uint32_t>;
DEVICE void copy(Bytes16* to, const Bytes16* from) { store16(to->values, load16(from->values)); }
/// Bits that are NaN in every dtype.
DEVICE void put_nan(uint16_t* to) { store<uint16_t>(to, 0xFFFF); }
DEVICE void put_nan(uint32_t* to) { store(to, ~0u); }
DEVICE void put_nan(Bytes16* to) { store16(to->values, Bytes16{{~0u, ~0u, ~0u, ~0u}}); }

/// Rows are of units of T.
template <class T>
KERNEL(kThreads)
spread_rows_kernel(SpreadRowsParams p, int size) {
  const Team team(size);
  if (team.row >= p.out.count) return;
  const int64_t place = load(p.order + team.row);
  const bool there = place >= 0 && place < p.out.count;
  T* to = static_cast<T*>(p.out.data) + row_offset(p.out, team.row);
  const T* from = static_cast<const T*>(p.in.data) + row_offset(p.in, there ? place / p.k : 0);
#pragma unroll 4
  for (int64_t i = team.index; i < p.out.n; i += team.size) {
    if (there) {
      copy(to + i * p.out.step, from + i * p.in.step);
    } else {
      put_nan(to + i * p.out.step);
    }
  }
}

/// Threads for a row of n units.
int copy_team(int64_t n) {
  int size = 1;
  while (size < kThreads && size < n) size *= 2;
  return size;
}
template <class T>
void spread(const SpreadRowsParams& p, Stream stream) {
  const int size = copy_team(p.out.n);
  const int64_t per_block = kThreads / size;
  LAUNCH(spread_rows_kernel<T>, (p.out.count + per_block - 1) / per_block, kThreads, 0, stream, p,
         size);
}
Rows in_units(Rows rows, int elements) {
  rows.n /= elements;
  rows.stride[0] /= elements;
  return rows;
}

// ---- sum_rows

DEVICE float weight_of(const SumRowsParams& p, int64_t n, int64_t j) {
  float weight = 1.0f;
  if (!p.weights) return weight;
  const int64_t offset = n * p.weight_stride[0] + j * p.weight_stride[1];
  by_float(p.dtype, [&](auto type) {
    weight = to_float(load(static_cast<const decltype(type)*>(p.weights) + offset));
  });
  return weight;
}

template <class Row, int kAhead>
KERNEL(kThreads)
sum_rows_kernel(SumRowsParams p, int size) {
  const Team team(size);
  if (team.row >= p.out.count) return;
  const int64_t first = block_index_y() * size * kChunk;
  const int64_t* places = p.places + team.row * p.k;
  Chunks<1> total, row;
  fill(total, 0.0f);
  for (int64_t j0 = 0; j0 < p.k; j0 += kAhead) {
    decltype(Row::fetch(p.rows, 0, first, team)) fetched[kAhead];
    float weight[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const bool one_more = j0 + a < p.k;
      const int64_t r = one_more ? load(places + j0 + a) : 0;
      const bool there = r >= 0 && r < p.rows.count;
      fetched[a] = Row::fetch(p.rows, one_more && there ? r : p.rows.count, first, team);
      weight[a] = !there ? __builtin_nanf("") : one_more ? weight_of(p, team.row, j0 + a) : 0.0f;
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      fetched[a].values(row);
      // The product is rounded: the compiler would make an fma of * and +.
#pragma unroll
      for (int j = 0; j < kChunk; ++j) total[0][j] += fma(row[0][j], weight[a], 0.0f);
    }
  }
  Row::store(p.out, team.row, first, team, total);
}

template <class Row, int kAhead>
void sum(const SumRowsParams& p, Stream stream) {
  const int needed = team_size<1>(p.out.n), size = needed < kThreads ? needed : kThreads;
  const int64_t columns = int64_t{size} * kChunk, per_block = kThreads / size;
  const Grid grid((p.out.count + per_block - 1) / per_block, (p.out.n + columns - 1) / columns);
  LAUNCH((sum_rows_kernel<Row, kAhead>), grid, kThreads, 0, stream, p, size);
}

}  // namespace

void sort_by_expert(const SortByExpertParams& p, Stream stream) {
  const int bins = p.experts + 1;
  const int64_t runs = (p.ids.count + kWarp - 1) / kWarp, most = kCounts / bins - 1;
  const int64_t warps = std::clamp<int64_t>(runs, 1, std::min<int64_t>(most, kMaxWarps));
  int bits = 1;
  while (1 << bits <= bins) ++bits;
  LAUNCH(sort_by_expert_kernel, 1, static_cast<int>(warps * kWarp),
         (warps + 1) * bins * sizeof(int32_t), stream, p, bits);
}

void spread_rows(const SpreadRowsParams& p, Stream stream) {
  if (are_vectors(p.in.dtype, {&p.in, &p.out})) {
    const int elements = p.in.dtype == DType::f32 ? 4 : 8;
    return spread<Bytes16>({in_units(p.in, elements), in_units(p.out, elements), p.order, p.k},
                           stream);
  }
  return p.in.dtype == DType::f32 ? spread<uint32_t>(p, stream) : spread<uint16_t>(p, stream);
}

void sum_rows(const SumRowsParams& p, Stream stream) {
  if (!are_vectors(p.rows.dtype, {&p.rows, &p.out})) return sum<WalkedRow, 1>(p, stream);
  if (p.rows.dtype == DType::f32) return sum<VectorRow<float, 1>, 4>(p, stream);
  if (p.rows.dtype == DType::bf16) return sum<VectorRow<bf16, 1>, 4>(p, stream);
  sum<VectorRow<f16, 1>, 4>(p, stream);
}

}  // namespace warpformer::cuda

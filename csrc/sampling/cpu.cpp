// A row is read once, and all else happens in buffers of the cache, in blocks of 64 tokens:
//
//   x row --less the penalties of its tokens--> row of scratch, where there are penalties
//   row   --/ temperature--> z, its maximum in each block
//         --exp(z - max z)--> e, its sum in each block; 0 takes a block out
//         --u--> the block, and the token in it
//
// No option sorts a row. Tokens fall into 1024 bins by their distance from the best one; the bin in
// which the first so many (top_k), or the first of so much probability (top_p, typical_p), end is
// the only one that is put in order. A block without a token in the other bins is passed over.
#include "core/exponentials.h"
#include "core/scratch.h"
#include "sampling/op.h"

namespace warpformer::cpu::WF_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr int kBins = 1024;         // the last one has no end
constexpr float kBinsPerUnit = 64;  // of a score
constexpr int64_t kFew = 16;        // of top_k
constexpr int64_t kGrain = 16384;   // scores that are worth a thread

struct Item {
  uint32_t key, index;  // the least key is the greatest value
};

/// What is known of a row of n tokens, and the memory of a thread.
struct Row {
  int64_t n, blocks;
  double* sum;   // [blocks] of e; 0: none of its tokens is kept, and e is not to be read
  float* high;   // [blocks] the greatest z
  float *z, *e;  // [n]
  Item* items[2];

  static int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }
  /// In floats.
  static int64_t size(int64_t n) { return (6 * n + 3 * blocks_of(n) + 15) / 16 * 16; }
  Row(int64_t n, float* memory) : n(n), blocks(blocks_of(n)) {
    sum = reinterpret_cast<double*>(memory);
    items[0] = reinterpret_cast<Item*>(sum + blocks);
    items[1] = items[0] + n;
    z = reinterpret_cast<float*>(items[1] + n);
    e = z + n;
    high = e + n;
  }
  int64_t width(int64_t b) const { return at_most(kBlock, n - b * kBlock); }
};

/// The sum of a block, in one order.
double block_sum(const float* e, int64_t n) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {}, rest = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int j = 0; j < kLanes; ++j) lane[j] += e[i + j];
  for (; i < n; ++i) rest += e[i];
  for (int half = kLanes / 2; half; half /= 2)
    for (int j = 0; j < half; ++j) lane[j] += lane[j + half];
  return lane[0] + rest;
}

double total_of(const Row& row) {
  double total = 0;
  for (int64_t b = 0; b < row.blocks; ++b) total += row.sum[b];
  return total;
}

/// z = x / temperature, with the greatest of each block. Returns the greatest of all; NaN where the
/// row has none that is finite, or one that is NaN or +inf.
template <bool kDivides, class T>
float read(const T* x, float temperature, Row& row) {
  const Vec divisor = set(temperature), infinity = set(INFINITY);
  Vec broken = set(0.0f);
  float top = -INFINITY;
  for (int64_t b = 0; b < row.blocks; ++b) {
    const T* from = x + b * kBlock;
    float* to = row.z + b * kBlock;
    Max high;
    for_lanes(row.width(b), [&](int64_t i, auto k) {
      const Vec z = kDivides ? load(from + i, k) / divisor : load(from + i, k);
      broken = max(broken, pad(where_less(z, infinity, set(0.0f), set(1.0f)), k, 0.0f));
      high.add(pad(z, k, -INFINITY));
      store(to + i, z, k);
    });
    row.high[b] = high.total();
    row.sum[b] = 1;
    if (row.high[b] > top) top = row.high[b];
  }
  return max_lane(broken) > 0 || top == -INFINITY ? NAN : top;
}

template <class T>
float read(const T* x, float temperature, Row& row) {
  return temperature == 1.0f ? read<false>(x, temperature, row) : read<true>(x, temperature, row);
}

float read(const Rows& x, int64_t r, float temperature, Row& row) {
  if (x.step != 1) {
    read_span(x, r, 0, x.n, row.e);
    return read(row.e, temperature, row);
  }
  float top = NAN;
  by_float(x.dtype, [&](auto type) {
    using T = decltype(type);
    top = read(static_cast<const T*>(x.data) + row_offset(x, r), temperature, row);
  });
  return top;
}

int64_t first_of(const Row& row, float top) {
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.high[b] != top) continue;
    for (int64_t i = b * kBlock; i < row.n; ++i)
      if (row.z[i] == top) return i;
  }
  return -1;
}

/// A token of a row in its order: by z from the greatest on, and of equal ones the last first.
struct Place {
  float z;
  int64_t index;
};

/// Puts items, which come with falling index, in this order. Returns them, in one of the buffers.
const Item* sorted(Item* from, Item* to, int64_t n) {
  for (int shift = 0; shift < 32; shift += 8) {
    int64_t begin[257] = {};
    for (int64_t i = 0; i < n; ++i) ++begin[(from[i].key >> shift & 255) + 1];
    if (begin[(from[0].key >> shift & 255) + 1] == n) continue;  // they have this digit in common
    for (int digit = 1; digit < 256; ++digit) begin[digit] += begin[digit - 1];
    for (int64_t i = 0; i < n; ++i) to[begin[from[i].key >> shift & 255]++] = from[i];
    Item* const other = from;
    from = to;
    to = other;
  }
  return from;
}

/// The same of the first k alone, by insertion; here items come with rising index. Where k is small
/// it is done before the counts of `sorted` are cleared.
const Item* first_of(Item* items, int64_t n, int64_t k) {
  for (int64_t i = 0; i < n; ++i) {
    const Item item = items[i];
    if (i >= k && item.key >= items[k - 1].key) continue;
    int64_t at = i < k ? i : k - 1;
    for (; at > 0 && item.key < items[at - 1].key; --at) items[at] = items[at - 1];
    items[at] = item;
  }
  return items;
}

/// Greater floats have smaller keys.
uint32_t key_of(float z) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, z + 0.0f);  // of the two zeros one
  return bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
}

int bin_of(float z, float top) {
  const float bin = (top - z) * kBinsPerUnit;
  return bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
}

/// Lets heap[i] sink where one below it is less.
void sink(float* heap, int64_t n, int64_t i) {
  for (int64_t child; (child = 2 * i + 1) < n; i = child) {
    if (child + 1 < n && heap[child + 1] < heap[child]) ++child;
    if (heap[i] <= heap[child]) return;
    const float above = heap[i];
    heap[i] = heap[child];
    heap[child] = above;
  }
}

/// A score that the k-th greatest reaches at least: the k-th greatest of the blocks' greatest ones,
/// by a heap of k whose top is the least. They are finite or -inf. e is overwritten.
float bound(const Row& row, int64_t k) {
  if (k > row.blocks) return -INFINITY;
  float* heap = row.e;
  for (int64_t b = 0; b < k; ++b) heap[b] = row.high[b];
  for (int64_t i = k / 2 - 1; i >= 0; --i) sink(heap, k, i);
  for (int64_t b = k; b < row.blocks; ++b) {
    if (row.high[b] <= heap[0]) continue;
    heap[0] = row.high[b];
    sink(heap, k, 0);
  }
  return heap[0];
}

/// The place at which the weights of the tokens up to it reach `goal`: of each 1, or e if
/// `weighted`. The last one if they never do. It is known to be no less than `least`.
Place reached(const Row& row, float top, bool weighted, double goal, float least = -INFINITY) {
  double weights[kBins] = {}, before = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.sum[b] == 0 || row.high[b] < least || bin_of(row.high[b], top) == kBins - 1) continue;
    const int64_t end = b * kBlock + row.width(b);
    for (int64_t i = b * kBlock; i < end; ++i)
      weights[bin_of(row.z[i], top)] += weighted ? row.e[i] : 1.0;
  }
  int bin = 0;
  while (bin < kBins - 1 && before + weights[bin] < goal) before += weights[bin++];
  int64_t count = 0;
  for (int64_t b = row.blocks - 1; b >= 0; --b) {
    if (row.sum[b] == 0 || row.high[b] < least || bin_of(row.high[b], top) > bin) continue;
    for (int64_t i = b * kBlock + row.width(b) - 1; i >= b * kBlock; --i) {
      row.items[0][count] = {key_of(row.z[i]), static_cast<uint32_t>(i)};
      count += bin_of(row.z[i], top) == bin;
    }
  }
  if (count == 0) return {-INFINITY, 0};
  const Item* items = sorted(row.items[0], row.items[1], count);
  int64_t last = 0;
  for (; last < count; ++last) {
    before += weighted ? row.e[items[last].index] : 1.0;
    if (before >= goal) break;
  }
  const int64_t index = items[last < count ? last : count - 1].index;
  return {row.z[index], index};
}

/// e = exp(z - top) where z >= least.
void exponentials(Row& row, float top, float least) {
  for (int64_t b = 0; b < row.blocks; ++b) {
    row.sum[b] = 0;
    if (row.high[b] < least) continue;
    const float* z = row.z + b * kBlock;
    float* e = row.e + b * kBlock;
    for_lanes(row.width(b), [&](int64_t i, auto k) {
      const Vec v = load(z + i, k);
      store(e + i, where_less(v, set(least), set(0.0f), exp_negative(v - set(top))), k);
    });
    row.sum[b] = block_sum(e, row.width(b));
  }
}

/// Takes out the tokens for which `goes(i)` is true.
template <class F>
void take_out(Row& row, const F& goes) {
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.sum[b] == 0) continue;
    const int64_t end = b * kBlock + row.width(b);
    for (int64_t i = b * kBlock; i < end; ++i) row.e[i] = goes(i) ? 0.0f : row.e[i];
    row.sum[b] = block_sum(row.e + b * kBlock, row.width(b));
  }
}

void keep_typical(Row& row, float top, double p) {
  // z becomes -|-log p - entropy|, with entropy = log sum - sum of e (z - top) / sum.
  const double total = total_of(row);
  double moment = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.sum[b] == 0) continue;
    const int64_t end = b * kBlock + row.width(b);
    double part = 0;
    for (int64_t i = b * kBlock; i < end; ++i)
      if (row.e[i] > 0) part += double{row.e[i]} * (double{row.z[i]} - top);
    moment += part;
  }
  const float center = static_cast<float>(top + moment / total);  // the z that is typical
  float nearest = -INFINITY;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.sum[b] == 0) continue;
    const int64_t end = b * kBlock + row.width(b);
    row.high[b] = -INFINITY;
    for (int64_t i = b * kBlock; i < end; ++i) {
      row.z[i] = row.e[i] > 0 ? -fabsf(row.z[i] - center) : -INFINITY;
      if (row.z[i] > row.high[b]) row.high[b] = row.z[i];
    }
    if (row.high[b] > nearest) nearest = row.high[b];
  }
  const float least = reached(row, nearest, true, p * total).z;
  take_out(row, [&](int64_t i) { return row.z[i] < least; });
}

int64_t drawn(const Row& row, double u) {
  const double goal = u * total_of(row);
  int64_t b = 0, last_block = row.blocks - 1;
  while (last_block > 0 && row.sum[last_block] == 0) --last_block;
  double sum = 0;
  while (b < last_block && sum + row.sum[b] <= goal) sum += row.sum[b++];
  const int64_t end = b * kBlock + row.width(b);
  int64_t last = -1;
  for (int64_t i = b * kBlock; i < end; ++i) {
    if (row.e[i] == 0) continue;
    last = i;
    if ((sum += row.e[i]) > goal) break;
  }
  return last;  // of the block, if its sum was rounded otherwise
}

/// `buffer` [V] is for a row of `out` that is no floats in a line; `count` [V] is not cleared: only
/// what tokens name is read, after it is set.
void penalize_row(const PenalizeParams& p, int64_t r, float* buffer, int64_t* count) {
  float* z = row_out(p.out, r, buffer);
  read_span(p.x, r, 0, p.x.n, z);
  const int64_t *tokens = p.tokens + r * p.token_stride[0], step = p.token_stride[1];
  const int64_t begin = p.first_new[r * p.first_stride];
  const float* penalty = p.penalties + r * p.penalty_stride[0];
  const float repetition = penalty[0], frequency = penalty[p.penalty_stride[1]],
              presence = penalty[2 * p.penalty_stride[1]];
  const auto each = [&](auto f) {
    for (int64_t t = 0; t < p.token_count; ++t) {
      const int64_t v = tokens[t * step];
      if (v >= 0 && v < p.x.n) f(t, v);
    }
  };
  each([&](int64_t, int64_t v) { count[v] = 0; });
  each([&](int64_t t, int64_t v) { count[v] += t >= begin; });
  each([&](int64_t, int64_t v) {
    if (count[v] < 0) return;  // done
    float x = z[v] < 0 ? z[v] * repetition : z[v] / repetition;
    if (count[v] > 0) x = x - static_cast<float>(count[v]) * frequency - presence;
    z[v] = x;
    count[v] = -1;
  });
  finish_row(p.out, r, z);
}

int64_t sample_row(const SampleParams& p, int64_t r, Row& row) {
  if (p.penalties.x.data)
    penalize_row(p.penalties, r, row.z, reinterpret_cast<int64_t*>(row.items[0]));
  const Rows& x = p.penalties.x.data ? p.penalties.out : p.x;
  const SamplingOptions o = p.of(r);
  const bool greedy = o.temperature == 0;
  const float top = read(x, r, greedy ? 1.0f : static_cast<float>(o.temperature), row);
  if (top != top) return -1;
  if (greedy) return first_of(row, top);
  float least = -INFINITY;
  if (o.top_k > 0 && o.top_k < static_cast<double>(row.n))
    least = reached(row, top, false, o.top_k, bound(row, static_cast<int64_t>(o.top_k))).z;
  exponentials(row, top, least);
  if (o.top_p < 1) {
    const Place last = reached(row, top, true, o.top_p * total_of(row));
    take_out(row, [&](int64_t i) {
      return (row.z[i] < last.z) | ((row.z[i] == last.z) & (i < last.index));
    });
  }
  if (o.min_p > 0) {
    const float share = static_cast<float>(o.min_p);
    take_out(row, [&](int64_t i) { return row.e[i] < share; });
  }
  if (o.typical_p < 1) keep_typical(row, top, o.typical_p);
  return drawn(row, p.draws[r * p.draw_stride]);
}

/// What log_softmax takes from z: first the greatest, then the logarithm.
struct Shift {
  float top = 0.0f, log_sum = 0.0f;
};
Shift log_softmax_shift(const Rows& x, int64_t r, const Row& row) {
  float top = -INFINITY;
  for (int64_t b = 0; b < row.blocks; ++b)
    if (row.high[b] > top) top = row.high[b];
  top = finite(top);
  return {top, logf(kept_sum(exponential_sum(row.z, row.n, 1.0f, top, Prefetch(x, r + 1))))};
}

/// Only blocks that reach the k-th greatest of the blocks' greatest ones are looked into.
void top_k_row(const TopKParams& p, int64_t r, Row& row) {
  const float top = read(p.x, r, 1.0f, row);
  const float least = top == top ? bound(row, p.k) : -INFINITY;  // with NaN or infinity into all
  int64_t count = 0;
  for (int64_t b = 0; b < row.blocks; ++b) {
    if (row.high[b] < least) continue;
    const int64_t end = b * kBlock + row.width(b);
    for (int64_t i = b * kBlock; i < end; ++i) {
      const float z = row.z[i];
      row.items[0][count] = {z == z ? key_of(z) : 0, static_cast<uint32_t>(i)};
      count += !(z < least);
    }
  }
  const Item* items =
      p.k <= kFew ? first_of(row.items[0], count, p.k) : sorted(row.items[0], row.items[1], count);
  const Shift shift = p.log_softmax ? log_softmax_shift(p.x, r, row) : Shift{};
  for (int64_t i = 0; i < p.k; ++i) {
    p.values[r * p.k + i] = row.z[items[i].index] - shift.top - shift.log_sum;
    p.indices[r * p.k + i] = items[i].index;
  }
}

}  // namespace

void sample(const SampleParams& p, int threads) {
  const int64_t size = Row::size(p.x.n);
  float* memory = scratch_floats(size * threads);
  parallel_for(p.x.count, 1 + kGrain / p.x.n, threads, [&](int t, int64_t begin, int64_t end) {
    Row row(p.x.n, memory + size * t);
    for (int64_t r = begin; r < end; ++r) p.out[r] = sample_row(p, r, row);
  });
}

void top_k(const TopKParams& p, int threads) {
  const int64_t size = Row::size(p.x.n);
  float* memory = scratch_floats(size * threads);
  parallel_for(p.x.count, 1 + kGrain / p.x.n, threads, [&](int t, int64_t begin, int64_t end) {
    Row row(p.x.n, memory + size * t);
    for (int64_t r = begin; r < end; ++r) top_k_row(p, r, row);
  });
}

void penalize(const PenalizeParams& p, int threads) {
  const int64_t size = 3 * p.x.n + p.x.n % 2;
  float* memory = scratch_floats(size * threads);
  parallel_for(p.x.count, 1 + kGrain / p.x.n, threads, [&](int t, int64_t begin, int64_t end) {
    int64_t* count = reinterpret_cast<int64_t*>(memory + size * t);
    for (int64_t r = begin; r < end; ++r) {
      penalize_row(p, r, memory + size * t + 2 * p.x.n, count);
    }
  });
}

}  // namespace warpformer::cpu::WF_ISA

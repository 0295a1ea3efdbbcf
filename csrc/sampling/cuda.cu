// A block owns a row and reads it again in every pass (from the second-level cache): nothing of the
// row is stored.
//
//   x row --max--> top                                 temperature 0: the first token that has it
//         --count, weigh--> cut                        top_k, top_p, typical_p: what is kept
//         --weigh--> total --u--> segment of the row --u--> token
//
// Weights are whole numbers, exp(z - top) in units of 2^-40. Their sums are exact in any order, so
// that atomics and any number of threads give the same token.
//
// Tokens have an order, a number of 64 bits, from the best one on; a cut is the last one that is
// kept. It is found as the first by which the weights add up to more than a goal:
//
//   bins by distance from top:  | w0 | w1 | .. | w255 |         in shared memory, by atomics
//                                           ^ the goal falls into this one
//   bins by order, of its tokens: | least .. |    | .. greatest |, and so on, until one is left
//
// penalize: a block takes a range of a row, and counts in shared memory how often each of its
// tokens was written. top_k: the k best are put in order by a bitonic network, in shared memory or,
// of many, where their indices go.
#include "core/cuda/atomic.cuh"
#include "core/cuda/exponentials.cuh"
#include "core/cuda/launch.cuh"
#include "sampling/op.h"

namespace warpformer::cuda {
namespace {

constexpr int kMaxThreads = 512, kBins = 256, kBinBits = 8;
constexpr float kBinsPerUnit = 16;   // of a score; the last one has no end
constexpr int64_t kInShared = 4096;  // of top_k
constexpr int kRange = 4096;         // tokens of a row that a block of penalize counts
constexpr int kScratch = kWarp * sizeof(uint64_t);
constexpr uint64_t kNone = ~uint64_t{0};

/// Threads for a row of n tokens.
int threads_of(int64_t n) {
  int threads = kWarp;
  while (threads < kMaxThreads && threads * int64_t{kChunk} < n) threads *= 2;
  return threads;
}

// ---- Whole numbers of a block. `scratch` has one for each warp, free again on return.

template <class F>
DEVICE uint64_t warp_reduce(uint64_t x, F combine) {
#pragma unroll
  for (int step = kWarp / 2; step; step /= 2) x = combine(x, shuffle_xor(x, step));
  return x;
}
template <class F>
DEVICE uint64_t block_reduce(uint64_t x, uint64_t neutral, Shared<uint64_t> scratch, F combine) {
  x = warp_reduce(x, combine);
  if (lane_index() == 0) scratch.store(warp_index(), x);
  sync_block();
  x = lane_index() < block_threads() / kWarp ? scratch.load(lane_index()) : neutral;
  x = warp_reduce(x, combine);
  sync_block();
  return x;
}
DEVICE uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }
DEVICE uint64_t greatest(uint64_t a, uint64_t b) { return a < b ? b : a; }
DEVICE uint64_t plus(uint64_t a, uint64_t b) { return a + b; }

/// Weights in kBins bins.
class Bins {
 public:
  DEVICE explicit Bins(Shared<uint64_t> weights) : weights_(weights) {}

  /// All of them: by threads, in turns, with a barrier on both sides.
  template <class F>
  DEVICE void fill(F f) const {
    sync_block();
    f(weights_);
    sync_block();
  }
  /// add(bin, weight) adds a weight, in f(add).
  template <class F>
  DEVICE void count(F f) const {
    fill([](Shared<uint64_t> w) {
      for (int i = thread_index(); i < kBins; i += block_threads()) w.store(i, 0);
    });
    f([&](int bin, uint64_t weight) { atomic_add(weights_ + bin, weight); });
    sync_block();
  }

  /// The first bin with which the weights are more than `goal`, which loses those before. Every
  /// warp looks for it by itself.
  DEVICE int reach(uint64_t& goal) const {
    constexpr int kEach = kBins / kWarp;
    const int lane = lane_index();
    uint64_t sum = 0;
    for (int j = 0; j < kEach; ++j) sum += weights_.load(lane * kEach + (j + lane) % kEach);
    const int first = find(sum, goal) * kEach;
    return first + find(lane < kEach ? weights_.load(first + lane) : 0, goal);
  }

 private:
  /// The first lane with whose x the sum is more than `goal`.
  DEVICE static int find(uint64_t x, uint64_t& goal) {
    uint64_t sum = x;
#pragma unroll
    for (int delta = 1; delta < kWarp; delta *= 2) {
      const uint64_t before = shuffle_up(sum, delta);
      if (lane_index() >= delta) sum += before;
    }
    const uint32_t beyond = ballot(sum > goal);
    int lane = 0;  // the last one if there is none
    while (lane < kWarp - 1 && !(beyond >> lane & 1)) ++lane;
    goal -= shuffle(sum - x, lane);
    return lane;
  }

  Shared<uint64_t> weights_;
};

// ---- The order of tokens

/// Greater floats have smaller keys, and NaN the smallest.
DEVICE uint32_t key_of(float z) {
  if (z != z) return 0;
  const uint32_t bits = bits_as<uint32_t>(z + 0.0f);  // of the two zeros one
  return bits >> 31 ? bits : ~bits & 0x7FFFFFFFu;
}
DEVICE uint64_t order_of(float z, uint32_t among_equals) {
  return uint64_t{key_of(z)} << 32 | among_equals;
}
DEVICE int bin_of(float z, float top) {
  const float bin = (top - z) * kBinsPerUnit;
  return bin < kBins - 1 ? static_cast<int>(bin) : kBins - 1;
}

/// One of a row's tokens that count.
struct Item {
  float z;
  uint64_t order, weight;  // 0: does not count
};

/// The order of the first item with which the weights are more than `goal`, which is less than all
/// of them. item(i) is an Item; those of a bin by distance from `top` have a smaller order than
/// those of the bins after it.
template <class F>
DEVICE uint64_t reached(const Bins& bins, Shared<uint64_t> scratch, int64_t n, float top,
                        uint64_t goal, F item) {
  const auto each = [&](auto f) {
    for (int64_t i = thread_index(); i < n; i += block_threads()) {
      const Item it = item(i);
      if (it.weight) f(it);
    }
  };
  bins.count([&](auto add) { each([&](const Item& it) { add(bin_of(it.z, top), it.weight); }); });
  const int bin = bins.reach(goal);
  uint64_t first = 0, last = kNone;
  for (;;) {
    const auto candidates = [&](auto f) {
      each([&](const Item& it) {
        if (bin_of(it.z, top) == bin && it.order >= first && it.order <= last) f(it);
      });
    };
    uint64_t low = kNone, high = 0;
    candidates([&](const Item& it) {
      low = least(low, it.order);
      high = greatest(high, it.order);
    });
    low = block_reduce(low, kNone, scratch, least);
    high = block_reduce(high, 0, scratch, greatest);
    if (low >= high) return low;
    int shift = 0;
    while ((high - low) >> shift >> kBinBits) ++shift;
    bins.count([&](auto add) {
      candidates(
          [&](const Item& it) { add(static_cast<int>((it.order - low) >> shift), it.weight); });
    });
    first = low + (uint64_t(bins.reach(goal)) << shift);
    last = first + ((uint64_t{1} << shift) - 1);
  }
}

// ---- sample

/// The elements of a row as scores.
template <class T>
struct ScoreRow {
  const T* x;
  int64_t n, step;
  float temperature;
  DEVICE ScoreRow(const Rows& rows, int64_t r, float temperature)
      : x(static_cast<const T*>(rows.data) + row_offset(rows, r)),
        n(rows.n),
        step(rows.step),
        temperature(temperature) {}
  DEVICE float operator[](int64_t i) const {
    const float value = to_float(load(x + i * step));
    return temperature == 1.0f ? value : value / temperature;
  }
  /// The greatest; NaN where none is finite, or one is NaN or +inf.
  DEVICE float top(Shared<float> scratch) const {
    float high = -kInfinity;
    bool broken = false;
    for (int64_t i = thread_index(); i < n; i += block_threads()) {
      const float z = (*this)[i];
      broken |= !(z < kInfinity);
      high = max(high, z);
    }
    high = block_max(high, scratch);
    return sync_block_or(broken) || high == -kInfinity ? __builtin_nanf("") : high;
  }
};

/// What is kept of a row: all but what an option has taken out.
struct Kept {
  float top, share = 0.0f;
  uint64_t last = kNone;  // of tokens in their order, of equal ones the last first
  bool is_typical = false;
  float center = 0.0f;
  uint64_t farthest = kNone;  // of distances from the center in their order

  DEVICE explicit Kept(float top) : top(top) {}
  DEVICE static uint64_t order(float z, int64_t i) {
    return order_of(z, ~static_cast<uint32_t>(i));
  }
  DEVICE static float whole(float e) { return e * 0x1p40f; }
  /// exp(z - top) of token i; 0 of one that is not kept.
  DEVICE float exponential(float z, int64_t i) const {
    if (order(z, i) > last) return 0.0f;
    const float e = exp(z - top);
    const bool is_far = is_typical && order_of(distance(z), 0) > farthest;
    return e < share || is_far ? 0.0f : e;
  }
  DEVICE uint64_t weight(float z, int64_t i) const {
    return static_cast<uint64_t>(whole(exponential(z, i)));
  }
  DEVICE float distance(float z) const { return -abs(z - center); }
};

DEVICE SamplingOptions options_of(const SampleParams& p, int64_t r) {
  const double* o = p.options + r * p.option_stride[0];
  const int64_t step = p.option_stride[1];
  return {p.draws ? load(o) : 0.0, load(o + step), load(o + 2 * step), load(o + 3 * step),
          load(o + 4 * step)};
}

/// The goal beyond which a share of a total is reached.
DEVICE uint64_t goal_of(double share, uint64_t total) {
  const double goal = ceil(share * static_cast<double>(total)) - 1.0;
  return goal <= 0.0 ? 0 : least(static_cast<uint64_t>(goal), total - 1);
}

template <class T>
class Sampling {
 public:
  DEVICE Sampling(const ScoreRow<T>& row, float top, Bins bins, Shared<uint64_t> scratch)
      : row_(row), bins_(bins), scratch_(scratch), kept_(top) {}

  DEVICE void keep(const SamplingOptions& o) {
    if (o.top_k > 0 && o.top_k < static_cast<double>(row_.n)) {
      const uint64_t goal = static_cast<uint64_t>(o.top_k) - 1;
      kept_.last = reached(bins_, scratch_, row_.n, kept_.top, goal,
                           [&](int64_t i) { return Item{row_[i], order_of(row_[i], ~0u), 1}; });
    }
    if (o.top_p < 1)
      kept_.last =
          reached(bins_, scratch_, row_.n, kept_.top, goal_of(o.top_p, total()), [&](int64_t i) {
            const float z = row_[i];
            return Item{z, kept_.order(z, i), kept_.weight(z, i)};
          });
    if (o.min_p > 0) kept_.share = static_cast<float>(o.min_p);
    if (o.typical_p < 1) keep_typical(o.typical_p);
  }

  /// In segments of the row, and then in segments of one.
  DEVICE int64_t draw(double u) const {
    const uint64_t all = total();
    const double share = u * static_cast<double>(all);
    uint64_t goal = least(static_cast<uint64_t>(share), all - 1);
    int64_t begin = 0, end = row_.n;
    while (end - begin > 1) {
      const int64_t length = (end - begin + kBins - 1) / kBins;
      bins_.fill([&](Shared<uint64_t> weights) {
        for (int s = warp_index(); s < kBins; s += block_threads() / kWarp) {
          uint64_t sum = 0;
          for (int64_t j = lane_index(); j < length; j += kWarp) {
            const int64_t i = begin + s * length + j;
            if (i < end) sum += kept_.weight(row_[i], i);
          }
          sum = warp_reduce(sum, plus);
          if (lane_index() == 0) weights.store(s, sum);
        }
      });
      begin += bins_.reach(goal) * length;
      end = begin + length < end ? begin + length : end;
    }
    return begin;
  }

 private:
  template <class F>
  DEVICE uint64_t sum(F f) const {
    uint64_t sum = 0;
    for (int64_t i = thread_index(); i < row_.n; i += block_threads()) sum += f(i);
    return block_reduce(sum, 0, scratch_, plus);
  }
  DEVICE uint64_t total() const {
    return sum([&](int64_t i) { return kept_.weight(row_[i], i); });
  }

  /// By -|-log p - entropy|, with entropy = log sum - sum of e (z - top) / sum.
  DEVICE void keep_typical(double share) {
    const uint64_t all = total(),
                   moment = sum([&](int64_t i) {
                     const float z = row_[i], e = kept_.exponential(z, i);
                     return e > 0.0f ? static_cast<uint64_t>(kept_.whole(e * (kept_.top - z)))
                                     : uint64_t{0};
                   });
    kept_.center =
        static_cast<float>(kept_.top - static_cast<double>(moment) / static_cast<double>(all));
    float nearest = -kInfinity;
    for (int64_t i = thread_index(); i < row_.n; i += block_threads())
      if (kept_.weight(row_[i], i)) nearest = max(nearest, kept_.distance(row_[i]));
    nearest = block_max(nearest, scratch_.as<float>());
    kept_.farthest = reached(bins_, scratch_, row_.n, nearest, goal_of(share, all), [&](int64_t i) {
      const float z = row_[i], distance = kept_.distance(z);
      return Item{distance, order_of(distance, 0), kept_.weight(z, i)};
    });
    kept_.is_typical = true;
  }

  const ScoreRow<T>& row_;
  const Bins bins_;
  const Shared<uint64_t> scratch_;
  Kept kept_;
};

template <class T>
DEVICE int64_t first_of(const ScoreRow<T>& row, float top, Shared<uint64_t> scratch) {
  uint64_t first = kNone;  // -1
  for (int64_t i = thread_index(); i < row.n; i += block_threads())
    if (row[i] == top) first = least(first, i);
  return static_cast<int64_t>(block_reduce(first, kNone, scratch, least));
}

KERNEL(kMaxThreads, 1) sample_kernel(SampleParams p) {
  const Shared<uint64_t> scratch = shared_memory<uint64_t>();
  const Bins bins(shared_memory<uint64_t>(kScratch));
  const int64_t r = block_index();
  const SamplingOptions o = options_of(p, r);
  const bool greedy = o.temperature == 0;
  by_float(p.x.dtype, [&](auto type) {
    using T = decltype(type);
    const ScoreRow<T> row(p.x, r, greedy ? 1.0f : static_cast<float>(o.temperature));
    const float top = row.top(scratch.as<float>());
    int64_t token = -1;  // of NaN
    if (greedy) {
      token = first_of(row, top, scratch);
    } else if (top == top) {
      Sampling<T> sampling(row, top, bins, scratch);
      sampling.keep(o);
      token = sampling.draw(load(p.draws + r * p.draw_stride));
    }
    if (thread_index() == 0) store(p.out + r, token);
  });
}

// ---- top_k

/// Numbers in global memory, as Shared has them.
struct Global {
  int64_t* data;
  DEVICE uint64_t load(int64_t i) const { return static_cast<uint64_t>(cuda::load(data + i)); }
  DEVICE void store(int64_t i, uint64_t x) const { cuda::store(data + i, static_cast<int64_t>(x)); }
};

/// Puts k numbers in order: a bitonic network whose comparisons all point the same way, so that
/// what lies past the end may be missing.
template <class Items>
DEVICE void sort(const Items& items, int64_t k) {
  const auto exchange = [&](int64_t a, int64_t b) {
    if (b >= k) return;
    const uint64_t x = items.load(a), y = items.load(b);
    if (x <= y) return;
    items.store(a, y);
    items.store(b, x);
  };
  int64_t pairs = 1;
  while (2 * pairs < k) pairs *= 2;
  for (int64_t half = 1; half <= pairs; half *= 2)
    for (int64_t step = half; step; step /= 2) {
      sync_block();
      for (int64_t t = thread_index(); t < pairs; t += block_threads()) {
        const int64_t a = t / step * 2 * step + t % step;
        // First with the mirror image, then with the one `step` further.
        exchange(a, step == half ? t / step * 2 * step + 2 * step - 1 - t % step : a + step);
      }
    }
  sync_block();
}

/// What log_softmax takes from z: first the greatest, then the logarithm, with its bits. The sum is
/// that of a team of `size` threads, of which the block has more.
template <class T>
DEVICE void log_softmax_shift(const ScoreRow<T>& row, int size, Shared<float> scratch, float& shift,
                              float& log_sum) {
  const Team team(block_threads());
  float top = -kInfinity, sum = 0;
  for (int64_t i = thread_index(); i < row.n; i += block_threads()) top = max(top, row[i]);
  shift = finite(block_max(top, scratch));
  const int64_t n = team.index < size ? row.n : 0, step = int64_t{kChunk} * kScoreChunks * size;
  Team own = team;
  own.size = size;
  for (int64_t first = 0; first < n; first += step)
    sum += step_sum<kScoreChunks>(first, n, own, [&](int c, int j, bool inside) {
      const int64_t i = first + int64_t{kChunk} * (own.index + c * size) + j;
      return inside ? exp(row[i] - shift) : 0.0f;
    });
  log_sum = log(kept_sum(block_sum(sum, scratch)));
}

template <class T, class Items>
DEVICE void top_k_row(const TopKParams& p, const ScoreRow<T>& row, int64_t r, int size,
                      const Bins& bins, Shared<uint64_t> scratch, const Items& items) {
  const float top = row.top(scratch.as<float>());
  const auto order = [&](int64_t i) { return order_of(row[i], static_cast<uint32_t>(i)); };
  // With NaN or infinity all are in the last bin.
  const uint64_t last = reached(bins, scratch, row.n, top, p.k - 1, [&](int64_t i) {
    return Item{top == top ? row[i] : top, order(i), 1};
  });
  float shift = 0.0f, log_sum = 0.0f;
  if (p.log_softmax) log_softmax_shift(row, size, scratch.as<float>(), shift, log_sum);
  const Shared<int32_t> count = scratch.as<int32_t>();
  if (thread_index() == 0) count.store(0, 0);
  sync_block();
  for (int64_t i = thread_index(); i < row.n; i += block_threads())
    if (order(i) <= last) items.store(atomic_add(count, 1), order(i));
  sort(items, p.k);
  for (int64_t i = thread_index(); i < p.k; i += block_threads()) {
    const int64_t index = static_cast<int64_t>(items.load(i) & 0xFFFFFFFFu);
    store(p.indices + r * p.k + i, index);
    store(p.values + r * p.k + i, row[index] - shift - log_sum);
  }
}

KERNEL(kMaxThreads, 1) top_k_kernel(TopKParams p, int size) {
  const Shared<uint64_t> scratch = shared_memory<uint64_t>();
  const Bins bins(shared_memory<uint64_t>(kScratch));
  const int64_t r = block_index();
  by_float(p.x.dtype, [&](auto type) {
    const ScoreRow<decltype(type)> row(p.x, r, 1.0f);
    if (p.k <= kInShared) {
      const auto items = shared_memory<uint64_t>(kScratch + kBins * sizeof(uint64_t));
      top_k_row(p, row, r, size, bins, scratch, items);
    } else {
      top_k_row(p, row, r, size, bins, scratch, Global{p.indices + r * p.k});
    }
  });
}

// ---- penalize

/// A block for each of `ranges` ranges of each row.
KERNEL(kMaxThreads) penalize_kernel(PenalizeParams p, int64_t ranges) {
  const Shared<int32_t> counts = shared_memory<int32_t>();  // -1: the row has no such token
  const int64_t r = block_index() / ranges, begin = block_index() % ranges * kRange;
  const int64_t end = begin + kRange < p.x.n ? begin + kRange : p.x.n;
  const int64_t first_new = load(p.first_new + r * p.first_stride);
  const float* penalty = p.penalties + r * p.penalty_stride[0];
  const float repetition = load(penalty), frequency = load(penalty + p.penalty_stride[1]),
              presence = load(penalty + 2 * p.penalty_stride[1]);
  const auto each_token = [&](auto f) {
    for (int64_t t = thread_index(); t < p.token_count; t += block_threads()) {
      const int64_t v = load(p.tokens + r * p.token_stride[0] + t * p.token_stride[1]);
      if (v >= begin && v < end) f(t, counts + static_cast<int>(v - begin));
    }
  };
  for (int i = thread_index(); i < kRange; i += block_threads()) counts.store(i, -1);
  sync_block();
  each_token([](int64_t, Shared<int32_t> count) { atomic_max(count, 0); });
  sync_block();
  each_token([&](int64_t t, Shared<int32_t> count) {
    if (t >= first_new) atomic_add(count, 1);
  });
  sync_block();
  by_float(p.x.dtype, [&](auto from) {
    by_float(p.out.dtype, [&](auto to) {
      const auto* x = static_cast<const decltype(from)*>(p.x.data) + row_offset(p.x, r);
      auto* out = static_cast<decltype(to)*>(p.out.data) + row_offset(p.out, r);
      for (int64_t i = begin + thread_index(); i < end; i += block_threads()) {
        float z = to_float(load(x + i * p.x.step));
        const int32_t count = counts.load(static_cast<int>(i - begin));
        if (count >= 0) z = z < 0 ? z * repetition : z / repetition;
        if (count > 0) z = z - static_cast<float>(count) * frequency - presence;
        store(out + i * p.out.step, from_float<decltype(to)>(z));
      }
    });
  });
}

}  // namespace

void top_k(const TopKParams& p, Stream stream) {
  const int size = team_size<kScoreChunks>(p.x.n), threads = threads_of(p.x.n);
  const int64_t items = p.k <= kInShared ? p.k : 0;
  LAUNCH(top_k_kernel, p.x.count, threads > size ? threads : size,
         kScratch + (kBins + items) * sizeof(uint64_t), stream, p, size);
}

void penalize(const PenalizeParams& p, Stream stream) {
  const int64_t ranges = (p.x.n + kRange - 1) / kRange;
  LAUNCH(penalize_kernel, ranges * p.x.count, threads_of(p.x.n), kRange * sizeof(int32_t), stream,
         p, ranges);
}

void sample(const SampleParams& params, Stream stream) {
  SampleParams p = params;
  if (p.penalties.x.data) {
    penalize(p.penalties, stream);
    p.x = p.penalties.out;
  }
  LAUNCH(sample_kernel, p.x.count, threads_of(p.x.n), kScratch + kBins * sizeof(uint64_t), stream,
         p);
}

}  // namespace warpformer::cuda

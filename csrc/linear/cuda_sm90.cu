// Products by quantized weights on Hopper: four warps have the copy engines fetch, warpgroups make
// numbers of codes and multiply. W is A of wgmma, in registers: 64 output features by K. Tokens of
// x are B, from shared memory, as many as a tile has.
//
//   producers (4 warps)  per 128 of K    wait empty[s]; panels of W, their scales and zeros by bulk
//                                        copies, x by boxes, 128-byte swizzled    -> full[s]
//   consumers            wait full[s]
//       per 32 of K      part += A[i] x   starts
//                        A[1 - i] = numbers of the next codes, while it runs
//       end of a group   part is done: sums += scale part
//       end of a stage   -> empty[s]
//       end of a chain   slots += sums     in shared memory
//   chain 0 + chain 1 + .. --factor, bias, act, gate, residual--> out
//
// K is cut into at most 4 chains, by its length alone:
//
//   few tokens     4 teams of one warpgroup, a chain each     64 features, 16 tokens
//   many tokens    1 team of two, 64 features each            128 features, 64 or more tokens
//
// Both add the same numbers in the same order, so that a row gives the same bits in any batch.
// Where a group is a row, 128 of K are summed like a group whose scale is 1.
//
// A block walks tiles of out; producers fetch the next one while the last one is written.
// Tiles of grouped_linear find their rows and weight (experts.cuh).
#include <algorithm>

#include "core/cuda/launch.cuh"
#include "core/cuda/wgmma.cuh"
#include "linear/cuda_sm90.cuh"
#include "linear/cuda_sm90.h"

namespace warpformer::cuda {
namespace {

using namespace sm90;

/// 64 features of a warpgroup. This thread has of panel `panel_` of the block the rows g and g + 8,
/// and the tokens 8 j + 2 t and the one after it: values 4 j, 4 j + 1 of row g, then two of the
/// other.
template <Format kFormat, class X, int kTokens>
class Consumer {
 public:
  using S = Shape<kFormat, X, kTokens>;
  using T = typename S::T;
  using Sum = std::conditional_t<S::kInteger, int32_t, float>;

  DEVICE explicit Consumer(const Product& w)
      : w_(w),
        team_(S::kTeams == 1 ? 0 : shuffle(warp_index() / 4, 0)),
        panel_(warp_index() % (4 * S::kWide)),
        lane_(lane_index()) {
    zeros_[0] = zeros_[1] = S::kInteger ? 0 : minus_zero<zero_type>(8);
  }

  /// All stages of the team; leaves the sums of its last chain, unless it has none.
  DEVICE bool run(const Slots& slots) {
    const int count = stages_of<S::kTeams>(w_, team_);
    if (count == 0) return false;
    Slot slot = slot_;
    full(slot).wait(slot.phase);
    prepare(0, slot, 0);
    clear_sums();
    int chain_end = w_.chain;
    for (int s = 0; s < count; ++s) {
      const Slot next = slot.next(w_.ring);
      multiply(slot, next, s > 0, s + 1 < count);
      if (!S::kInteger && s + 1 == chain_end && s + 1 < count) {
        add_chain(slots, chain_end > w_.chain);
        clear_sums();
        chain_end += w_.chain;
      }
      slot = next;
    }
    if constexpr (S::kInteger) {
      wgmma_wait<0>(part_);
      release(before_);
    }
    slot_ = slot;
    return true;
  }

  /// The sums of a chain become the slot's, or are added to them.
  DEVICE void add_chain(const Slots& slots, bool add) {
    const int g = lane_ / 4, t = lane_ % 4;
    const Shared<Sum> to = slots.sums.template as<Sum>() + panel_ * kPanel + g;
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) {
      const int at = (i / 4 * 8 + 2 * t + i % 2) * S::kSlotRow + i / 2 % 2 * 8;
      const Sum sum = chain_sum(i);
      to.store(at, add ? to.load(at) + sum : sum);
    }
  }

  DEVICE int team() const { return team_; }

 private:
  using zero_type = std::conditional_t<S::kInteger, bf16, T>;

  DEVICE Sum chain_sum(int i) const {
    if constexpr (S::kInteger) {
      return part_[i];
    } else {
      return sums_[i];
    }
  }
  DEVICE void clear_sums() {
    if constexpr (!S::kInteger) {
#pragma unroll
      for (float& sum : sums_) sum = 0.0f;
    }
  }
  DEVICE Barrier full(const Slot& slot) const { return S::full(slot.index * S::kTeams + team_); }
  /// Tells the producers, once a warp, that this warp is done with a stage.
  DEVICE void release(const Slot& slot) const {
    sync_warp();
    if (lane_ == 0) S::empty(slot.index * S::kTeams + team_).arrive();
  }
  DEVICE Shared<uint8_t> stage(const Slot& slot) const {
    return S::stage(w_, slot.index * S::kTeams + team_);
  }

  /// The stage at `slot`, whose first step is prepared; prepares the first one of the next stage.
  DEVICE void multiply(const Slot& slot, const Slot& next, bool accumulate, bool more) {
    // Bit i: a group ends after unit i; at the end of a stage always.
    const int ends = w_.groups == 4 ? 15 : w_.groups == 2 ? 10 : 8;
#pragma unroll
    for (int step = 0; step < S::kSteps; ++step) {
      const int unit = step / S::kParts;
      const bool begins = S::kInteger ? step == 0 && !accumulate
                                      : step == 0 || (step % S::kParts == 0 && unit > 0 &&
                                                      (ends >> (unit - 1) & 1));
      start(step, slot, !begins);
      wgmma_wait<1>(a_[1 - step % 2]);
      if (S::kInteger && step == 0 && accumulate) release(before_);
      if (step + 1 < S::kSteps) {
        prepare(step + 1, slot, 1 - step % 2);
      } else if (more) {
        full(next).wait(next.phase);
        prepare(0, next, 0);
      }
      if constexpr (!S::kInteger) {
        const bool last = step + 1 == S::kSteps;
        if (step % S::kParts == S::kParts - 1 && (last || (ends >> unit & 1)))
          end_group(slot, unit);
        if (last) release(slot);
      }
    }
    before_ = slot;
  }

  /// Starts the products of a step.
  DEVICE void start(int step, const Slot& slot, bool accumulate) {
    const Descriptor x = make_descriptor(stage(slot).template as<T>(), 16, 1024, Swizzle::bytes128);
    wgmma_fence(a_[step % 2]);
#pragma unroll
    for (int f = 0; f < 2; ++f) {
      const int fragment = 2 * (step / S::kParts) + f;
      wgmma<T>(part_, a_[step % 2][f], x + (fragment / 4 * S::kBoxBytes + fragment % 4 * 32),
               accumulate || f > 0);
    }
    wgmma_commit();
  }

  /// A of a step.
  DEVICE void prepare(int step, const Slot& slot, int buffer) {
    const int unit = step / S::kParts, part = step % S::kParts;
    const Shared<uint8_t> from = stage(slot);
    const Shared<uint32_t> codes =
        (from + S::kXBytes + panel_ * S::kPanelBytes + lane_ * kLaneBytes).template as<uint32_t>();
    if constexpr (S::kInteger) {
#pragma unroll
      for (int f = 0; f < 2; ++f) {
        const Vector<uint32_t> words = codes.load16((2 * unit + f) * (kTileBytes / 4));
#pragma unroll
        for (int r = 0; r < 4; ++r) a_[buffer][f][r] = words[r];
      }
    } else {
      constexpr int kUnitsOfTile = S::kTileDepth / 32;
      if (unit % kUnitsOfTile == 0 && part == 0)
        codes_ = codes.load16(unit / kUnitsOfTile * (kTileBytes / 4));
      if (w_.p.weight.zeros && part == 0) read_zeros(from, unit);
#pragma unroll
      for (int f = 0; f < 2; ++f) dequantize(2 * (unit % kUnitsOfTile) + f, part, a_[buffer][f]);
    }
  }

  DEVICE void dequantize(int fragment, int part, uint32_t (&a)[4]) const {
    if constexpr (kFormat == Format::int4) {
      from_int4<T>(codes_[fragment], zeros_, a);
    } else if constexpr (kFormat == Format::nf4) {
      from_nf4(codes_[fragment], S::table() + part * (kTableBytes / 4), a);
    } else if constexpr (kFormat == Format::int8) {
      from_int8<T>({codes_[2 * fragment], codes_[2 * fragment + 1]}, a);
    }
  }

  /// The group of a unit in its stage.
  DEVICE int group_of(int unit) const {
    return w_.groups == 4 ? unit : w_.groups == 2 ? unit / 2 : 0;
  }
  DEVICE void read_zeros(Shared<uint8_t> from, int unit) {
    const int groups = w_.groups ? w_.groups : 1;
    const int at = w_.zeros + (panel_ * groups + group_of(unit)) * kPanel + lane_ / 4;
    zeros_[0] = minus_zero<zero_type>(from.load(at));
    zeros_[1] = minus_zero<zero_type>(from.load(at + 8));
  }

  DEVICE void end_group(const Slot& slot, int unit) {
    float scale[2] = {1.0f, 1.0f};
    if (w_.groups) {
      const Shared<uint16_t> scales = (stage(slot) + w_.scales).template as<uint16_t>();
      const int at = (panel_ * w_.groups + group_of(unit)) * kPanel + lane_ / 4;
      scale[0] = to_float(f16{scales.load(at)});
      scale[1] = to_float(f16{scales.load(at + 8)});
    }
    wgmma_wait<0>(part_);
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sums_[i] = fma(scale[i / 2 % 2], part_[i], sums_[i]);
  }

  const Product& w_;
  const int team_, panel_, lane_;
  Slot slot_, before_;   // the next one, and the last one
  uint32_t a_[2][2][4];  // [buffer][fragment]
  Vector<uint32_t> codes_;
  uint32_t zeros_[2];
  Sum part_[kTokens / 2];
  float sums_[S::kInteger ? 1 : kTokens / 2];
};

/// The tiles of a block, by its consumers.
template <Format kFormat, class X, int kTokens>
DEVICE void consume(const Product& w) {
  using This = Consumer<kFormat, X, kTokens>;
  using S = typename This::S;
  constexpr int kThreads = S::kConsumers * kWarpgroup, kAll = 1;  // their barrier
  if constexpr (S::kTableBytes > 0) {
    for (int part = 0; part < S::kParts; ++part)
      fill_table<typename S::T>(w.table, part, S::table() + part * (kTableBytes / 4), kThreads);
    barrier_sync(kAll, kThreads);
  }
  This consumer(w);
  const int chains = (w.stages + w.chain - 1) / w.chain;
  const Slots slots{S::slots(w), S::kTeams == 1 ? 1 : chains, kTokens * S::kSlotRow, S::kSlotRow};
  Slots own = slots;
  own.sums = own.sums + consumer.team() * slots.chain;
  const int count = S::kFeatures / (w.p.gated ? 2 : 1), height = kTokens / w.x.parts;
  for_each_tile(w, height, [&](const Tile& tile, bool empty) {
    const Columns columns{tile.features * count, count, kPanel, S::kFeatures / 2};
    if (empty) return write_zeros(w.p.out, tile.expert, height, columns.first, count, kThreads);
    const bool any = consumer.run(slots);
    if constexpr (S::kOneTile) barrier_sync(kAll, kThreads);
    if (any) consumer.add_chain(own, S::kTeams == 1 && !S::kInteger && chains > 1);
    barrier_sync(kAll, kThreads);
    write_out<typename This::Sum>(w.p, w.x, tile.expert, kTokens, columns, slots, kThreads);
    barrier_sync(kAll, kThreads);
  });
}

template <Format kFormat, class X, int kTokens>
KERNEL((Shape<kFormat, X, kTokens>::kThreads), 1)
linear_tiles(const GRID_CONSTANT TensorMap x, const GRID_CONSTANT Product w) {
  using S = Shape<kFormat, X, kTokens>;
  if (thread_index() == 0) {
    for (int i = 0; i < S::kTeams * w.ring; ++i) {
      S::full(i).init(S::kProducers);
      S::empty(i).init(4 * S::kWide);
    }
    fence_barrier_init();
  }
  sync_block();
  // By shuffles, as the compiler then knows what is the same in all lanes, as descriptors have to
  // be.
  if (shuffle(warp_index(), 0) < S::kConsumers * 4) {
    if constexpr (kTokens > kFew) increase_registers<224>();
    consume<kFormat, X, kTokens>(w);
  } else {
    if constexpr (kTokens > kFew) decrease_registers<56>();
    Producer<S>(x, w).run();
  }
}

/// How a stage is cut, and how many of them a block has; returns the bytes of shared memory.
template <class S>
int lay_out(Product& w, int64_t limit) {
  const int scales = S::kPanels * w.groups * 32;
  const int zeros = w.p.weight.zeros ? S::kPanels * std::max(w.groups, 1) * int{kPanel} : 0;
  w.scales = S::kXBytes + S::kPanels * S::kPanelBytes;
  w.zeros = w.scales + scales;
  w.stage_bytes = (w.zeros + zeros + 1023) / 1024 * 1024;
  const int fixed = 2048 + S::kTableBytes + (S::kOneTile ? 0 : S::kSlotBytes);
  constexpr int kMostStages = 32;  // that there are barriers for
  const int fit = (static_cast<int>(limit) - fixed) / (w.stage_bytes * S::kTeams);
  w.ring = std::max(1, std::min(fit, kMostStages / S::kTeams));
  const int stages = S::kTeams * w.ring * w.stage_bytes;
  return fixed + (S::kOneTile ? std::max(stages, S::kSlotBytes) : stages);
}

template <Format kFormat, class X, int kTokens>
void launch_tiles(Product w, Stream stream) {
  using S = Shape<kFormat, X, kTokens>;
  using T = typename S::T;
  const LinearParams& p = w.p;
  w.stages = static_cast<int>((p.weight.depth + kStageDepth - 1) / kStageDepth);
  w.chain = (w.stages + kChains - 1) / kChains;
  w.groups = p.weight.groups ? static_cast<int>(kStageDepth / p.weight.group) : 0;
  const int64_t panels = p.weight.panels / (p.gated ? 2 : 1), of_block = p.gated ? 2 : 1;
  w.feature_tiles = (panels * of_block + S::kPanels - 1) / S::kPanels;
  w.token_tiles = most_tiles(p.experts, p.rows, kTokens / w.x.parts);
  const int64_t tokens = p.rows * w.x.parts;
  const int64_t sizes[] = {p.weight.depth, tokens}, strides[] = {1, tokens > 1 ? w.x.row : 64};
  const TensorMap x = make_tensor_map(static_cast<const T*>(w.x.data), sizes, strides,
                                      {kSpan / int{sizeof(T)}, kTokens}, Swizzle::bytes128);
  const int shared = lay_out<S>(w, shared_limit(stream.device));
  const int64_t tiles = w.feature_tiles * w.token_tiles;
  const int64_t blocks =
      S::kOneTile ? tiles : std::min<int64_t>(tiles, multiprocessors(stream.device));
  LAUNCH((linear_tiles<kFormat, X, kTokens>), blocks, S::kThreads, shared, stream, x, w);
}

/// The widest tiles of which there is one for every second multiprocessor.
template <Format kFormat, class X>
void choose_tokens(const Product& w, Stream stream) {
  const int64_t tokens = usual_rows(w.p.experts, w.p.rows) * w.x.parts;
  if (tokens <= kFew) return launch_tiles<kFormat, X, kFew>(w, stream);
  const int64_t features = (w.p.weight.panels + 7) / 8;
  const auto fills = [&](int64_t height) {
    const int64_t tiles = features * most_tiles(w.p.experts, w.p.rows, height / w.x.parts);
    return tokens > height / 2 && 2 * tiles >= multiprocessors(stream.device);
  };
  if constexpr (std::is_same_v<X, int8_t>)
    if (fills(256)) return launch_tiles<kFormat, X, 256>(w, stream);
  fills(128) ? launch_tiles<kFormat, X, 128>(w, stream) : launch_tiles<kFormat, X, 64>(w, stream);
}

template <class T>
void choose_format(const Product& w, Stream stream) {
  switch (w.p.weight.format) {
    case Format::int4:
      return choose_tokens<Format::int4, T>(w, stream);
    case Format::int8:
      return choose_tokens<Format::int8, T>(w, stream);
    default:
      if constexpr (std::is_same_v<T, bf16>)
        if (w.x.parts == 2) return choose_tokens<Format::nf4, float>(w, stream);
      return choose_tokens<Format::nf4, T>(w, stream);
  }
}

}  // namespace

bool fits_sm90(const LinearParams& p) {
  return p.weight.format != Format::int4_dynamic && p.weight.depth > 0;
}

void linear_sm90(const LinearParams& p, const Input& x, Stream stream) {
  Product w{p, x};
  for (int i = 0; i < 16; ++i) w.table[i] = kNormalFloat[i];
  if (p.weight.format == Format::int8_dynamic)
    return choose_tokens<Format::int8_dynamic, int8_t>(w, stream);
  p.x.dtype == DType::f16 ? choose_format<f16>(w, stream) : choose_format<bf16>(w, stream);
}

}  // namespace warpformer::cuda

// What the blocks of cuda_sm90.cu share: how they are cut, where things lie in shared memory, and
// the producer that fills it.
#pragma once

#include "core/cuda/bulk.cuh"
#include "linear/codes.cuh"
#include "linear/output.cuh"

namespace warpformer::cuda::sm90 {

constexpr int kChains = 4;        // that K is cut into, at most
constexpr int kStageDepth = 128;  // of K: whole groups
constexpr int kFew = 16;          // tokens, at most, where each chain has a team of its own
constexpr int kWarpgroup = 128, kSpan = 128;
constexpr int kSlotPadding = 4;  // floats a token: lanes of a fragment fall into all banks

struct Product {
  LinearParams p;
  Input x;
  int stages, chain;                   // of K; of a chain
  int ring;                            // stages of a team in shared memory
  int groups;                          // of a stage; 0: a group is a row
  int scales, zeros, stage_bytes;      // where they lie in a stage; its size
  int64_t feature_tiles, token_tiles;  // of out
  float table[16];                     // of nf4
};

/// How a block is cut. X is float only where W, too, has to be the sum of two parts.
template <Format kFormat, class X, int kTokens_>
struct Shape {
  static constexpr int kTokens = kTokens_;
  using T = std::conditional_t<std::is_same_v<X, float>, bf16, X>;
  static constexpr bool kInteger = std::is_same_v<X, int8_t>;
  static constexpr int kParts = std::is_same_v<X, float> ? 2 : 1;
  static constexpr int kTeams = (kTokens > kFew) ? 1 : kChains;
  static constexpr int kWide = (kTokens > kFew) ? 2 : 1;  // warpgroups of a team, 64 features each
  static constexpr int kConsumers = kTeams * kWide;
  static constexpr int kPanels = 4 * kWide, kFeatures = kPanels * kPanel;
  // A warpgroup of producers: a warp has the copies of a stage of a team, or of a fourth of it.
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kProducers = 4 / kTeams, kShare = kPanels / kProducers;  // of a team

  // Of a stage: boxes of x, each 128 bytes of a token, then panels of W.
  static constexpr int kTileDepth = tile_depth(kFormat), kTiles = kStageDepth / kTileDepth;
  static constexpr int kPanelBytes = kTiles * kTileBytes;
  static constexpr int kBoxes = kStageDepth * int{sizeof(T)} / kSpan;
  static constexpr int kBoxBytes = kTokens * kSpan, kXBytes = kBoxes * kBoxBytes;
  // A unit is two fragments, 64 bytes of a token.
  static constexpr int kUnits = 2 * kBoxes, kSteps = kUnits * kParts;

  static constexpr int kTableBytes = kFormat == Format::nf4 ? kParts * cuda::kTableBytes : 0;
  static constexpr int kSlotRow = kFeatures + kSlotPadding;
  static constexpr int kSlotBytes = kTeams * kTokens * kSlotRow * 4;
  // Integers take so much room that their sums lie over the stages: a block has one tile, then.
  static constexpr bool kOneTile = kInteger && kTeams == 1;

  DEVICE static uint32_t start() { return (shared_memory<char>().address() + 1023) / 1024 * 1024; }
  DEVICE static Barrier full(int slot) {
    return Barrier(Shared<uint64_t>(start() + slot * 2 * Barrier::bytes));
  }
  DEVICE static Barrier empty(int slot) {
    return Barrier(Shared<uint64_t>(start() + (slot * 2 + 1) * Barrier::bytes));
  }
  /// Stages begin at multiples of 1024, where the swizzle's pattern does.
  DEVICE static Shared<uint8_t> stage(const Product& w, int slot) {
    return Shared<uint8_t>(start() + 1024 + kTableBytes + slot * w.stage_bytes);
  }
  DEVICE static Shared<uint32_t> table() { return Shared<uint32_t>(start() + 1024); }
  DEVICE static Shared<float> slots(const Product& w) {
    return stage(w, kOneTile ? 0 : kTeams * w.ring).template as<float>();
  }
};

DEVICE int min_of(int a, int b) { return a < b ? a : b; }

/// A stage of a team's ring, and in which parity its barriers complete.
struct Slot {
  int index = 0, phase = 0;
  DEVICE Slot next(int ring) const {
    return index + 1 == ring ? Slot{0, phase ^ 1} : Slot{index + 1, phase};
  }
};

/// The stages of K of a team: those of its chain or, where there is one team, of all of them.
template <int kTeams>
DEVICE int first_stage(const Product& w, int team) {
  return kTeams == 1 ? 0 : min_of(team * w.chain, w.stages);
}
template <int kTeams>
DEVICE int stages_of(const Product& w, int team) {
  const int first = first_stage<kTeams>(w, team);
  return kTeams == 1 ? w.stages : min_of(first + w.chain, w.stages) - first;
}

/// A tile of out: features, and rows of an expert.
struct Tile {
  int64_t features;
  Expert expert;
};

/// Calls f(tile, whether its rows are those of no expert) for the tiles of this block. Those of the
/// same features follow each other, 8 of them, which read the same panels; then come the next
/// features.
template <class F>
DEVICE void for_each_tile(const Product& w, int height, const F& f) {
  constexpr int64_t kBand = 8;
  const int64_t tiles = w.feature_tiles * w.token_tiles, of_band = kBand * w.feature_tiles;
  for (int64_t i = block_index(); i < tiles; i += grid_blocks()) {
    const int64_t band = i / of_band, left = w.token_tiles - band * kBand;
    const int64_t rows = left < kBand ? left : kBand;
    Tile tile{i % of_band / rows, {}};
    // By votes, as the compiler then knows that a warp stays together, and has addresses once a
    // warp.
    if (any(find_expert(w.p.experts, w.p.weight, w.p.rows, height,
                        band * kBand + i % of_band % rows, tile.expert)))
      f(tile, any(tile.expert.weight == nullptr));
  }
}

/// Panel `i` of a block of `count`, of a gated one first those of the gate; the last one again past
/// the end.
DEVICE int64_t panel_of(const Product& w, int64_t tile, int i, int count) {
  const Weight& weight = w.p.weight;
  const int64_t parts = w.p.gated ? 2 : 1, end = weight.panels / parts, of_part = count / parts;
  const int64_t panel = tile * of_part + i % of_part;
  return (panel < end ? panel : end - 1) + i / of_part * end;
}

/// Fills the ring of a team, with one producer or four, which share out panels and boxes of x: a
/// warp, in which each lane has one of the copies of a stage.
template <class S>
class Producer {
 public:
  DEVICE Producer(const TensorMap& x, const Product& w)
      : x_(x),
        w_(w),
        team_((warp_index() - 4 * S::kConsumers) / S::kProducers),
        part_(warp_index() % S::kProducers),
        lane_(lane_index()),
        own_(lane_ % S::kShare),
        role_(lane_ / S::kShare) {}

  DEVICE void run() {
    const int first = first_stage<S::kTeams>(w_, team_), count = stages_of<S::kTeams>(w_, team_);
    Slot slot;
    for_each_tile(w_, S::kTokens / w_.x.parts, [&](const Tile& tile, bool empty) {
      if (empty) return;
      token_ = tile.expert.first * w_.x.parts;
      panel_ = tile.expert.weight +
               panel_of(w_, tile.features, part_ * S::kShare + own_, S::kPanels) * w_.p.weight.size;
#pragma unroll 1
      for (int i = 0; i < count; ++i, slot = slot.next(w_.ring)) {
        const int index = slot.index * S::kTeams + team_;
        S::empty(index).wait(slot.phase ^ 1);
        fetch(first + i, S::stage(w_, index), S::full(index));
      }
    });
  }

 private:
  DEVICE void fetch(int stage, Shared<uint8_t> to, Barrier full) {
    using T = typename S::T;
    const Weight& weight = w_.p.weight;
    const int all = static_cast<int>((weight.depth + S::kTileDepth - 1) / S::kTileDepth);
    const int tiles = min_of(S::kTiles, all - stage * S::kTiles);
    // Of a row as a group there are zeros, perhaps, and no scales.
    const int first = stage * w_.groups;
    const int groups = min_of(w_.groups, static_cast<int>(weight.groups) - first);
    const int zeros = !weight.zeros ? 0 : w_.groups ? groups : 1;
    if (tiles < S::kTiles || groups < w_.groups) {
      clear(to, tiles, groups, zeros);
      fence_proxy_async();  // later copies fill the stage again
      sync_warp();
    }
    const int boxes = S::kProducers == 1 ? S::kBoxes : part_ < S::kBoxes;
    if (lane_ == 0)
      full.arrive_expect(boxes * S::kBoxBytes +
                         S::kShare * (tiles * kTileBytes + groups * 32 + zeros * kPanel));
    sync_warp();
    if (role_ == 0)
      bulk_load(to + codes_at(own_), panel_ + int64_t{stage} * S::kPanelBytes, tiles * kTileBytes,
                full);
    if (role_ == 1 && groups > 0)
      bulk_load(to + scales_at(own_), panel_ + weight.scales + first * 32, groups * 32, full);
    if (role_ == 2 && zeros > 0)
      bulk_load(to + zeros_at(own_), panel_ + weight.zeros + first * kPanel, zeros * kPanel, full);
    if (role_ == 3 && own_ < boxes) {
      const int box = S::kProducers == 1 ? own_ : part_;
      tensor_load((to + box * S::kBoxBytes).template as<T>(), x_,
                  {stage * kStageDepth + box * (kSpan / int{sizeof(T)}), token_}, full);
    }
  }

  // Where what panel `own` of this warp has lies in a stage.
  DEVICE int codes_at(int own) const {
    return S::kXBytes + (part_ * S::kShare + own) * S::kPanelBytes;
  }
  DEVICE int scales_at(int own) const {
    return w_.scales + (part_ * S::kShare + own) * w_.groups * 32;
  }
  DEVICE int zeros_of_stage() const { return w_.groups ? w_.groups : 1; }
  DEVICE int zeros_at(int own) const {
    return w_.zeros + (part_ * S::kShare + own) * zeros_of_stage() * kPanel;
  }

  /// Makes zeros of what a stage has no copy for, at the end of K.
  DEVICE void clear(Shared<uint8_t> to, int tiles, int groups, int zeros) {
    const auto clear_from = [&](int at, int begin, int end) {
#pragma unroll 1
      for (int i = begin + lane_ * 16; i < end; i += kWarp * 16) to.store16(at + i, {});
    };
#pragma unroll 1
    for (int i = 0; i < S::kShare; ++i) {
      clear_from(codes_at(i), tiles * kTileBytes, S::kPanelBytes);
      clear_from(scales_at(i), groups * 32, w_.groups * 32);
      if (zeros > 0) clear_from(zeros_at(i), zeros * kPanel, zeros_of_stage() * kPanel);
    }
  }

  const TensorMap& x_;
  const Product& w_;
  const int team_, part_, lane_, own_, role_;
  int token_ = 0;
  const uint8_t* panel_ = nullptr;
};

}  // namespace warpformer::cuda::sm90

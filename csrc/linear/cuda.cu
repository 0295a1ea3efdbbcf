// Products by quantized weights, whose bytes go from memory to registers once for each tile of
// tokens. W is the first operand of mma: 16 output features by K, times 8 tokens.
//
//   W panels --cp.async--> stage --16 bytes a lane--> codes --dequantize--> A --mma--> part
//   x tokens --cp.async--> stage --ldmatrix-----------------------------> B --/
//
//   part --at the end of a group: += scale part--> sums --at the end of a chain--> chain
//   chain 0 + chain 1 + .. --factor, bias, act, gate, residual--> out
//
// K is cut into at most 8 chains, by its length alone. A team of warps owns a chain, or all of them
// one after the other:
//
//   few tokens     8 teams, a chain each      32 features a warp, 8 or 16 tokens    waits for W
//   many tokens    one team of 4 warps        32 features a warp, 64 tokens         waits for mma
//
// Both add the same numbers in the same order, so that a row gives the same bits in any batch.
// grouped_linear is the same kernel, whose blocks find their rows and weight (experts.cuh). On
// Hopper cuda_sm90.cu multiplies, all formats but int4_dynamic.
//
// A team's stages are a ring. Each step waits until its stage has landed, meets at the team's own
// barrier, and refills the stage that all warps of the team have left behind.
#include "core/cuda/launch.cuh"
#include "core/cuda/matrix.cuh"
#include "core/cuda/rows.cuh"
#include "core/cuda/swizzle.cuh"
#include "core/cuda/tensor_map.cuh"
#include "linear/codes.cuh"
#include "linear/cuda_sm90.h"
#include "linear/inputs.cuh"
#include "linear/output.cuh"

namespace warpformer::cuda {
namespace {

constexpr int kChains = 8, kStages = 4;
constexpr int kPanels = 2;           // of a warp
constexpr int kFew = 2, kMany = 8;   // tiles of 8 tokens, at most, of few and of many
constexpr int kFewTokens = 32;       // that one block, or two, take 16 at a time
constexpr int kManyWarps = 4;        // of the team of many tokens
constexpr int64_t kWideBlocks = 96;  // of blocks of two warps a team, to be worth having
constexpr int kSlotPadding = 4;      // floats a token: lanes of a fragment fall into all banks

/// Where what a team has in shared memory lies, in bytes of a stage: first come the tiles of W.
struct Stage {
  int x, scales, zeros, x_scales, x_sums, size;
};

struct Product {
  LinearParams p;
  Stage stage;
  Input x;
  int tiles, chain;    // of K; of a chain
  int teams, warps;    // of a block; of a team
  int group_shift;     // pairs of fragments of a group, as a power of two; 31: a group a row
  int groups_of_tile;  // scales of a tile and row
  float table[16];     // of nf4
};

DEVICE int min_of(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

/// X is float only where W, too, has to be the sum of two parts.
template <Format kFormat, class X, int kTiles>
class Warp {
 public:
  using T = std::conditional_t<std::is_same_v<X, float>, bf16, X>;
  static constexpr bool kDynamic = std::is_same_v<X, int8_t>;
  static constexpr bool kTokenScales =
      kFormat == Format::int8_dynamic;  // else, if dynamic, of blocks
  using Part = std::conditional_t<kDynamic, int32_t, float>;
  using Sum = std::conditional_t<kTokenScales, int32_t, float>;
  static constexpr int kParts = std::is_same_v<X, float> ? 2 : 1;
  static constexpr int kTablesBytes = kFormat == Format::nf4 ? kParts * kTableBytes : 0;
  // 32 of K: a pair of fragments, or one of bytes.
  static constexpr int kDepth = tile_depth(kFormat), kPairs = kDepth / 32;
  static constexpr int kTokens = 8 * kTiles, kXRow = kDepth * int{sizeof(T)}, kXChunks = kXRow / 16;
  static constexpr Swizzle kSwizzle = static_cast<Swizzle>(kXRow);

  /// `stages` is the team's part of shared memory.
  DEVICE Warp(const Product& product, const Expert& expert, int team, Shared<uint8_t> stages,
              Shared<uint32_t> table)
      : w_(product),
        weight_(product.p.weight),
        token_(expert.first * product.x.parts),
        tokens_(min_of(kTokens, (expert.end - expert.first) * product.x.parts)),
        team_(team),
        thread_(thread_index() % (product.warps * kWarp)),
        warp_(thread_ / kWarp),
        stages_(stages),
        table_(table) {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      panel_[i] = expert.weight + panel_of(i) * weight_.size;
      zeros_[i][0] = zeros_[i][1] = kDynamic ? 0 : minus_zero<T>(8);
      clear(part_[i]);
      clear(sums_[i]);
    }
    const int lane = lane_index();
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
      x_offset_[pair] = static_cast<int>(
          swizzle<kSwizzle>((lane % 8) * kXRow +
                            (kXRow / 16 / kPairs * pair + lane / 8 % (kXRow / 16 / kPairs)) * 16));
  }

  /// Chains from tile `begin` on up to `end`, into `slot` [token][feature of the block].
  DEVICE void run(int begin, int end, Shared<float> slot, int slot_row) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) {
      if (begin + s < end) fetch(begin + s, s);
      copy_async_commit();
    }
    int stage = 0, chain_end = begin + w_.chain;
    for (int tile = begin; tile < end; ++tile) {
      copy_async_wait<kStages - 2>();
      barrier_sync(1 + team_, w_.warps * kWarp);
      if (tile + kStages - 1 < end) fetch(tile + kStages - 1, (stage + kStages - 1) % kStages);
      copy_async_commit();
      const bool last = tile + 1 == chain_end || tile + 1 == end;
      if (last) chain_end += w_.chain;
      multiply(tile, stages_ + stage * w_.stage.size, last);
      // Chains of other teams are written when all have left their stages.
      if (last && tile + 1 < end) add_chain(slot, slot_row, tile >= w_.chain);
      stage = (stage + 1) % kStages;
    }
  }

  /// The last chain: adds its sums to the slot's, or is the first.
  DEVICE void add_chain(Shared<float> slot, int slot_row, bool add) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = (8 * tile + 2 * t + j % 2) * slot_row + (warp_ * kPanels + i) * kPanel +
                         g + 8 * (j / 2);
          const Shared<Sum> to = slot.as<Sum>();
          const Sum sum = chain_sum(i, tile, j);
          to.store(at, add ? to.load(at) + sum : sum);
        }
      kTokenScales ? clear(part_[i]) : clear(sums_[i]);
    }
  }

 private:
  DEVICE Sum chain_sum(int i, int tile, int j) const {
    if constexpr (kTokenScales) {
      return part_[i][tile][j];
    } else {
      return sums_[i][tile][j];
    }
  }
  template <class V>
  DEVICE static void clear(V (&values)[kTiles][4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[tile][j] = 0;
  }

  /// Panel i of this warp: two neighbours, or one of the gate and the one it gates; the last one
  /// again past the end.
  DEVICE int64_t panel_of(int i) const {
    const int64_t first = block_index() * w_.warps + warp_;
    const int64_t half = weight_.panels / 2;
    if (w_.p.gated) return (first < half ? first : half - 1) + i * half;
    const int64_t panel = first * kPanels + i;
    return panel < weight_.panels ? panel : weight_.panels - 1;
  }

  /// Begins to copy a tile of K into a stage: each warp its panels, all the tokens.
  DEVICE void fetch(int tile, int stage) {
    const Shared<uint8_t> to = stages_ + stage * w_.stage.size;
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
      copy_async16(to + (warp_ * kPanels + i) * kTileBytes + lane * kLaneBytes,
                   panel_[i] + int64_t{tile} * kTileBytes + lane * kLaneBytes);

    const T* x = static_cast<const T*>(w_.x.data);
    for (int c = thread_; c < kTokens * kXChunks; c += w_.warps * kWarp) {
      const int token = c / kXChunks, chunk = c % kXChunks;
      const int64_t k = int64_t{tile} * kDepth + chunk * (16 / int{sizeof(T)});
      const bool valid = token < tokens_ && (kDynamic || k < weight_.depth);
      const auto offset = static_cast<int>(swizzle<kSwizzle>(token * kXRow + chunk * 16));
      copy_async16((to + w_.stage.x + offset).template as<T>(),
                   valid ? x + int64_t{token_ + token} * w_.x.row + k : x, valid);
    }

    if constexpr (kDynamic && !kTokenScales) {
      const Quantized& q = w_.x.quantized;
      constexpr int kScales = kPairs * kTokens;
      for (int c = thread_; c < 2 * kScales; c += w_.warps * kWarp) {
        const bool sums = c >= kScales;
        if (sums && !weight_.zeros) break;
        const int at = c % kScales, token = at % kTokens, block = tile * kPairs + at / kTokens;
        const bool valid = token < tokens_;
        const float* from = sums ? reinterpret_cast<const float*>(q.offsets) : q.scales;
        // The first token of an expert may be any: no 16 bytes.
        copy_async4(
            (to + (sums ? w_.stage.x_sums : w_.stage.x_scales) + at * 4).template as<float>(),
            valid ? from + block * q.tokens + token_ + token : from, valid);
      }
    }

    const int groups = w_.groups_of_tile;
    const int first = tile * kPairs >> w_.group_shift;
    if (weight_.groups && lane < kPanels * groups * 2) {
      const int at = lane / 2, i = groups == 1 ? at : at / 2;
      copy_async16(to + w_.stage.scales + ((warp_ * kPanels * groups + at) * 2 + lane % 2) * 16,
                   dynamic_panel(i) + weight_.scales + group_at(first + (at & (groups - 1))) * 32 +
                       lane % 2 * 16);
    }
    if (weight_.zeros && lane < kPanels * groups) {
      const int i = groups == 1 ? lane : lane / 2;
      copy_async16(to + w_.stage.zeros + (warp_ * kPanels * groups + lane) * 16,
                   dynamic_panel(i) + weight_.zeros + group_at(first + (lane & (groups - 1))) * 16);
    }
  }
  /// By comparison: an index that is not constant would keep this struct out of registers.
  DEVICE const uint8_t* dynamic_panel(int i) const { return i == 0 ? panel_[0] : panel_[1]; }
  /// The last group again past the end.
  DEVICE int64_t group_at(int64_t g) const {
    return g < weight_.groups || g == 0 ? g : weight_.groups - 1;
  }

  DEVICE void multiply(int tile, Shared<uint8_t> stage, bool last) {
    const int lane = lane_index();
    Vector<uint32_t> codes[kPanels];
#pragma unroll
    for (int i = 0; i < kPanels; ++i)
      codes[i] = (stage + (warp_ * kPanels + i) * kTileBytes + lane * kLaneBytes)
                     .template as<uint32_t>()
                     .load16();
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const int group = w_.groups_of_tile > 1 ? pair : 0;
      if (weight_.zeros && (pair == 0 || w_.groups_of_tile > 1)) read_zeros(stage, group);
      const Shared<T> x = (stage + w_.stage.x + x_offset_[pair]).template as<T>();
      if constexpr (kDynamic) {
        multiply_bytes(codes, pair, x);
      } else {
        multiply_pair(codes, pair, x);
      }
      const bool end = ((tile * kPairs + pair + 1) & ((1u << w_.group_shift) - 1)) == 0;
      if constexpr (kTokenScales) continue;
      if (end || kDynamic || (last && pair == kPairs - 1)) end_group(stage, group, pair);
    }
  }

  DEVICE void multiply_pair(const Vector<uint32_t> (&codes)[kPanels], int pair, Shared<T> x) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      uint32_t a[2][kPanels][4];
#pragma unroll
      for (int f = 0; f < 2; ++f)
#pragma unroll
        for (int i = 0; i < kPanels; ++i)
          dequantize(codes[i], 2 * pair + f, part, zeros_[i], a[f][i]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        uint32_t b[2][2];
        ldmatrix(b, x + t * 8 * kDepth);
#pragma unroll
        for (int f = 0; f < 2; ++f)
#pragma unroll
          for (int i = 0; i < kPanels; ++i) mma_m16n8k16<T>(part_[i][t], a[f][i], b[f]);
      }
    }
  }
  DEVICE void multiply_bytes(const Vector<uint32_t> (&codes)[kPanels], int pair, Shared<T> x) {
    uint32_t a[kPanels][4];
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      if constexpr (kTokenScales) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = codes[i][r];
      } else {
        from_int4_dynamic({codes[i][2 * pair], codes[i][2 * pair + 1]}, a[i]);
      }
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t b[2];
      ldmatrix(b, x + t * 8 * kDepth);
#pragma unroll
      for (int i = 0; i < kPanels; ++i) mma_m16n8k32(part_[i][t], a[i], b);
    }
  }

  DEVICE void read_zeros(Shared<uint8_t> stage, int group) {
    const int g = lane_index() / 4;
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int at =
          w_.stage.zeros + ((warp_ * kPanels + i) * w_.groups_of_tile + group) * kPanel + g;
#pragma unroll
      for (int half = 0; half < 2; ++half) zeros_[i][half] = zero_of(stage.load(at + 8 * half));
    }
  }

  /// What makes a code a number: added to it or, where x is integers, times their sum to the sum of
  /// 16 (code - 8) x.
  DEVICE static uint32_t zero_of(uint32_t zero) {
    if constexpr (kDynamic) {
      return 16 * (8 - zero);
    } else {
      return minus_zero<T>(zero);
    }
  }

  DEVICE void dequantize(const Vector<uint32_t>& codes, int fragment, int part,
                         const uint32_t (&zeros)[2], uint32_t (&a)[4]) const {
    if constexpr (kFormat == Format::int4) {
      from_int4<T>(codes[fragment], zeros, a);
    } else if constexpr (kFormat == Format::nf4) {
      from_nf4(codes[fragment], table_ + part * (kTableBytes / 4), a);
    } else {
      from_int8<T>({codes[2 * fragment], codes[2 * fragment + 1]}, a);
    }
  }

  DEVICE void end_group(Shared<uint8_t> stage, int group, [[maybe_unused]] int pair) {
    const int g = lane_index() / 4;
    const Shared<f16> scales = (stage + w_.stage.scales).template as<f16>();
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      float scale[2] = {1.0f, 1.0f};
      if (weight_.groups) {
        const int at = ((warp_ * kPanels + i) * w_.groups_of_tile + group) * kPanel + g;
        scale[0] = to_float(scales.load(at));
        scale[1] = to_float(scales.load(at + 8));
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float of_token = 1.0f;
          auto part = part_[i][t][j];
          if constexpr (kDynamic) {
            const int at = pair * kTokens + 8 * t + 2 * (lane_index() % 4) + j % 2;
            of_token = (stage + w_.stage.x_scales).template as<float>().load(at);
            if (weight_.zeros)
              part += static_cast<int32_t>(zeros_[i][j / 2]) *
                      (stage + w_.stage.x_sums).template as<int32_t>().load(at);
          }
          sums_[i][t][j] = fma(scale[j / 2] * of_token, static_cast<float>(part), sums_[i][t][j]);
        }
      clear(part_[i]);
    }
  }

  const Product& w_;
  const Weight& weight_;
  const int token_, tokens_, team_, thread_, warp_;
  const Shared<uint8_t> stages_;
  const Shared<uint32_t> table_;
  const uint8_t* panel_[kPanels];
  int x_offset_[kPairs];
  uint32_t zeros_[kPanels][2];
  Part part_[kPanels][kTiles][4];
  float sums_[kPanels][kTiles][4];
};

template <int kTiles>
constexpr int kMaxThreads = (kTiles > kFew) ? kManyWarps * kWarp : kChains * 2 * kWarp;

template <Format kFormat, class T, int kTiles>
KERNEL(kMaxThreads<kTiles>, 1)
linear_kernel(const GRID_CONSTANT Product w) {
  using This = Warp<kFormat, T, kTiles>;
  constexpr int table_bytes = This::kTablesBytes;
  const LinearParams& p = w.p;
  const int height = This::kTokens / w.x.parts, columns = w.warps * kPanels * kPanel;
  const int of_out = columns / (p.gated ? 2 : 1);
  Expert expert;
  if (!find_expert(p.experts, p.weight, p.rows, height, block_index_y(), expert)) return;
  if (!expert.weight) return write_zeros(p.out, expert, height, block_index() * of_out, of_out);
  const Shared<uint32_t> table = shared_memory<uint32_t>();
  if constexpr (table_bytes > 0) {
    for (int part = 0; part < This::kParts; ++part)
      fill_table<typename This::T>(w.table, part, table + part * (kTableBytes / 4));
    sync_block();
  }
  const int team = warp_index() / w.warps, team_bytes = kStages * w.stage.size;
  const int slot_row = columns + kSlotPadding;
  // Slots of many teams lie where their stages were.
  const bool alone = w.teams == 1;
  const Shared<float> slots = shared_memory<float>(table_bytes + (alone ? team_bytes : 0));
  const Shared<float> own = slots + team * This::kTokens * slot_row;

  This warp(w, expert, team, shared_memory<uint8_t>(table_bytes + team * team_bytes), table);
  const int begin = alone ? 0 : min_of(team * w.chain, w.tiles);
  const int end = alone ? w.tiles : min_of(begin + w.chain, w.tiles);
  warp.run(begin, end, own, slot_row);
  sync_block();
  if (begin < end) warp.add_chain(own, slot_row, alone && w.tiles > w.chain);
  sync_block();
  const int chains = (w.tiles + w.chain - 1) / w.chain;
  // Gate and up are panels of the same warp.
  const Columns block{block_index() * of_out, of_out, p.gated ? 2 * kPanel : kPanel, kPanel};
  write_out<typename This::Sum>(
      p, w.x, expert, This::kTokens, block,
      {slots, alone && chains ? 1 : chains, This::kTokens * slot_row, slot_row}, block_threads());
}

/// How the block is cut, and the bytes of shared memory that it then needs.
template <class This>
int lay_out(Product& w, int warps) {
  const bool grouped = w.p.weight.groups, zeros = w.p.weight.zeros;
  const int scales = warps * kPanels * w.groups_of_tile * kPanel;  // of a stage
  w.warps = warps;
  w.stage.x = warps * kPanels * kTileBytes;
  w.stage.scales = w.stage.x + This::kTokens * This::kXRow;
  w.stage.zeros = w.stage.scales + (grouped ? scales * 2 : 0);
  w.stage.x_scales = w.stage.zeros + (zeros ? scales : 0);
  const int x_scales = This::kDynamic && !This::kTokenScales ? This::kPairs * This::kTokens * 4 : 0;
  w.stage.x_sums = w.stage.x_scales + x_scales;
  w.stage.size = (w.stage.x_sums + (zeros ? x_scales : 0) + 127) / 128 * 128;
  const int stages = w.teams * kStages * w.stage.size;
  const int slots = w.teams * This::kTokens * (warps * kPanels * kPanel + kSlotPadding) * 4;
  return This::kTablesBytes + (w.teams == 1 ? stages + slots : stages > slots ? stages : slots);
}

template <Format kFormat, class X, int kTiles>
void launch_product(Product w, Stream stream) {
  using This = Warp<kFormat, X, kTiles>;
  const LinearParams& p = w.p;
  const Weight& weight = p.weight;
  constexpr int depth = This::kDepth, whole = 128 / depth;  // tiles of whole groups
  w.tiles = static_cast<int>((weight.depth + depth - 1) / depth);
  const int even = (w.tiles + kChains - 1) / kChains;
  w.chain = even ? (even + whole - 1) / whole * whole : whole;
  const bool small = weight.groups && weight.group < depth;
  w.groups_of_tile = small ? static_cast<int>(depth / weight.group) : 1;
  w.group_shift = !weight.groups ? 31 : weight.group == 32 ? 0 : weight.group == 64 ? 1 : 2;

  const int64_t panels = weight.panels / (p.gated ? 2 : 1), of_warp = p.gated ? 1 : kPanels;
  w.teams = (kTiles > kFew) ? 1 : kChains;
  const bool wide = panels / (2 * of_warp) >= kWideBlocks;
  int shared = lay_out<This>(w, (kTiles > kFew) ? kManyWarps : wide ? 2 : 1);
  if (kTiles <= kFew && shared > shared_limit(stream.device)) shared = lay_out<This>(w, 1);
  const int64_t of_block = w.warps * of_warp;
  const Grid grid((panels + of_block - 1) / of_block,
                  most_tiles(p.experts, p.rows, This::kTokens / w.x.parts));
  const int threads = w.teams * w.warps * kWarp;
  LAUNCH((linear_kernel<kFormat, X, kTiles>), grid, threads, shared, stream, w);
}

template <Format kFormat, class X>
void choose_tiles(const Product& w, Stream stream) {
  const int64_t tokens = usual_rows(w.p.experts, w.p.rows) * w.x.parts;
  if (tokens <= 8) return launch_product<kFormat, X, 1>(w, stream);
  // Two parts of W beside 64 tokens would not fit into registers.
  if (std::is_same_v<X, float> || tokens <= kFewTokens)
    return launch_product<kFormat, X, kFew>(w, stream);
  // Nor would 64 tokens beside integer sums that become floats every 32 of K.
  constexpr int many = kFormat == Format::int4_dynamic ? kMany / 2 : kMany;
  if constexpr (!std::is_same_v<X, float>) launch_product<kFormat, X, many>(w, stream);
}

bool runs_sm90(const LinearParams& p, Stream stream) {
  return compute_capability(stream.device) == 90 && fits_sm90(p);
}

template <class T>
void choose_format(Product w, Stream stream) {
  const LinearParams& p = w.p;
  Input& x = w.x;
  x.row = input_row(p.weight.format, p.x.n);
  if (p.workspace) {
    T* to = static_cast<T*>(p.workspace);
    LAUNCH(spread_kernel<T>, p.rows, kInputThreads, 0, stream, p.x, to, x.row, x.parts);
    x.data = to;
  } else {
    if (p.x.ndim) x.row = p.x.stride[0];
    x.data = static_cast<const T*>(p.x.data);
  }
  if (runs_sm90(p, stream)) return linear_sm90(p, w.x, stream);
  switch (p.weight.format) {
    case Format::int4:
      return choose_tiles<Format::int4, T>(w, stream);
    case Format::int8:
      return choose_tiles<Format::int8, T>(w, stream);
    default:
      if constexpr (std::is_same_v<T, bf16>)
        if (w.x.parts == 2) return choose_tiles<Format::nf4, float>(w, stream);
      return choose_tiles<Format::nf4, T>(w, stream);
  }
}

void multiply_integers(Product w, Stream stream) {
  const LinearParams& p = w.p;
  const bool by_token = p.weight.format == Format::int8_dynamic;
  Quantized& q = w.x.quantized;
  w.x.row = q.row = input_row(p.weight.format, p.x.n);
  q.tokens = (p.rows + kTokenPadding - 1) / kTokenPadding * kTokenPadding;
  w.x.data = q.values = static_cast<int8_t*>(p.workspace);
  q.scales = reinterpret_cast<float*>(q.values + p.rows * q.row);
  q.offsets = reinterpret_cast<int32_t*>(q.scales + q.tokens * (by_token ? 1 : q.row / kBlock));
  if (by_token) {
    LAUNCH(quantize_tokens_kernel, p.rows, kInputThreads, kTeamScratch, stream, p.x, q);
    if (runs_sm90(p, stream)) return linear_sm90(p, w.x, stream);
    choose_tiles<Format::int8_dynamic, int8_t>(w, stream);
  } else {
    LAUNCH(quantize_blocks_kernel, p.rows, kInputThreads, 0, stream, p.x, q);
    choose_tiles<Format::int4_dynamic, int8_t>(w, stream);
  }
}

}  // namespace

int64_t workspace_size(const Rows& x, Format format) {
  const int64_t row = input_row(format, x.n);
  if (is_dynamic(format)) {
    const int64_t tokens = (x.count + kTokenPadding - 1) / kTokenPadding * kTokenPadding;
    const int64_t blocks = format == Format::int8_dynamic ? 1 : row / kBlock;
    return x.count * row + blocks * tokens * 8;
  }
  if (x.dtype != DType::f32 && is_vector(x) && (x.ndim == 0 || x.stride[0] > 0)) return 0;
  return x.count * row * (x.dtype == DType::f32 ? 4 : 2);
}

void linear(const LinearParams& p, Stream stream) {
  Product w{p};
  for (int i = 0; i < 16; ++i) w.table[i] = kNormalFloat[i];
  const bool dynamic = is_dynamic(p.weight.format);
  w.x.parts = p.x.dtype == DType::f32 && !dynamic ? 2 : 1;
  if (dynamic) return multiply_integers(w, stream);
  p.x.dtype == DType::f16 ? choose_format<f16>(w, stream) : choose_format<bf16>(w, stream);
}

}  // namespace warpformer::cuda

// The product behind linear and its gradient, for a block of rows of x at a time:
//
//   rows of x   --pack, quantize-->  tiles of words, scales, sums          (L2, L3; shared)
//   for a chunk of panels of W (handed out to threads):
//     C = sums of x (8 - zero) scale
//     for a stretch of the depth:    panels --unpack--> words              (L1)
//       for each tile of rows:       C += tile words^T                     (registers, L2)
//         after the last stretch:    out = act(factor C + bias) (up) + residual
//
// Few rows take wide chunks and unpack words as they multiply them: several panels at once are as
// many streams from memory. Many take narrow ones, whose words stay in L1 or close to it, while the
// next stretch comes from memory line by line, and the next tile of rows from L3: at the ends of
// rows, what the hardware fetches by itself comes too late.
//
// `Source` is the weight: words(panel, count, first, n, few, scratch, f) calls f(B) for words
// [first, first + n) of `count` panels. Included by cpu files only.
#pragma once

#include "core/activation_functions.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "core/transpose.h"
#include "linear/tiles.h"

namespace warpformer::cpu::WF_ISA {

constexpr int64_t kBlockRows = 768;        // of x, of a thread at most: a multiple of every tile
constexpr int64_t kBlockFloats = 4 << 20;  // that those of all threads take, about
// Panels of a chunk. Of fewer, a row of out gets so few neighbouring lines at a time that the
// stores wait for each of them to come from memory.
constexpr int64_t kWide = 8, kNarrow = 4;
constexpr int64_t kFewRows = 2 * kTileRows;  // where words are unpacked, else half a tile
constexpr int64_t kUnits = 24;     // of a thread, about: so many wait for the last one shortly
constexpr int64_t kPartTiles = 2;  // of a unit, at least
constexpr int64_t kScratchWords = kWide * kDepth * kPanel;

/// Up to 16 rows of a matrix, from a column on.
struct Corner {
  const uint8_t* data;
  int64_t row, panel;  // bytes from a row, and from 16 columns, to the next
};

/// Panels beside whose products others are fetched, line by line: the next tile's rows, of `words`
/// words a row; the next stretch of W, its panels `apart` bytes apart and `share` of each for every
/// tile; and two matrices that the sums are added to or written to.
struct FetchingPanels : Panels {
  const uint8_t* memory;
  int64_t apart, step, share;
  const uint8_t* rows;
  int64_t rows_step, words;
  Corner results[2];

  template <int kPanels>
  WF_INLINE void prefetch(int64_t p, int64_t k) const {
    __builtin_prefetch(memory + p * apart + k * step);
    if (p > 0) return;
    __builtin_prefetch(rows + k * kPanels * rows_step);
    const Corner& c = results[k & 1];
    __builtin_prefetch(c.data + (k >> 1 & 15) * c.row + (k >> 5 & (kPanels - 1)) * c.panel);
  }
  WF_INLINE void skip(int64_t panels) {
    Panels::skip(panels);
    memory += panels * apart;
    rows += panels * words * rows_step;
    for (Corner& c : results) c.data += panels * c.panel;
  }
};

/// C += scale * sum, with the scale of the group that a chain belongs to. C has been cleared.
struct AddGroups {
  float* c;
  int64_t c_row;
  const f16* scales;                  // [group % 2][16]
  int64_t scales_panel, scales_line;  // from one panel, and two groups, to the next
  int chain_shift;                    // chains of a group, as a power of two

  static constexpr int kRegisters = 1, kChain = 0;
  WF_INLINE Add::None held(int, int) const { return {}; }
  WF_INLINE Vec start(int64_t, int, int) const { return set(0.0f); }
  WF_INLINE Vec scale(int64_t chain, int j) const {
    constexpr int kPerPanel = kPanel / Vec::kWidth;
    const f16* at = scales + j / kPerPanel * scales_panel + lines_before(chain) * scales_line +
                    (chain >> chain_shift & 1) * kPanel + j % kPerPanel * Vec::kWidth;
    __builtin_prefetch(at + kAhead / 2, 0, 0);
    return load(at);
  }
  WF_INLINE int64_t lines_before(int64_t chain) const { return chain >> chain_shift >> 1; }
  WF_INLINE Add::None finish(int64_t, int i, int j, Vec sum, Vec scale, Add::None) const {
    store(at(i, j), fma(sum, scale, load(at(i, j))));
    return {};
  }
  WF_INLINE void release(int, int, Add::None) const {}
  WF_INLINE AddGroups from(int64_t panel) const {
    return {c + panel * kPanel, c_row,       scales + panel * scales_panel,
            scales_panel,       scales_line, chain_shift};
  }
  WF_INLINE float* at(int i, int j) const { return c + i * c_row + j * Vec::kWidth; }
};

/// The same with integer sums of rows that are quantized in blocks, one chain each. Chains are so
/// short that C stays in registers.
template <class Word>
struct AddBlocks {
  AddGroups groups;
  const float* row_scales;  // [chain][row]
  const int32_t* offsets;
  int64_t rows;

  static constexpr int kRegisters = 2, kChain = kBlock / kPerWord<Word>;
  WF_INLINE Vec held(int i, int j) const { return load(groups.at(i, j)); }
  WF_INLINE Ints start(int64_t chain, int i, int) const {
    return set(sums_halves() ? 0 : offsets[chain * rows + i]);
  }
  WF_INLINE Vec scale(int64_t chain, int j) const { return groups.scale(chain, j); }
  WF_INLINE int64_t lines_before(int64_t chain) const { return groups.lines_before(chain); }
  WF_INLINE Vec finish(int64_t chain, int i, int, Ints sum, Vec scale, Vec held) const {
    if (sums_halves())  // of 8 words with 2 products each, which are 15 * 127 at most
      sum = add_products_of_halves(sum, set(int32_t{0x00010001}), set(offsets[chain * rows + i]));
    return fma(to_float(sum), scale * set(row_scales[chain * rows + i]), held);
  }
  static constexpr bool sums_halves() {
    if constexpr (__is_same(Word, Quad)) return kQuadSumsAreHalves;
    return false;
  }
  WF_INLINE void release(int i, int j, Vec held) const { store(groups.at(i, j), held); }
  WF_INLINE AddBlocks from(int64_t panel) const {
    return {groups.from(panel), row_scales, offsets, rows};
  }
};

/// Integer sums of whole rows.
struct AddIntegers {
  int32_t* c;
  int64_t c_row;
  bool add;

  static constexpr int kRegisters = 1, kChain = 0;
  WF_INLINE Add::None held(int, int) const { return {}; }
  WF_INLINE Add::None scale(int64_t, int) const { return {}; }
  WF_INLINE int64_t lines_before(int64_t) const { return 0; }
  WF_INLINE Ints start(int64_t, int i, int j) const {
    return add ? load(c + i * c_row + j * Vec::kWidth) : set(int32_t{0});
  }
  WF_INLINE Add::None finish(int64_t, int i, int j, Ints sum, Add::None, Add::None) const {
    store(c + i * c_row + j * Vec::kWidth, sum);
    return {};
  }
  WF_INLINE void release(int, int, Add::None) const {}
  WF_INLINE AddIntegers from(int64_t panel) const { return {c + panel * kPanel, c_row, add}; }
};

/// 1.0 for 16 columns, where a group is a whole row.
constexpr f16 kOnes[kPanel] = {{0x3C00}, {0x3C00}, {0x3C00}, {0x3C00}, {0x3C00}, {0x3C00},
                               {0x3C00}, {0x3C00}, {0x3C00}, {0x3C00}, {0x3C00}, {0x3C00},
                               {0x3C00}, {0x3C00}, {0x3C00}, {0x3C00}};

template <class Word, int kParts, Kind kKind, class Source>
class Product {
 public:
  Product(const LinearParams& p, const Source& source)
      : p_(p),
        w_(p.weight),
        source_(source),
        depth_(source.template length<Word>()),
        halves_(p.gated ? 2 : 1),
        tiles_(source.depth(), depth_, w_.group,
               source.has_zeros() ? (w_.groups ? w_.groups : 1) : 0) {}

  void run(int threads) {
    const int64_t row_size = tiles_.size(1), panels = source_.panels();
    int64_t block = kBlockFloats / row_size / kTileRows * kTileRows;
    block = at_most(p_.rows,
                    block < 8 * kTileRows ? 8 * kTileRows : at_most(block, kBlockRows * threads));
    // As many rows in each: a small one left over would wait for threads and W as long.
    const int64_t blocks = (p_.rows + block - 1) / block, even = (p_.rows + blocks - 1) / blocks;
    block = at_most(p_.rows, (even + kTileRows - 1) / kTileRows * kTileRows);
    const bool columns = p_.x.ndim == 1 && is_columns(p_.x);
    const int64_t columns_size = columns ? kTileRows * (p_.x.n + kPanel) : 0;
    const int64_t thread_size = kScratchWords + c_size() + tiles_.buffer_size() + columns_size;
    const int64_t shared_size = (block * row_size + kPanel - 1) / kPanel * kPanel;
    const int64_t size = panels * kPanel + shared_size + threads * thread_size;
    bias_ = scratch_floats(size + Units::size(threads));
    for (int64_t half = 0; half < halves_; ++half) read_bias(half);
    float *shared = bias_ + panels * kPanel, *own = shared + shared_size;

    for (int64_t row = 0; row < p_.rows; row += block) {
      const int64_t rows = at_most(block, p_.rows - row);
      tiles_.begin(rows, shared);
      // A thread is worth waking for some 2^15 elements to pack, or 2^18 products.
      const int packers = worth(rows * p_.x.n >> 15, threads);
      parallel(packers, [&](int t) {
        float* buffer = own + t * thread_size;
        for (int64_t i = tiles_.count() * t / packers; i < tiles_.count() * (t + 1) / packers;
             ++i) {
          const int64_t first = p_.first + row + tiles_.first(i), height = tiles_.height(i);
          const Rows x = columns
                             ? transpose_columns(p_.x, first, height, buffer + tiles_.buffer_size())
                             : p_.x;
          for (int64_t r = 0; r < height; ++r)
            tiles_.pack(x, columns ? r : first + r, i, r, buffer);
        }
      });
      multiply_block(row, worth(rows * p_.x.n * p_.out.n >> 18, threads), own, thread_size,
                     bias_ + size);
    }
  }

 private:
  struct Unit {
    int64_t panel, panels;  // of each half
    int64_t tile, tiles;
    int64_t next;  // the panel that its thread is likely to multiply by next
  };

  static int worth(int64_t work, int threads) {
    return static_cast<int>(work < 1 ? 1 : at_most(work, threads));
  }
  int64_t panels_of_half() const { return source_.panels() / halves_; }
  /// Row of C where a tile begins; all tiles begin at 0 where each is finished before the next one.
  int64_t row_of_c(const Unit& u, int64_t tile) const {
    return keeps_tiles_ ? tiles_.first(tile) - tiles_.first(u.tile) : 0;
  }
  int64_t c_row(int64_t chunk) const { return halves_ * chunk * kPanel + kPanel; }
  bool has_few_rows() const {
    const bool unpacks = bits_of(w_.format) * kPerWord<Word> < 32;
    return tiles_.first(tiles_.count()) <= (unpacks ? kFewRows : kTileRows / 2);
  }
  int64_t c_size() const {
    const int64_t narrow = kBlockRows * c_row(kNarrow);
    const int64_t wide = kFewRows * c_row(kWide);
    return narrow > wide ? narrow : wide;
  }
  void read_bias(int64_t half) {
    float* to = bias_ + half * panels_of_half() * kPanel;
    for (int64_t j = 0; j < panels_of_half() * kPanel; ++j) to[j] = 0.0f;
    if (p_.bias.data) read_span(p_.bias, p_.bias_row, half * p_.out.n, p_.out.n, to);
  }

  void multiply_block(int64_t row, int threads, float* memory, int64_t thread_size,
                      float* counters) {
    chunk_ = has_few_rows() ? kWide : kNarrow;
    chunks_ = (panels_of_half() + chunk_ - 1) / chunk_;
    const int64_t count = tiles_.count();
    // Many rows are shared out as they were for packing: a thread has its rows in all of a model's
    // products.
    groups_ = threads > 1 && count >= kPartTiles * threads ? threads : 1;
    const int64_t most = chunks_ * groups_ < threads ? count : count / (kPartTiles * groups_);
    parts_ = at_most((kUnits * threads + chunks_ * groups_ - 1) / (chunks_ * groups_),
                     threads > 1 && most > 1 ? most : 1);
    constexpr int64_t kMost = kBlockRows / decltype(tiles_)::kRows;  // tiles that C has room for
    const int64_t least = (count + groups_ * kMost - 1) / (groups_ * kMost);
    if (parts_ < least) parts_ = least;
    const Units units(groups_ * chunks_ * parts_, threads, counters);
    parallel(threads, [&](int t) {
      for (int64_t i = units.take(t); i >= 0; i = units.take(t))
        multiply(unit(i), row, memory + t * thread_size);
    });
  }
  int64_t panel_of(int64_t unit) const { return unit / parts_ % chunks_ * chunk_; }
  Unit unit(int64_t i) const {
    const int64_t panel = panel_of(i), parts = groups_ * parts_;
    const int64_t part = i / (chunks_ * parts_) * parts_ + i % parts_;
    const int64_t tile = tiles_.count() * part / parts, end = tiles_.count() * (part + 1) / parts;
    return {panel, at_most(chunk_, panels_of_half() - panel), tile, end - tile, panel_of(i + 1)};
  }

  void multiply(const Unit& u, int64_t row, float* scratch) {
    float* c = scratch + kScratchWords;
    const int64_t stride = halves_ * u.panels * kPanel + kPanel;
    for (int64_t half = 0; half < halves_; ++half) {
      const int64_t panel = half * panels_of_half() + u.panel;
      float* to = c + half * u.panels * kPanel;
      if constexpr (kKind == Kind::grouped || kKind == Kind::blocks) clear(u, to, stride);
      if (source_.has_zeros()) add_zeros(u, panel, scratch, to, stride);
      int64_t first = 0;
      do {
        const int64_t n = at_most(kDepth, depth_ - first), end = first + n;
        const int64_t ahead = end < depth_ ? panel : panel_after(u, half);
        const bool last = end == depth_ && half + 1 == halves_;
        source_.words(panel, u.panels, first, n, has_few_rows(), scratch, Word{},
                      [&](const auto& words) {
                        const int64_t next = end < depth_ ? end : 0;
                        auto b = fetching(words, u, n, ahead, next);
                        for (int64_t i = u.tile; i < u.tile + u.tiles; ++i) {
                          fetch_rows(b, u, i, first, next);
                          fetch_results(b, u, i, last ? row : -1, to, stride);
                          multiply_tile(u, panel, i, b, first, n, to, stride);
                          if (last) finish(u, i, row, c, stride);
                        }
                      });
        first = end;
      } while (first < depth_);
    }
  }

  /// The panel of W after those of a half.
  int64_t panel_after(const Unit& u, int64_t half) const {
    return half + 1 < halves_ ? (half + 1) * panels_of_half() + u.panel : u.next;
  }

  /// b, and the stretch at word `next` of panels of W, which is fetched while the tiles of a unit
  /// are multiplied; values that are unpacked as they are multiplied fetch what follows them.
  template <class B>
  auto fetching(const B& b, const Unit& u, int64_t n, int64_t panel, int64_t next) const {
    if constexpr (__is_same(B, Panels)) {
      // Of a weight that is not packed, what is fetched again and again is in L1 already.
      FetchingPanels f{b, reinterpret_cast<const uint8_t*>(b.data), 0, 0, 0, nullptr, 0, n, {}};
      if constexpr (Source::kIsPacked) {
        const int64_t end = at_most(depth_, next + kDepth);
        const int64_t place = source_.template place<Word>(next);
        f.memory = w_.data + panel * w_.size + place;
        f.apart = w_.size;
        f.share = (source_.template place<Word>(end) - place) / u.tiles;
        f.step = f.share / kDepth + 1;
      }
      f.rows_step = decltype(tiles_)::kRows * kParts * kStride * 4 / (u.panels * (n + !n)) + 1;
      return f;
    } else {
      return b;
    }
  }
  /// Has b fetch the rows that are multiplied after those of a tile.
  template <class B>
  void fetch_rows(B& b, const Unit& u, int64_t tile, int64_t first, int64_t next) const {
    if constexpr (__is_same(B, FetchingPanels)) {
      const bool more = tile + 1 < u.tile + u.tiles;
      b.rows = reinterpret_cast<const uint8_t*>(more ? tiles_.words(tile + 1, first)
                                                     : tiles_.words(u.tile, next));
      if (tile > u.tile) b.memory += b.share;
    }
  }

  /// Has b fetch C of a tile or, where that is finished next, out and the residual: of the tile at
  /// `row` of x.
  template <class B>
  void fetch_results(B& b, const Unit& u, int64_t tile, int64_t row, const float* c,
                     int64_t stride) const {
    if constexpr (__is_same(B, FetchingPanels)) {
      const Corner sums{reinterpret_cast<const uint8_t*>(c + row_of_c(u, tile) * stride),
                        stride * 4, kPanel * 4};
      const auto corner = [&](const Rows& rows) -> Corner {
        if (row < 0 || !rows.data || rows.ndim != 1 || rows.step != 1) return sums;
        const int64_t size = rows.dtype == DType::f32 ? 4 : 2;
        const int64_t at = row_offset(rows, p_.first + row + tiles_.first(tile));
        return {static_cast<const uint8_t*>(rows.data) + (at + u.panel * kPanel) * size,
                rows.stride[0] * size, kPanel * size};
      };
      b.results[0] = corner(p_.out);
      b.results[1] = corner(p_.residual);
    }
  }

  void clear(const Unit& u, float* c, int64_t stride) const {
    for (int64_t i = tiles_.first(u.tile); i < tiles_.first(u.tile + u.tiles); ++i, c += stride)
      for (int64_t j = 0; j < u.panels * kPanel; j += Vec::kWidth) store(c + j, set(0.0f));
  }

  /// The group that holds a word.
  int64_t group_of(int64_t word) const { return word * kPerWord<Word> / w_.group; }

  template <class B>
  void multiply_tile(const Unit& u, int64_t panel, int64_t tile, const B& b, int64_t first,
                     int64_t n, float* c, int64_t stride) const {
    c += row_of_c(u, tile) * stride;
    const auto multiply = [&](const auto& sink) {
      gemm_rows<kParts, Layout::rows, decltype(tiles_)::kRows>(
          tiles_.height(tile), u.panels, tiles_.words(tile, first), b, n, chain_, sink);
    };
    if constexpr (kKind == Kind::plain) {
      multiply(Add{c, stride, first > 0 || source_.has_zeros()});
    } else if constexpr (kKind == Kind::tokens) {
      multiply(AddIntegers{reinterpret_cast<int32_t*>(c), stride, first > 0});
    } else {
      AddGroups groups{c, stride, kOnes, 0, 0, 63};
      if (w_.groups) {
        groups.scales = scales_of(w_, w_.data + panel * w_.size, group_of(first));
        groups.scales_panel = w_.size / 2;
        groups.scales_line = (values_at(w_, 2 * w_.group) - values_at(w_, 0)) / 2;
        groups.chain_shift = __builtin_ctzll(w_.group / (chain_ * kPerWord<Word>));
      }
      if constexpr (kKind == Kind::grouped) {
        multiply(groups);
      } else {
        const int64_t block = first / chain_;
        multiply(AddBlocks<Word>{groups, tiles_.scales(tile, block), tiles_.offsets(tile, block),
                                 tiles_.height(tile)});
      }
    }
  }

  /// C += sums of x in groups, times scale (8 - zero).
  void add_zeros(const Unit& u, int64_t panel, float* zeros, float* c, int64_t stride) const {
    const int64_t groups = w_.groups ? w_.groups : 1;
    for (int64_t first = 0; first < groups; first += kDepth) {
      const int64_t n = at_most(kDepth, groups - first);
      for (int64_t p = 0; p < u.panels; ++p)
        for (int64_t g = 0; g < n; ++g)
          unpack_zeros(w_, w_.data + (panel + p) * w_.size, first + g,
                       zeros + (p * kDepth + g) * kPanel);
      for (int64_t i = u.tile; i < u.tile + u.tiles; ++i)
        gemm(tiles_.height(i), u.panels, tiles_.sums(i, first), {zeros, kDepth * kPanel, kPanel}, n,
             kChain, c + (tiles_.first(i) - tiles_.first(u.tile)) * stride, stride,
             kKind != Kind::plain || first > 0);
    }
  }

  /// out = act(factor C + bias) (up) + residual, of the rows of a tile, while C is in L1, and the
  /// columns of a unit.
  void finish(const Unit& u, int64_t tile, int64_t row, float* c, int64_t stride) const {
    const int64_t first = tiles_.first(tile), count = tiles_.height(tile);
    const int64_t at = p_.first + row + first, column = u.panel * kPanel;
    const int64_t width = u.panels * kPanel, columns = at_most(width, p_.out.n - column);
    const Rows& residual = p_.residual;
    const bool whole = columns == width && fits(p_.out) && (!residual.data || fits(residual));
    c += row_of_c(u, tile) * stride;
    float* to[kTileRows];  // rows of out where they are floats, else those of C
    const float* added[kTileRows];
    for (int64_t i = 0; i < count; ++i) {
      to[i] = whole ? row_at(p_.out, at + i, column) : c + i * stride;
      added[i] = whole && residual.data ? row_at(residual, at + i, column) : nullptr;
    }
    by_activation(p_.activation, p_.out.dtype != DType::f32, [&](auto act) {
      for (int64_t j = 0; j < width; j += Vec::kWidth) {
        const Scaling scaling(*this, u.panel, j, tile), up(*this, panel_of_up(u), j, tile);
        for (int64_t i = 0; i < count; ++i) {
          const float* from = c + i * stride + j;
          Vec v = act.value(scaling.apply(load(from), i));
          if (halves_ == 2) v = v * up.apply(load(from + width), i);
          store(to[i] + j, added[i] ? v + load(added[i] + j) : v);
        }
      }
    });
    if (whole) return;
    if (residual.data) add_spans(residual, at, column, columns, count, c, stride);
    write_spans(c, stride, p_.out, at, column, columns, count);
  }
  int64_t panel_of_up(const Unit& u) const { return (halves_ - 1) * panels_of_half() + u.panel; }

  /// factor C + bias, of a register of columns and the rows of a tile
  struct Scaling {
    Vec factor, bias;
    Ints sums;
    const int32_t *zeros, *offsets;
    const float* scales;

    /// Columns from column j of a panel on.
    Scaling(const Product& product, int64_t panel, int64_t j, int64_t tile) {
      const Weight& w = product.w_;
      const int64_t lane = j % kPanel;
      panel += j / kPanel;
      const uint8_t* data = w.data + panel * w.size;
      factor = product.source_.has_factors()
                   ? load(reinterpret_cast<const float*>(data + w.factors) + lane)
                   : set(1.0f);
      bias = load(product.bias_ + panel * kPanel + lane);
      if constexpr (kKind == Kind::tokens) {
        sums = load(reinterpret_cast<const int32_t*>(data + w.sums) + lane);
        zeros = product.tiles_.zeros(tile, 0);
        offsets = product.tiles_.offsets(tile, 0);
        scales = product.tiles_.scales(tile, 0);
      }
    }
    WF_INLINE Vec apply(Vec v, int64_t i) const {
      if constexpr (kKind == Kind::tokens) {
        const Ints shift = set(zeros[i]) * sums;
        v = to_float(bits_of(v) - shift + set(offsets[i])) * set(scales[i]);
      }
      return v * factor + bias;
    }
  };

  static bool fits(const Rows& rows) { return rows.dtype == DType::f32 && rows.step == 1; }
  static float* row_at(const Rows& rows, int64_t r, int64_t column) {
    return static_cast<float*>(rows.data) + row_offset(rows, r) + column;
  }
  /// Words that are summed in one chain. C is read and written after each, so they are as long as
  /// rounding allows: that of bf16 hides theirs.
  int64_t chain() const {
    if (kKind == Kind::tokens) return kDepth;
    if (kKind == Kind::blocks) return kBlock / kPerWord<Word>;
    if (kKind == Kind::grouped) return w_.group / kPerWord<Word>;
    if (!__is_same(Word, float)) return kDepth;
    return depth_ < 6 * kChain ? warpformer::cpu::WF_ISA::chain(depth_) : 2 * kChain;
  }

  const LinearParams& p_;
  const Weight& w_;
  const Source source_;
  const int64_t depth_, halves_;
  const bool keeps_tiles_ = depth_ > kDepth || halves_ > 1 ||
                            source_.has_zeros() || kKind == Kind::grouped || kKind == Kind::blocks;
  const int64_t chain_ = chain();
  Tiles<Word, kParts, kKind> tiles_;
  float* bias_ = nullptr;
  int64_t chunk_ = 0, chunks_ = 0;  // panels of a unit; how many make up all
  int64_t groups_ = 1, parts_ = 1;  // of the tiles: of a thread each; of a group
};

}  // namespace warpformer::cpu::WF_ISA

// cached_attention: split-KV decoding. What a block works on is told in cut.h; a warp owns a tile
// of 16 rows of it (queries with the heads that share a head of the cache), and where heads are
// wider than 128 a slice of their columns.
//
//   slots        tile 0   tile 1   tile 2   ...            32 slots each, all threads copy them
//                  |        |        |
//   copy_async   stage 0  stage 1  stage 0  ...            the next while one is worked on
//                  |
//   sync_block     |        all copies are there, and nobody reads the stage that comes next
//                  v
//   each warp    s = q k  --(slices add theirs)-->  w = exp(s - high)  -->  o = o e^.. + w v
//
//   end of a split: (high, total, o) goes to `work`, or is merged with what came before;
//   merge_kernel: a team takes a row, and merges its splits in order
//
// A row's results depend on nothing but itself and its sequence: tiles begin at multiples of 32,
// what it does not see adds zeros, and splits are merged one after the other whoever does it.
#include "core/cuda/launch.cuh"
#include "kv_cache/cuda_attention.cuh"

namespace warpformer::cuda {
namespace {

constexpr int kThreads = Cut::kMaxWarps * kWarp, kMergeThreads = 128;
constexpr int kAtOnce = 8;             // splits whose results are on their way together
constexpr int kTwoStages = 160 << 10;  // bytes at most; sm_80 has 163 KiB

template <class T, class E>
KERNEL(kThreads)
attention_kernel(CachedAttentionParams p, Layout layout) {
  const Unit unit(p);
  if (unit.first >= unit.rows) return;
  const Part& queries = unit.sequence.queries;
  Range seen = unit.seen_by_any(p, unit.first, Unit::block_rows(p.cut));
  const int64_t split = p.cut.walks ? 0 : block_index_y();
  if (!p.cut.walks) {
    seen = {larger(seen.begin, split * kSplit), smaller(seen.end, (split + 1) * kSplit)};
    if (seen.begin >= seen.end) return;
  }
  Attention<T, E> attention(p, layout, unit);
  if (p.cut.walks) attention.clear_sums();
  attention.run(static_cast<int>(seen.begin), static_cast<int>(seen.end));
  const bool broken = attention.is_broken();
  attention.each_row([&](int r, int64_t t, int64_t head) {
    const State state = broken ? State{0.0f, __builtin_nanf("")} : attention.state(r);
    if (!p.cut.walks) {
      const Work work(p, token_of(p, queries, t), head, split);
      attention.each_column(r, [&](int column, float value) { store(work.o + column, value); });
      if (attention.writes_states()) store(work.state, state);
      return;
    }
    float lse;
    const float scale = finish(p, state, head, lse);
    T* out = out_row<T>(p, queries, t, head);
    attention.each_column(r, [&](int column, float value) {
      store(out + column * p.out.stride[3], from_float<T>(value * scale));
    });
    if (p.lse && attention.writes_states()) store(lse_of(p, queries, t, head), lse);
  });
}

/// A team takes a row, a thread 8 of its columns.
template <class T>
KERNEL(kMergeThreads)
merge_kernel(CachedAttentionParams p, int size) {
  const Team team(size);
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.cache.batch);
  const int column = kChunk * team.index;
  if (team.row >= tokens * p.heads || column >= p.cut.row_floats) return;
  const int64_t token = team.row / p.heads, head = team.row % p.heads;
  const Sequence sequence(p, sequence_of(p.tokens, p.cache.batch, token));
  const int64_t t = token - token_of(p, sequence.queries, 0);
  const Range seen = sequence.visible(p, t);
  State sum{-kInfinity, sequence.known ? 0.0f : __builtin_nanf("")};
  float o[kChunk] = {};
  const int64_t last = seen.begin < seen.end ? (seen.end - 1) / kSplit : -1;
  for (int64_t first = seen.begin / kSplit; first <= last; first += kAtOnce) {
    float parts[kAtOnce][kChunk] = {};
    State states[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      states[i] = {-kInfinity, 0.0f};  // changes nothing
      if (first + i > last) continue;
      const Work work(p, token, head, first + i);
      states[i] = load(work.state);
      load_chunk(work.o + column, parts[i], Cache::normal, Where::here());
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      float kept, added;
      merge(sum, states[i], kept, added);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) o[j] = merged(o[j], parts[i][j], kept, added);
    }
  }
  float lse;
  const float scale = finish(p, sum, head, lse);
#pragma unroll
  for (int j = 0; j < kChunk; ++j) o[j] *= scale;
  T* out = out_row<T>(p, sequence.queries, t, head) + column * p.out.stride[3];
  if (column + kChunk <= p.cache.value_width && is_vector_row(out, p.out.stride[3])) {
    store_chunk(out, o, Cache::normal, Where::here());
  } else {
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (column + j < p.cache.value_width) store(out + j * p.out.stride[3], from_float<T>(o[j]));
  }
  if (p.lse && team.index == 0) store(lse_of(p, sequence.queries, t, head), lse);
}

// ---- Launches

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to; }

/// Whether heads of the cache can be copied 16 bytes at a time.
bool are_vectors(const Heads& t, int64_t width) {
  bool vectors = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && width * t.size % 16 == 0;
  for (int i = 0; i < 3; ++i) vectors = vectors && t.stride[i] * t.size % 16 == 0;
  return vectors;
}
/// Whether values are the first columns of keys.
bool are_in_keys(const KvCache& cache) {
  bool same = cache.v.data == cache.k.data && cache.value_width <= cache.width;
  for (int i = 0; i < 3; ++i) same = same && cache.v.stride[i] == cache.k.stride[i];
  return same;
}

Layout layout_of(const CachedAttentionParams& p) {
  const KvCache& c = p.cache;
  const int64_t vector = 16 / c.k.size;
  const auto pitch = [&](int64_t width) {
    return (up(width, kHalf) * kHalf / vector | 1) * vector;
  };
  const auto lanes = [&](int64_t width) {
    int n = 1;
    while (n < kWarp && n * vector < width) n *= 2;
    return n;
  };
  Layout l{};
  l.key_pitch = static_cast<int>(pitch(c.width));
  l.value_pitch = are_in_keys(c) ? 0 : static_cast<int>(pitch(c.value_width));
  l.key_lanes = lanes(c.width);
  l.value_lanes = lanes(c.value_width);
  l.vectors = are_vectors(c.k, c.width) && are_vectors(c.v, c.value_width);
  const bool is_float = p.q.dtype == DType::f32;
  const int warps = static_cast<int>(p.cut.row_tiles * p.cut.slices);
  const int rows = static_cast<int>(p.cut.row_tiles) * kRows, size = sizeof(float);
  l.query_pitch = static_cast<int>(up(c.width, 4) | 1) * 4;
  const int exchange = p.cut.slices > 1 ? warps * kExchange * size : 0;
  const int weights = is_float ? warps * kRowWeights * size : 0;
  const int queries = is_float ? rows * l.query_pitch * size : 0;
  l.stage_bytes = static_cast<int>(kTile * (l.key_pitch + l.value_pitch) * c.k.size);
  const int sums = p.cut.walks ? warps * kSums * size : 0;
  const int rest = exchange + weights + sums + queries;
  l.stages = 2 * l.stage_bytes + rest <= kTwoStages ? 2 : 1;
  l.exchange = l.stages * l.stage_bytes;
  l.weights = l.exchange + exchange;
  l.sums = l.weights + weights;
  l.queries = l.sums + sums;
  l.bytes = l.queries + queries;
  return l;
}

template <class T, class E>
void run(const CachedAttentionParams& p, Stream stream) {
  const Layout layout = layout_of(p);
  const int threads = static_cast<int>(p.cut.row_tiles * p.cut.slices) * kWarp;
  const Grid grid(p.cut.blocks, p.cut.walks ? 1 : p.cut.splits);
  LAUNCH((attention_kernel<T, E>), grid, threads, layout.bytes, stream, p, layout);
  if (p.cut.walks) return;
  const int64_t tokens = p.tokens.count * (p.tokens.cu_seqlens ? 1 : p.cache.batch);
  const int team = team_size<1>(p.cache.value_width);
  const int64_t per_block = kMergeThreads / team;
  LAUNCH(merge_kernel<T>, Grid(up(tokens * p.heads, per_block)), kMergeThreads, 0, stream, p, team);
}

template <class T>
void by_cache(const CachedAttentionParams& p, Stream stream) {
  if (p.cache.k.dtype == DType::i8) return run<T, int8_t>(p, stream);
  run<T, T>(p, stream);
}

}  // namespace

void cached_attention(const CachedAttentionParams& params, Stream stream) {
  CachedAttentionParams p = params;
  p.position_octaves = octaves_of(p.position_bias);
  if (p.q.dtype == DType::f32) return by_cache<float>(p, stream);
  if (p.q.dtype == DType::f16) return by_cache<f16>(p, stream);
  by_cache<bf16>(p, stream);
}

}  // namespace warpformer::cuda

#include "kv_cache/op.h"

#include "core/module.h"
#include "core/run.h"

namespace warpformer {
namespace {

using Optional = std::optional<Tensor>;

bool is_cache(const Tensor& t) {
  return t.ndim == 4 && (t.floating() || t.dtype == DType::i8) &&
         (t.stride[3] == 1 || t.dim(3) <= 1 || t.numel() == 0);
}
bool are_scales(const Tensor& t, const Tensor& cache) {
  return (t.dtype == DType::f32 || t.dtype == DType::bf16) && t.ndim == 3 &&
         t.dim(0) == cache.dim(0) && t.dim(1) == cache.dim(1) && t.dim(2) == cache.dim(2);
}
bool is_per_head(const Tensor& t, const Tensor& query) {
  return t.dtype == DType::f32 && t.ndim == 1 && t.dim(0) == query.dim(-2) && t.contiguous();
}

bool are_numbers(const Tensor& t) { return t.dtype == DType::i64 && t.ndim == 1 && t.contiguous(); }

/// Of [B, T, heads, width], or packed tokens, one batch of [N, heads, width].
Heads heads_of(const Tensor& t) {
  Heads h = heads(t);
  for (int i = 3; t.ndim == 3 && i >= 0; --i) h.stride[i] = i ? h.stride[i - 1] : 0;
  return h;
}
/// [B, T, heads, width], or where they are packed [N, heads, width].
bool are_tokens(const Tensor& t, const Optional& cu_seqlens) {
  return t.floating() && t.ndim == (cu_seqlens ? 3 : 4);
}
/// Whether x has the tokens of as many sequences as there are lengths.
bool are_split(const Tensor& x, const Optional& cu_seqlens, const Tensor& lengths) {
  if (!cu_seqlens) return x.dim(0) == lengths.dim(0);
  return cu_seqlens->dim(0) == lengths.dim(0) + 1 &&
         (runs_on_cpu(x) ? is_partition(*cu_seqlens, x.dim(0))
                         : cu_seqlens->dtype == DType::i32 && cu_seqlens->ndim == 1 &&
                               cu_seqlens->contiguous());
}
Tokens tokens_of(const Tensor& x, const Optional& cu_seqlens) {
  if (!cu_seqlens) return {x.dim(1)};
  return {x.dim(0), cu_seqlens->ptr<int32_t>()};
}

/// The cache, checked under the name of the op but for the values of lengths and block_table.
KvCache cache_of(const char* op, const Tensor& key_cache, const Tensor& value_cache,
                 const Tensor& lengths, const Optional& block_table, const Optional& key_scales,
                 const Optional& value_scales) {
  const auto require = [op](bool condition, const char* text, const char* names,
                            const auto&... values) {
    if (!condition) fail(op, text, names, values...);
  };
#define REQUIRE(condition, ...) require(condition, #condition, #__VA_ARGS__, __VA_ARGS__)
  REQUIRE(is_cache(key_cache) && is_cache(value_cache) && key_cache.dtype == value_cache.dtype,
          key_cache, value_cache);
  for (int i = 0; i < 3; ++i)
    REQUIRE(key_cache.dim(i) == value_cache.dim(i), key_cache, value_cache);
  REQUIRE(lengths.dtype == DType::i32 && lengths.ndim == 1 && lengths.contiguous(), lengths);
  const bool quantized = key_cache.dtype == DType::i8;
  REQUIRE(key_scales.has_value() == quantized && value_scales.has_value() == quantized, key_cache,
          key_scales, value_scales);
  if (quantized) {
    REQUIRE(are_scales(*key_scales, key_cache), key_scales, key_cache);
    REQUIRE(are_scales(*value_scales, value_cache), value_scales, value_cache);
  }
  if (block_table) {
    REQUIRE(block_table->dtype == DType::i32 && block_table->ndim == 2 &&
                block_table->dim(0) == lengths.dim(0) && block_table->contiguous(),
            block_table, lengths);
  } else {
    REQUIRE(lengths.dim(0) == key_cache.dim(0), lengths, key_cache);
  }
#undef REQUIRE
  KvCache cache{heads(key_cache), heads(value_cache)};
  if (quantized) {
    cache.k_scales = heads(*key_scales);
    cache.v_scales = heads(*value_scales);
  }
  cache.lengths = lengths.ptr<int32_t>();
  if (block_table) cache.block_table = block_table->ptr<int32_t>();
  cache.max_blocks = block_table ? block_table->dim(1) : 1;
  cache.block_size = key_cache.dim(1);
  cache.blocks = key_cache.dim(0);
  cache.batch = lengths.dim(0);
  cache.kv_heads = key_cache.dim(2);
  cache.width = key_cache.dim(3);
  cache.value_width = value_cache.dim(3);
  return cache;
}

/// Refuses lengths beyond the slots there are with the new tokens, and blocks that are not there.
void check_slots(const char* op, const KvCache& cache, const Tokens& tokens,
                 const Tensor& key_cache, const Tensor& lengths, const Optional& block_table) {
  if (!runs_on_cpu(lengths)) return;  // the kernel sees to it
  const int64_t slots = cache.max_blocks * cache.block_size;
  for (int64_t b = 0; b < cache.batch; ++b) {
    const int32_t* at = tokens.cu_seqlens;
    const int64_t length = cache.lengths[b], more = at ? at[b + 1] - at[b] : tokens.count;
    if (length < 0 || length + more > slots)
      fail(op, "0 <= length, length + tokens <= slots of a sequence",
           "length, tokens, lengths, key_cache, block_table", length, more, lengths, key_cache,
           block_table);
    if (!cache.block_table || cache.block_size == 0) continue;
    const int64_t used = (length + more + cache.block_size - 1) / cache.block_size;
    for (int64_t i = more ? length / cache.block_size : 0; i < used; ++i) {
      const int64_t block = cache.block_table[b * cache.max_blocks + i];
      if (block < 0 || block >= key_cache.dim(0))
        fail(op, "0 <= block < key_cache.dim(0)", "block, block_table, key_cache", block,
             block_table, key_cache);
    }
  }
}

Cut cut_of(const Tensor& query, const Tensor& value_cache, const Tensor& lengths,
           const Optional& block_table) {
  return Cut(lengths.dim(0), query.dim(-3), query.ndim == 3, query.dim(-2), value_cache.dim(2),
             query.dim(-1), value_cache.dim(3),
             value_cache.dim(1) * (block_table ? block_table->dim(1) : 1));
}

}  // namespace

/// Bytes of `work` that cached_attention needs on the device of its operands.
int64_t cached_attention_work(const Tensor& query, const Tensor& value_cache, const Tensor& lengths,
                              const Optional& block_table, int64_t) {
  const bool fits = (query.ndim == 3 || query.ndim == 4) && value_cache.ndim == 4 &&
                    lengths.ndim == 1 && value_cache.dim(2) > 0;
  if (runs_on_cpu(query) || !fits) return 0;  // what does not fit is told by the op itself
  return cut_of(query, value_cache, lengths, block_table).work;
}

void cached_attention(const Tensor& query, const Tensor& key_cache, const Tensor& value_cache,
                      const Tensor& lengths, const Optional& cu_seqlens_q,
                      const Optional& block_table, const Optional& key_scales,
                      const Optional& value_scales, const Optional& alibi_slopes,
                      const Optional& sinks, const Optional& position_bias, const Tensor& out,
                      const Optional& lse, const Optional& work, double scale, double softcap,
                      int64_t left, int64_t right, bool bidirectional, int64_t max_distance,
                      int64_t executor) {
  CHECK_TENSORS(query, key_cache, value_cache, lengths, cu_seqlens_q, block_table, key_scales,
                value_scales, alibi_slopes, sinks, position_bias, out, lse, work);
  const KvCache cache =
      cache_of(__func__, key_cache, value_cache, lengths, block_table, key_scales, value_scales);
  CHECK(are_tokens(query, cu_seqlens_q), query);
  CHECK(key_cache.dtype == DType::i8 || key_cache.dtype == query.dtype, key_cache, query);
  CHECK(query.dim(-1) == key_cache.dim(3), query, key_cache);
  CHECK(key_cache.dim(2) > 0 && query.dim(-2) % key_cache.dim(2) == 0, query, key_cache);
  CHECK(are_split(query, cu_seqlens_q, lengths), query, cu_seqlens_q, lengths);
  CHECK(out.dtype == query.dtype && out.ndim == query.ndim && out.dim(0) == query.dim(0) &&
            out.dim(1) == query.dim(1) && out.dim(-2) == query.dim(-2) &&
            out.dim(-1) == value_cache.dim(3),
        out, query, value_cache);
  if (lse)
    CHECK(lse->dtype == DType::f32 && lse->ndim == query.ndim - 1 &&
              lse->dim(-1) == query.dim(-3) && lse->dim(-2) == query.dim(-2) &&
              (cu_seqlens_q || lse->dim(0) == query.dim(0)) && lse->contiguous(),
          lse, query);
  if (alibi_slopes) CHECK(is_per_head(*alibi_slopes, query), alibi_slopes, query);
  if (sinks) CHECK(is_per_head(*sinks, query), sinks, query);
  CHECK(softcap >= 0.0, softcap);
  CHECK(left >= 0 && right >= 0, left, right);
  if (position_bias) {
    CHECK(position_bias->floating() && position_bias->ndim == 2 &&
              position_bias->dim(1) == query.dim(-2),
          position_bias, query);
    const int64_t buckets = position_bias->dim(0) / (bidirectional ? 2 : 1);
    CHECK(buckets >= 2 && max_distance > buckets / 2, position_bias, bidirectional, max_distance);
  }
  check_slots(__func__, cache, {0}, key_cache, lengths, block_table);
  if (query.dim(0) * query.dim(-3) * query.dim(-2) == 0) return;

  CachedAttentionParams p{cache, tokens_of(query, cu_seqlens_q), heads_of(query), heads_of(out)};
  if (lse) p.lse = lse->ptr<float>();
  if (alibi_slopes) p.slopes = alibi_slopes->ptr<float>();
  if (sinks) p.sinks = sinks->ptr<float>();
  if (position_bias) p.position_bias = {rows(*position_bias), bidirectional, max_distance};
  p.heads = query.dim(-2);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap);
  p.left = left;
  p.right = right;
  if (!runs_on_cpu(query)) {
    const int64_t most = Cut::kMaxWidth;
    CHECK(query.dim(-1) <= most && value_cache.dim(3) <= most, query, value_cache);
    p.cut = cut_of(query, value_cache, lengths, block_table);
    CHECK(p.cut.work == 0 ||
              (work && work->contiguous() && work->item_size() == 1 && work->numel() >= p.cut.work),
          work);
    p.work = work ? work->ptr<float>() : nullptr;
  }
  RUN_KERNEL(cached_attention, p, query, executor);
}

void append_to_cache_(const Tensor& key, const Tensor& value, const Tensor& key_cache,
                      const Tensor& value_cache, const Tensor& lengths, const Optional& cu_seqlens,
                      const Optional& block_table, const Optional& key_scales,
                      const Optional& value_scales, int64_t executor) {
  CHECK_TENSORS(key, value, key_cache, value_cache, lengths, cu_seqlens, block_table, key_scales,
                value_scales);
  const KvCache cache =
      cache_of(__func__, key_cache, value_cache, lengths, block_table, key_scales, value_scales);
  CHECK(are_tokens(key, cu_seqlens), key);
  CHECK(are_tokens(value, cu_seqlens), value);
  CHECK(key.dim(0) == value.dim(0) && key.dim(-3) == value.dim(-3), key, value);
  CHECK(key.dim(-2) == key_cache.dim(2) && key.dim(-1) == key_cache.dim(3), key, key_cache);
  CHECK(value.dim(-2) == value_cache.dim(2) && value.dim(-1) == value_cache.dim(3), value,
        value_cache);
  CHECK(are_split(key, cu_seqlens, lengths), key, cu_seqlens, lengths);
  if (key.dim(0) * key.dim(-3) == 0) return;
  const Tokens tokens = tokens_of(key, cu_seqlens);
  check_slots(__func__, cache, tokens, key_cache, lengths, block_table);
  const AppendParams p{cache, tokens, heads_of(key), heads_of(value)};
  RUN_KERNEL(append_to_cache_, p, key, executor);
}

void copy_blocks_(const Tensor& cache, const Tensor& old_blocks, const Tensor& new_blocks,
                  int64_t count, int64_t executor) {
  CHECK_TENSORS(cache, old_blocks, new_blocks);
  CHECK(cache.floating() || cache.dtype == DType::i8, cache);
  CHECK(cache.ndim >= 2 && cache.contiguous(), cache);
  CHECK(are_numbers(old_blocks), old_blocks);
  CHECK(are_numbers(new_blocks) && new_blocks.same_shape(old_blocks), new_blocks, old_blocks);
  CHECK(count >= 0 && count <= cache.dim(1), count, cache);
  for (const Tensor* blocks : {&old_blocks, &new_blocks})
    for (int64_t i = 0; i < blocks->dim(0) && runs_on_cpu(cache); ++i) {
      const int64_t block = blocks->ptr<int64_t>()[i];
      CHECK(block >= 0 && block < cache.dim(0), block, cache);
    }
  if (cache.numel() == 0) return;
  const int64_t size = cache.numel() / cache.dim(0) * cache.item_size();
  const CopyBlocksParams p{cache.ptr<char>(),
                           size,
                           size / cache.dim(1) * count,
                           cache.dim(0),
                           old_blocks.ptr<int64_t>(),
                           new_blocks.ptr<int64_t>(),
                           old_blocks.dim(0)};
  RUN_KERNEL(copy_blocks_, p, cache, executor);
}

/// positions, [B, T] or packed [N]: the slots that append_to_cache_ writes to.
void append_positions(const Tensor& lengths, const Optional& cu_seqlens, const Tensor& positions,
                      int64_t executor) {
  constexpr const char* op = "append_to_cache_";
  CHECK_TENSORS(lengths, cu_seqlens, positions);
  CHECK_FOR(op, lengths.dtype == DType::i32 && lengths.ndim == 1 && lengths.contiguous(), lengths);
  CHECK_FOR(op,
            positions.dtype == DType::i32 && positions.ndim == (cu_seqlens ? 1 : 2) &&
                positions.contiguous(),
            positions);
  CHECK_FOR(op, are_split(positions, cu_seqlens, lengths), positions, cu_seqlens, lengths);
  if (positions.numel() == 0) return;
  const AppendPositionsParams p{tokens_of(positions, cu_seqlens), lengths.ptr<int32_t>(),
                                lengths.dim(0), positions.ptr<int32_t>()};
  RUN_KERNEL(append_positions, p, lengths, executor);
}

void bind_kv_cache(py::module_& m) {
  m.def("cached_attention", op(&cached_attention), py::arg("query"), py::arg("key_cache"),
        py::arg("value_cache"), py::arg("lengths"), py::arg("cu_seqlens_q"), py::arg("block_table"),
        py::arg("key_scales"), py::arg("value_scales"), py::arg("alibi_slopes"), py::arg("sinks"),
        py::arg("position_bias"), py::arg("out"), py::arg("lse"), py::arg("work"), py::arg("scale"),
        py::arg("softcap"), py::arg("left"), py::arg("right"), py::arg("position_bidirectional"),
        py::arg("position_max_distance"), py::arg("executor"), nogil());
  m.def("append_to_cache_", op(&append_to_cache_), py::arg("key"), py::arg("value"),
        py::arg("key_cache"), py::arg("value_cache"), py::arg("lengths"), py::arg("cu_seqlens"),
        py::arg("block_table"), py::arg("key_scales"), py::arg("value_scales"), py::arg("executor"),
        nogil());
  m.def("copy_blocks_", op(&copy_blocks_), py::arg("cache"), py::arg("old_blocks"),
        py::arg("new_blocks"), py::arg("count"), py::arg("executor"), nogil());
  m.def("append_positions", op(&append_positions), py::arg("lengths"), py::arg("cu_seqlens"),
        py::arg("positions"), py::arg("executor"), nogil());
  m.def("cached_attention_work", &cached_attention_work, py::arg("query"), py::arg("value_cache"),
        py::arg("lengths"), py::arg("block_table"), py::arg("executor"), nogil());
}

}  // namespace warpformer

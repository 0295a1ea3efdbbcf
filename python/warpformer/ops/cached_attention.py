import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_flags
from warpformer.ops._library import dispatch, empty, executor, is_direct, register
from warpformer.ops.scaled_dot_product_attention import default_scale, sides


def cached_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    block_table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_bidirectional: bool = True,
    position_max_distance: int = 128,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last T tokens of each sequence to a key/value cache: a step of decoding.

        s[t, j] = scale query[t] key[j], with a softcap c: c tanh(s / c)
        s[t, j] = s[t, j] - alibi_slopes |t + n - T - j| + position_bias[bucket(j - t - n + T)]
        out = softmax(s) value          lse = log sum exp s

    over the first n = lengths[b] slots of sequence b, the T of the queries included. T is one for all, or
    with `cu_seqlens_q` each sequence has its own: decoding, chunks of a prompt and the verification of
    drafted tokens are one call.

    Args:
        query: [B, T, H, D], float32, bfloat16 or float16, any strides; with `cu_seqlens_q` [N, H, D].
        key_cache: [B, S, G, D], of which the last dimension has stride 1, in the dtype of `query` or
            int8; G divides H, and query head h reads head h // (H / G). Paged: [blocks, block_size, G, D].
        value_cache: [B, S, G, Dv], paged [blocks, block_size, G, Dv].
        lengths: [B] int32, contiguous: slots in use.
        cu_seqlens_q: [B + 1] int32: the queries of all sequences one after the other, those of sequence b
            from cu_seqlens_q[b] to cu_seqlens_q[b + 1] - 1; there may be none.
        block_table: [B, max_blocks] int32, contiguous: slot j is slot j % block_size of block
            block_table[b, j // block_size]. Entries beyond the length are not read.
        key_scales, value_scales: of int8 caches, [B, S, G] float32 or bfloat16, paged [blocks, block_size,
            G]: what the int8 of a slot and head are multiples of, as `append_to_cache_` writes it.
        is_causal: query t sees slots up to its own, t + n - T.
        scale: 1 / sqrt(D) if None.
        window: (left, right): query t sees slots t + n - T - left to t + n - T + right; None: no limit.
        softcap: c; 0 for none.
        alibi_slopes: [H] float32, contiguous.
        sinks: [H] float32, contiguous: logits of a key of value 0 that every query of the head sees.
        position_bias: [buckets, H], a float: T5's table of biases by relative position. A bucket is one
            distance for the nearer half of the buckets; the others become logarithmically wider, up to
            `position_max_distance` and all beyond.
        position_bidirectional: half of the buckets are for slots before the query's, half for those after
            it; if False (T5's decoder) all are for those before, and those after share bucket 0.
        return_lse: also return lse.

    Returns:
        [B, T, H, Dv] in the dtype of `query`, packed [N, H, Dv]; with `return_lse` also lse, float32
        [B, H, T], packed [H, N]. A query that sees no slot gives 0 and lse -inf, and what a query does not
        see never reaches it, NaN included.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on a GPU D or Dv exceeds 640; on the CPU a length
            exceeds the slots, a block is not there, cu_seqlens_q does not rise from 0 to N. On a GPU, where
            the host does not read them, a sequence whose length or blocks are not there gives NaN.
        TypeError: an argument is not a tensor.

    int8 is attended as it is: no copy of the cache in another dtype is made. Sums are float32; slots are
    split every 256, and the parts merged in order: a sequence gives the same bits alone and in any batch,
    paged or not, packed or not. Products with a bfloat16 cache are of bfloat16 where the CPU has instructions
    for it (the weights are then rounded to bfloat16), of float32 elsewhere; on a GPU those of bfloat16 and
    float16 queries are of their dtype. Nothing waits for the GPU, and a CUDA graph can hold the call, which
    reads lengths and blocks when it runs. Many query heads may share a head that is both key and value,
    `value_cache` being `key_cache[..., :Dv]` (DeepSeek's latent attention): the
    cache is then read once for every 64 of them (on a GPU, 16). Forward only.

    Source: Dao et al., "Flash-Decoding for long-context inference"; Kwon et al., "Efficient Memory
    Management for Large Language Model Serving with PagedAttention"; Raffel et al., "Exploring the Limits of
    Transfer Learning with a Unified Text-to-Text Transformer".
    """
    check_flags("cached_attention", is_causal=is_causal, return_lse=return_lse)
    tensors = (query, key_cache, value_cache, lengths, cu_seqlens_q, block_table, key_scales, value_scales)
    per_head = (alibi_slopes, sinks, position_bias)
    direct = is_direct(*tensors[:4], optional=(*tensors[4:], *per_head))
    scale = default_scale(query) if scale is None else scale
    seen = sides("cached_attention", window, is_causal)
    options = (scale, softcap, *seen, position_bidirectional, position_max_distance)
    if direct:
        out, lse = _forward(*tensors, *per_head, *options, return_lse)
    else:
        out, lse = dispatch("cached_attention", *tensors, *per_head, *options, True)
    return (out, lse) if return_lse else out


def _forward(query, key_cache, value_cache, lengths, cu_seqlens_q, *rest):
    *rest, return_lse = rest
    operands, options = rest[:-6], rest[-6:]
    out, lse = _empty_results(query, value_cache, cu_seqlens_q is not None, return_lse)
    runner = executor(query)
    size = _C.cached_attention_work(query, value_cache, lengths, operands[0], runner)
    work = empty(size, query, torch.uint8) if size else None
    _C.cached_attention(
        *(query, key_cache, value_cache, lengths, cu_seqlens_q, *operands, out, lse, work),
        *(*options, runner),
    )
    return out, lse


def _empty_results(query, value_cache, packed, return_lse=True):
    if query.ndim != (3 if packed else 4):
        form = "[N, H, D]" if packed else "[B, T, H, D]"
        raise _C.InputError(f"cached_attention: query = {list(query.shape)} is not {form}")
    *batch, queries, heads, _ = query.shape
    out = empty((*query.shape[:-1], *value_cache.shape[-1:]), query)
    return out, empty((*batch, heads, queries), query, torch.float32) if return_lse else None


register(
    "cached_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor lengths, "
    "Tensor? cu_seqlens_q, Tensor? block_table, Tensor? key_scales, Tensor? value_scales, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? position_bias, float scale, float softcap, int left, "
    "int right, bool position_bidirectional, int position_max_distance, bool return_lse) -> (Tensor, Tensor)",
    _forward,
    lambda query, key_cache, value_cache, lengths, cu_seqlens_q, *rest: _empty_results(
        query, value_cache, cu_seqlens_q is not None
    ),
)

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import dispatch, empty, executor, is_direct, register


def append_to_cache_(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    lengths: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    block_table: Tensor | None = None,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
    query: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> Tensor | None:
    """Writes the keys and values of new tokens behind those that a cache holds, in place.

        key_cache[b, lengths[b] + t] = key[b, t]          value_cache[b, lengths[b] + t] = value[b, t]

    for T new tokens of each sequence b, or as many as `cu_seqlens` gives it.

    With `cos` and `sin`, keys (and `query`) are first rotated by the angles of positions lengths[b] + t,
    as `rope` does. Into int8 caches goes round(x / scale), with scale = max |x| / 127 of each token and head,
    rounded to the dtype of the scales.

    Args:
        key: [B, T, G, D], float32, bfloat16 or float16, any strides; with `cu_seqlens` [N, G, D].
        value: [B, T, G, Dv], packed [N, G, Dv].
        key_cache, value_cache, lengths, block_table, key_scales, value_scales: as `cached_attention` has
            them; lengths, which stay as they are, count the slots in use before the call. Floating caches
            may have another dtype than what is written.
        cu_seqlens: [B + 1] int32: the tokens of all sequences one after the other, those of sequence b from
            cu_seqlens[b] to cu_seqlens[b + 1] - 1; there may be none.
        query: [B, T, H, D], packed [N, H, D], to be rotated.
        cos, sin: [P, R/2] float32, as `rope` takes them.
        interleaved: the interleaved form of `rope`, not the half form.

    Returns:
        The rotated query, the shape and dtype of `query`; None without `query`.

    Raises:
        InputError: shapes, dtypes or devices do not fit; on the CPU a slot, a block or a row of the tables is
            not there, or cu_seqlens does not rise from 0 to N. Nothing is written then. On a GPU, where the
            host does not read them, a token without a slot is left out.
        TypeError: an argument is not a tensor.

    An op of torch.library that mutates the caches and scales; it has no gradient. Source:
    flash_attn_with_kvcache of the flash-attention package.
    """
    tensors = (key, value, key_cache, value_cache, lengths)
    optional = (cu_seqlens, block_table, key_scales, value_scales, query, cos, sin)
    if is_direct(*tensors, optional=optional):
        return _append(*tensors, *optional, interleaved)
    rotated = dispatch("append_to_cache_", *tensors, *optional, interleaved)
    return rotated if query is not None else None


def _append(key, value, key_cache, value_cache, lengths, cu_seqlens, block_table, *rest):
    *scales, query, cos, sin, interleaved = rest
    if (cos is None) != (sin is None) or (query is not None and cos is None):
        raise _C.InputError("append_to_cache_: cos and sin come together, and with query")
    rotated = None if query is None else empty(query.shape, query)
    if cos is not None and key.ndim == (4 if cu_seqlens is None else 3):
        # Rounded once: to the dtype of the cache, or from float32 to int8.
        dtype = torch.float32 if key_cache.dtype == torch.int8 else key_cache.dtype
        key, unrotated = empty(key.shape, key, dtype), key
        positions = empty(key.shape[:-2], lengths, torch.int32)
        _C.append_positions(lengths, cu_seqlens, positions, executor(unrotated))
        x, out = (
            ((query, unrotated), (rotated, key)) if query is not None else ((unrotated, None), (key, None))
        )
        _C.rope(*x, cos, sin, positions, interleaved, False, *out, executor(unrotated))
    _C.append_to_cache_(
        *(key, value, key_cache, value_cache, lengths, cu_seqlens, block_table, *scales), executor(key)
    )
    return rotated


def _append_op(key, *rest):
    """Empty where there is no query: an op of torch.library cannot return None."""
    rotated = _append(key, *rest)
    return key.new_empty(0) if rotated is None else rotated


register(
    "append_to_cache_(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor lengths, Tensor? cu_seqlens, Tensor? block_table, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales, Tensor? query, Tensor? cos, Tensor? sin, bool interleaved) -> Tensor",
    _append_op,
    lambda key, *rest: key.new_empty(0) if rest[-4] is None else empty(rest[-4].shape, rest[-4]),
)

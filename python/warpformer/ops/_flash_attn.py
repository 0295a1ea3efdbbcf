"""The functions of the flash-attention package, by its argument names: code written for it runs as it is."""

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_flags, check_integer, check_pair
from warpformer.ops._library import is_direct
from warpformer.ops.append_to_cache_ import append_to_cache_
from warpformer.ops.cached_attention import cached_attention
from warpformer.ops.scaled_dot_product_attention import scaled_dot_product_attention


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """`flash_attn.flash_attn_func`, by way of `scaled_dot_product_attention`.

    Args:
        q: [B, T, H, D], float32, bfloat16 or float16.
        k, v: [B, S, G, D] and [B, S, G, Dv], G a divisor of H.
        dropout_p: the probability of 0 for a weight, drawn by torch's generator.
        softmax_scale: 1 / sqrt(D) if None.
        causal: query i sees keys up to i + S - T (the last query is at the last key).
        window_size: (left, right) of that key; -1 is no limit.
        softcap: 0 is none.
        alibi_slopes: [H] float32.
        deterministic: always so.
        return_attn_probs: only False; `scaled_dot_product_attention` returns the log-sum-exp.

    Returns:
        [B, T, H, Dv].

    Raises:
        InputError: what `scaled_dot_product_attention` refuses, return_attn_probs, and slopes of a shape
            other than [H].

    Source: the flash-attention package.
    """
    name = "flash_attn_func"
    is_direct(q, k, v)  # refuses what is no tensor
    _check_dims(name, "[B, T, H, D]", q=q, k=k, v=v)
    _refuse_probs(name, return_attn_probs)
    out = scaled_dot_product_attention(
        *(t.transpose(-3, -2) for t in (q, k, v)),
        dropout_p=dropout_p,
        enable_gqa=True,
        alignment="bottom-right",
        **_options(name, softmax_scale, causal, window_size, softcap, alibi_slopes),
    )
    return out.transpose(-3, -2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func`, by way of `scaled_dot_product_attention`.

    Args:
        q: [Tq, H, D], the sequences one after the other.
        k, v: [Tk, G, D] and [Tk, G, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [sequences + 1], where each begins, and the total.
        max_seqlen_q, max_seqlen_k: not needed.
        block_table: only None; `cached_attention` reads paged caches.
        dropout_p, softmax_scale, causal, window_size, softcap: as `flash_attn_func` has them.
        alibi_slopes, deterministic, return_attn_probs: these, too.

    Returns:
        [Tq, H, Dv].

    Raises:
        InputError: as `flash_attn_func`; a block_table.

    Source: the flash-attention package.
    """
    name = "flash_attn_varlen_func"
    _refuse_probs(name, return_attn_probs)
    if block_table is not None:
        raise _C.InputError(f"{name}: block_table is not None: cached_attention takes it")
    return scaled_dot_product_attention(
        *(q, k, v),
        dropout_p=dropout_p,
        enable_gqa=True,
        alignment="bottom-right",
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        **_options(name, softmax_scale, causal, window_size, softcap, alibi_slopes),
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn.flash_attn_with_kvcache`, by way of `append_to_cache_` and `cached_attention`.

    Args:
        q: [B, T, H, D].
        k_cache, v_cache: [B, S, G, D] and [B, S, G, Dv], paged [blocks, block_size, G, ...].
        k, v: [B, T, G, D] and [B, T, G, Dv], appended to the caches first.
        rotary_cos, rotary_sin: [P, R/2], made float32: rotate q and k; only with k.
        cache_seqlens: slots in use before k and v are appended: int32 [B] or a number; all of them if None.
        cache_batch_idx: [B] int32, the row of the caches that each sequence has; not with a block_table.
        block_table: [B, max_blocks] int32.
        causal: query t sees slots up to its own, the last query being at the last slot.
        rotary_interleaved: pairs of the rotation are neighbours, not halves.
        softmax_scale, window_size, softcap, alibi_slopes: as `flash_attn_func` has them.
        return_softmax_lse: also return the log-sum-exp.

    Returns:
        [B, T, H, Dv]; with `return_softmax_lse` also [B, H, T] float32.

    Raises:
        InputError: what the two ops refuse; cache_batch_idx beside a block_table; one of k and v, or a
            rotation without them.

    Source: the flash-attention package.
    """
    name = "flash_attn_with_kvcache"
    lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    optional = (k, v, rotary_cos, rotary_sin, lengths, cache_batch_idx, block_table)
    is_direct(q, k_cache, v_cache, optional=optional)
    _check_dims(name, "[B, T, H, D]", q=q, k=k, v=v)
    _check_dims(name, "[B, S, G, D]", k_cache=k_cache, v_cache=v_cache)
    _check_dims(name, "[B]", cache_batch_idx=cache_batch_idx)
    _check_dims(name, "[B, max_blocks]", block_table=block_table)
    if cache_batch_idx is not None and block_table is not None:
        raise _C.InputError(f"{name}: cache_batch_idx and block_table exclude each other")
    if (k is None) != (v is None) or (rotary_cos is None) != (rotary_sin is None):
        raise _C.InputError(f"{name}: k and v come together, and so do rotary_cos and rotary_sin")
    if rotary_cos is not None and k is None:
        raise _C.InputError(f"{name}: rotary_cos without k: rotate q with warpformer.ops.rope")
    if cache_batch_idx is not None:  # a paged cache, of one block for each sequence
        block_table = cache_batch_idx.int()[:, None]
    slots = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    if cache_seqlens is None:
        cache_seqlens = slots if k is None else slots - k.shape[1]
    if lengths is None:
        check_integer(name, "cache_seqlens", cache_seqlens)
        if not 0 <= cache_seqlens <= slots:
            raise _C.InputError(f"{name}: cache_seqlens = {cache_seqlens} is not among {slots} slots")
        cache_seqlens = torch.full(q.shape[:1], cache_seqlens, dtype=torch.int32, device=q.device)
    if k is not None:
        for t in (rotary_cos, rotary_sin):
            if t is not None and not t.is_floating_point():
                raise _C.InputError(f"{name}: a table of rotary is no float: {t.dtype}{list(t.shape)}")
        tables = [None if t is None else t.float().contiguous() for t in (rotary_cos, rotary_sin)]
        rotated = append_to_cache_(
            *(k, v, k_cache, v_cache, cache_seqlens),
            block_table=block_table,
            query=None if rotary_cos is None else q,
            cos=tables[0],
            sin=tables[1],
            interleaved=rotary_interleaved,
        )
        q = q if rotated is None else rotated
        cache_seqlens = cache_seqlens + k.shape[1]
    return cached_attention(
        *(q, k_cache, v_cache, cache_seqlens),
        block_table=block_table,
        return_lse=return_softmax_lse,
        **_options(name, softmax_scale, causal, window_size, softcap, alibi_slopes),
    )


def _check_dims(name, form, **tensors):
    for argument, t in tensors.items():
        if t is not None and t.ndim != form.count(",") + 1:
            raise _C.InputError(f"{name}: {argument} = {list(t.shape)} is not {form}")


def _refuse_probs(name, return_attn_probs):
    check_flags(name, return_attn_probs=return_attn_probs)
    if return_attn_probs:
        raise _C.InputError(
            f"{name}: return_attn_probs is True: scaled_dot_product_attention(return_lse=True) returns lse"
        )


def _options(name, softmax_scale, causal, window_size, softcap, alibi_slopes):
    check_flags(name, causal=causal)
    left, right = (None if side < 0 else side for side in check_pair(name, "window_size", window_size))
    return {
        "scale": softmax_scale,
        "is_causal": causal,
        "window": (left, right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }

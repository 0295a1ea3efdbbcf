import math

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._library import empty, executor, is_direct, register
from warpformer.ops.softmax import expand


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """Attention of every query to the keys of its sequence.

        out = softmax(scale query key^T + attn_mask) value

    Args:
        query: [..., H, T, D], float32, bfloat16 or float16, any strides.
        key: [..., G, S, D]; G = H, or with `enable_gqa` a divisor of H.
        value: [..., G, S, Dv].
        attn_mask: broadcastable to [..., H, T, S]; bool (True = keep) or additive float. Key padding
            is a [B, 1, 1, S] bool mask.
        is_causal: query i sees keys 0..i (aligned top-left, as torch has it).
        scale: 1 / sqrt(D) if None.
        enable_gqa: query head h reads key/value head h // (H / G); nothing is repeated in memory.
        cu_seqlens_q, cu_seqlens_k: packed sequences without padding: query is [Tq, H, D], key and value
            [Tk, G, D], the sequences one after the other; both tensors are int32 [sequences + 1], where
            each begins, and the total.

    Returns:
        The shape of `query` with Dv in place of D, in its dtype. A query that sees no key gives 0, and
        what a query does not see never reaches it, NaN included.

    Raises:
        InputError: shapes, dtypes or devices do not fit; cu_seqlens does not rise from 0 to the total.
        TypeError: an argument is not a tensor.

    Scores and sums are float32, over blocks of 256 keys: a sequence gives the same bits alone and in any
    batch. Source: torch.nn.functional.scaled_dot_product_attention; Dao et al., "FlashAttention".
    """
    args = (query, key, value, attn_mask, is_causal, scale, enable_gqa, cu_seqlens_q, cu_seqlens_k)
    if is_direct(query, key, value, optional=(attn_mask, cu_seqlens_q, cu_seqlens_k)):
        return _attention(*args)
    return torch.ops.warpformer.scaled_dot_product_attention(*args)


def _attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, cu_seqlens_q, cu_seqlens_k):
    if scale is None:
        scale = 1 / math.sqrt(query.shape[-1]) if query.ndim and query.shape[-1] else 1.0
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if not packed:
        query, key, value = _broadcast_batches(query, key, value)
    out = _empty_attention(query, value)
    # The kernel takes [B, H, T, D] with any strides: packed sequences are one batch of that form.
    q, k, v, o = (
        t.transpose(0, 1)[None] if packed and t.ndim == 3 else _four_dims(t) for t in (query, key, value, out)
    )
    if not enable_gqa and q.ndim == k.ndim == 4 and q.shape[1] != k.shape[1]:
        raise _C.InputError(
            f"scaled_dot_product_attention: query.shape = {list(query.shape)} and key.shape = "
            f"{list(key.shape)} differ in heads: enable_gqa=True shares key heads"
        )
    if attn_mask is not None:
        attn_mask = _four_dims(expand(attn_mask, (*query.shape[:-1], key.shape[-2])))
    _C.scaled_dot_product_attention(
        q, k, v, attn_mask, cu_seqlens_q, cu_seqlens_k, o, scale, is_causal, executor(query)
    )
    return out


def _broadcast_batches(*tensors):
    """The dimensions before the last three broadcast, as torch has it; the op refuses those that do not."""
    if min(t.ndim for t in tensors) < 3:
        return tensors
    try:
        batch = torch.broadcast_shapes(*(t.shape[:-3] for t in tensors))
    except RuntimeError:
        return tensors
    return [t.expand(*batch, *t.shape[-3:]) for t in tensors]


def _four_dims(t):
    if t.ndim in (2, 3):
        return t[(None,) * (4 - t.ndim)]
    return t.flatten(0, -4) if t.ndim > 4 else t


def _empty_attention(query, value):
    return empty((*query.shape[:-1], *value.shape[-1:]), query)


register(
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, "
    "bool is_causal, float? scale, bool enable_gqa, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k) -> Tensor",
    _attention,
    lambda query, key, value, *rest: _empty_attention(*_broadcast_batches(query, value)),
)

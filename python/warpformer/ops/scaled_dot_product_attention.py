import math

import torch
from torch import Tensor

from warpformer import _C
from warpformer.ops._arguments import check_flags, check_number, check_pair
from warpformer.ops._library import autocast_dtype, dispatch, empty, executor, is_direct, register
from warpformer.ops.dropout import seed_tensor
from warpformer.ops.softmax import expand

_NAME = "scaled_dot_product_attention"
_EVERY_KEY = 1 << 40
_ALIGNMENTS = ("top-left", "bottom-right")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    alignment: str = "top-left",
    window: tuple[int | None, int | None] = (None, None),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_bidirectional: bool = True,
    position_max_distance: int = 128,
    seed: int | Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query to the keys of its sequence.

        s = scale query key^T, with a softcap c: c tanh(s / c)
        s = s + attn_mask - alibi_slopes |i + shift - j| + position_bias[bucket(j - i - shift)]
        out = dropout(softmax(s)) value          lse = log sum exp s

    Args:
        query: [..., H, T, D], float32, bfloat16 or float16, any strides.
        key: [..., G, S, D]; G = H, or with `enable_gqa` a divisor of H.
        value: [..., G, S, Dv].
        attn_mask: broadcastable to [..., H, T, S]; bool (True = keep) or additive float. Key padding
            is a [B, 1, 1, S] bool mask.
        dropout_p: the probability of 0 for a weight; the others are divided by 1 - dropout_p.
        is_causal: query i sees keys up to i + shift.
        scale: 1 / sqrt(D) if None.
        enable_gqa: query head h reads key/value head h // (H / G); nothing is repeated in memory.
        alignment: shift is 0 for "top-left" (torch's causal mask) and S - T for "bottom-right" (the last
            query is at the last key, as in decoding); per sequence where these are packed.
        window: (left, right): query i sees keys i + shift - left to i + shift + right; None: no limit.
        softcap: c; 0 for none.
        alibi_slopes: [H] float32.
        sinks: [H] float32: logits of a key of value 0 that every query of the head sees.
        position_bias: [buckets, H], a float: T5's table of biases by relative position. A bucket is one
            distance for the nearer half of the buckets; the others become logarithmically wider, up to
            `position_max_distance` and all beyond. No [T, S] matrix is made.
        position_bidirectional: half of the buckets are for keys before the query, half for those after it;
            if False (T5's decoder) all are for those before, and those after share bucket 0.
        seed: of the dropout, as ops.dropout takes it.
        cu_seqlens_q, cu_seqlens_k: packed sequences without padding: query is [Tq, H, D], key and value
            [Tk, G, D], the sequences one after the other; both tensors are int32 [sequences + 1], where
            each begins, and the total.
        return_lse: also return lse.

    Returns:
        The shape of `query` with Dv in place of D, in its dtype; with `return_lse` also lse, float32,
        [..., H, T] (packed: [H, Tq]). A query that sees no key gives 0 and lse -inf, and what a query does
        not see never reaches it, NaN included; forward and backward. In memory dimensions have the order of
        those of `query`: heads inside of tokens stay there, where the next layer joins them. Under
        torch.autocast query, key and value are rounded to its dtype.

    Raises:
        InputError: shapes, dtypes or devices do not fit; cu_seqlens does not rise from 0 to the total.
        TypeError: an argument is not a tensor.

    Gradients reach query, key, value, a float attn_mask, sinks and position_bias. Scores and sums are
    float32, over blocks of 256 keys: a sequence gives the same bits alone and in any batch. Products of
    bfloat16 operands are of bfloat16 where the CPU has instructions for it (the weights are then rounded to
    bfloat16), of float32 elsewhere. A dropout's weight of query i and key j is drawn by word j % 4 of counter
    (j / 4, i, head, sequence) of Philox4x32-10, positions counted within the sequence and sequences within
    the batch; backward draws it again.

    Source: torch.nn.functional.scaled_dot_product_attention; Dao et al., "FlashAttention"; Press et al.,
    "Train Short, Test Long"; Xiao et al., "Efficient Streaming Language Models with Attention Sinks";
    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer".
    """
    check_flags(_NAME, is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse)
    check_number(_NAME, "dropout_p", dropout_p)
    if not isinstance(alignment, str) or alignment not in _ALIGNMENTS:
        raise _C.InputError(f"{_NAME}: alignment = {alignment!r} is none of {_ALIGNMENTS}")
    if (dtype := autocast_dtype(query)) is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    seed = seed_tensor(seed, query, _NAME) if dropout_p else None
    tensors = (
        *(query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k),
        *(alibi_slopes, sinks, position_bias, seed),
    )
    direct = is_direct(query, key, value, optional=tensors[3:])
    options = (
        default_scale(query) if scale is None else scale,
        softcap,
        enable_gqa,
        alignment == "bottom-right",
        *sides(_NAME, window, is_causal),
        position_bidirectional,
        position_max_distance,
        dropout_p,
    )
    if direct:
        out, lse = _forward(*tensors, *options, return_lse)
    else:
        out, lse = dispatch("scaled_dot_product_attention", *tensors, *options, True)
    return (out, lse) if return_lse else out


def default_scale(query):
    return 1 / math.sqrt(query.shape[-1]) if query.ndim and query.shape[-1] else 1.0


def sides(op, window, is_causal):
    """How many keys a query sees before and after its own."""
    check_pair(op, "window", window, optional=True)
    left, right = (_EVERY_KEY if side is None else side for side in window)
    return left, min(0, right) if is_causal else right


def _forward(query, key, value, attn_mask, starts_q, starts_k, *rest):
    *per_head, scale, softcap, enable_gqa = rest[:7]
    *places, return_lse = rest[7:]
    packed = starts_q is not None or starts_k is not None
    if not packed:
        query, key, value = _broadcast_batches(query, key, value)
    out = _empty_attention(query, value)
    q, k, v, o = (_heads(t, packed) for t in (query, key, value, out))
    lse = empty(o.shape[:3], o, torch.float32) if return_lse else None
    if not enable_gqa and q.ndim == k.ndim == 4 and q.shape[1] != k.shape[1]:
        raise _C.InputError(
            f"{_NAME}: query.shape = {list(query.shape)} and key.shape = "
            f"{list(key.shape)} differ in heads: enable_gqa=True shares key heads"
        )
    mask = attn_mask
    if mask is not None:  # expanded where there are keys; the op refuses a key without
        mask = _four_dims(expand(mask, (*query.shape[:-1], *key.shape[-2:-1])))
    *per_head, seed = per_head
    biases = _biases_by_distance(per_head[-1], q, k, places[4])
    _C.scaled_dot_product_attention(
        *(q, k, v, mask, starts_q, starts_k, *per_head, biases, seed, o, lse),
        *(scale, softcap, *places, executor(query)),
    )
    return out, None if lse is None else lse.view(_lse_shape(query, packed))


def _backward(query, key, value, attn_mask, starts_q, starts_k, slopes, sinks, position_bias, seed, *rest):
    scale, softcap, _, *places, out, lse, dout, dlse, mask_gradient, position_gradient = rest
    packed = starts_q is not None
    shapes = [query.shape, key.shape, value.shape]
    if not packed:
        query, key, value = _broadcast_batches(query, key, value)
    q, k, v, o, do = (_heads(t, packed) for t in (query, key, value, out, dout))
    dq, delta = empty(q.shape, q, torch.float32), empty(q.shape[:3], q, torch.float32)
    dk, dv = empty(k.shape, k), empty(v.shape, v)
    mask = dmask = None
    if attn_mask is not None:
        full = (*query.shape[:-1], key.shape[-2])
        mask = _four_dims(expand(attn_mask, full))
        if mask_gradient:
            dmask = torch.zeros(mask.shape, dtype=torch.float32, device=q.device)
    dposition = parts = None
    if position_gradient:
        tiles = q.shape[2] // 64 + (starts_q.shape[0] if packed else 1)  # with which a GPU cuts its sums
        parts = torch.zeros(
            (q.shape[0] * q.shape[1] * tiles, position_bias.shape[0]), dtype=torch.float32, device=q.device
        )
        dposition = torch.zeros(position_bias.shape, dtype=torch.float32, device=q.device)
    _C.scaled_dot_product_attention_backward(
        *(q, k, v, mask, starts_q, starts_k, slopes, sinks, position_bias),
        *(_biases_by_distance(position_bias, q, k, places[4]), seed, o, lse.view(q.shape[:3])),
        *(scale, softcap, *places, do),
        None if dlse is None else dlse.reshape(q.shape[:3]),
        *(dq, dk, dv, dmask, delta, dposition, parts, executor(query)),
    )
    if packed:
        dq, dk, dv = (t[0].transpose(0, 1) for t in (dq, dk, dv))
    gradients = [
        t.view(like.shape).sum_to_size(shape) if not packed else t
        for t, like, shape in zip((dq, dk, dv), (query, key, value), shapes, strict=True)
    ]
    gradients = [
        t.to(like.dtype).contiguous() for t, like in zip(gradients, (query, key, value), strict=True)
    ]
    if dmask is not None:
        dmask = dmask.view(full).sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    dsinks = None
    if sinks is not None:  # the sink's own weight, whose value is 0
        weight = torch.where(lse.isneginf(), 0.0, (sinks[:, None] - lse).exp())
        dsinks = -(weight * delta.view(lse.shape)).transpose(-1, -2).sum_to_size(sinks.shape)
    if dposition is not None:
        dposition = dposition.to(position_bias.dtype)
    return (*gradients, dmask, dsinks, dposition)


def _biases_by_distance(position_bias, q, k, max_distance):
    """Room for [H, distances], which a GPU fills from the table: none is farther than the keys are."""
    if position_bias is None or q.ndim != 4 or k.ndim != 4 or not isinstance(max_distance, int):
        return None
    reach = max(0, min(max_distance, q.shape[2] + k.shape[2]))
    return empty((q.shape[1], 2 * reach + 1), q, torch.int32)  # words of floats


def _heads(t, packed):
    """[B, H, T, D] with any strides, as the kernel takes it: packed sequences are one batch of that form."""
    return t.transpose(0, 1)[None] if packed and t.ndim == 3 else _four_dims(t)


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
    shape = (*query.shape[:-1], *value.shape[-1:])
    if query.ndim not in (3, 4) or 0 in query.stride():
        return empty(shape, query)
    outer = range(query.ndim - 1)
    order = sorted(outer, key=lambda d: -query.stride(d))
    out = empty((*(shape[d] for d in order), shape[-1]), query)
    return out.permute(*(order.index(d) for d in outer), -1)


def _lse_shape(query, packed):
    return query.shape[1::-1] if packed else query.shape[:-1]


def _fake(query, key, value, attn_mask, starts_q, *rest):
    packed = starts_q is not None
    query, value = (query, value) if packed else _broadcast_batches(query, value)
    return _empty_attention(query, value), empty(_lse_shape(query, packed), query, torch.float32)


def _fake_backward(query, key, value, attn_mask, starts_q, starts_k, slopes, sinks, position_bias, *rest):
    gradients = [empty(t.shape, t) for t in (query, key, value)]
    *_, mask_gradient, position_gradient = rest
    dmask = empty(attn_mask.shape, attn_mask) if mask_gradient else None
    dsinks = None if sinks is None else empty(sinks.shape, sinks)
    return (
        *gradients,
        dmask,
        dsinks,
        empty(position_bias.shape, position_bias) if position_gradient else None,
    )


def _setup_context(ctx, inputs, output):
    tensors, ctx.options = inputs[:10], inputs[10:19]
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    mask_gradient, position_gradient = (ctx.needs_input_grad[1 + i] for i in (3, 8))
    dq, dk, dv, dmask, dsinks, dposition = torch.ops.warpformer.scaled_dot_product_attention_backward(
        *tensors, *ctx.options, out, lse, dout, dlse, mask_gradient, position_gradient
    )
    return (dq, dk, dv, dmask, None, None, None, dsinks, dposition, *(None,) * 11)


_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "Tensor? alibi_slopes, Tensor? sinks, Tensor? position_bias, Tensor? seed, float scale, float softcap, "
    "bool enable_gqa, bool bottom_right, int left, int right, bool position_bidirectional, "
    "int position_max_distance, float dropout_p"
)
register(
    f"scaled_dot_product_attention({_INPUTS}, bool return_lse) -> (Tensor, Tensor)",
    _forward,
    _fake,
    setup_context=_setup_context,
    backward=_gradients,
)
register(
    f"scaled_dot_product_attention_backward({_INPUTS}, Tensor out, Tensor lse, Tensor dout, Tensor? dlse, "
    "bool mask_gradient, bool position_gradient) -> (Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?)",
    _backward,
    _fake_backward,
)

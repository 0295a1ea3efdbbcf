"""attn_implementation="warpformer" of transformers: attention on `ops`, and the masks it takes.

What transformers calls an attention mask is here one of
    None        every key; in a causal layer, query i sees keys 0 to i
    [B, L]      bool, the keys that are no padding; in a causal layer, the last query is at key L - 1
    [B, W, L]   the same of a sliding window: a query sees its own key and W - 1 before it (in a layer that
                is not causal also W - 1 after it); stride 0, so that W costs no memory
    4 dims      all there is to say, bool (True = keep) or additive, as everywhere in transformers
where L counts positions from the first one: keys beyond it are unused slots of a static cache, and a
cache that holds fewer holds the last ones. Only masks that none of these expresses take [B, 1, T, S].

Shapes: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils.import_utils import is_tracing

from warpformer import ops

NAME = "warpformer"


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    output_attentions: bool = False,
    **ignored,
) -> tuple[Tensor, None]:
    """The attention function of transformers' AttentionInterface.

    Args:
        module: the attention layer; `is_causal` of it counts where the argument is None.
        query: [B, H, T, D].
        key, value: [B, G, S, D], not repeated; slots of a static cache that are not in use yet may follow.
        attention_mask: one of those above.
        dropout: of the weights.
        scaling: 1 / sqrt(D) if None.
        sliding_window: W above, unless the mask says it.
        softcap: c of c tanh(s / c).
        position_bias: [1, H, T, S], added to the scores; or T5's table [buckets, H] itself, empty for none.
        s_aux: [H], the logits of attention sinks.
        output_attentions: only False: no weights are ever in memory.

    Returns:
        [B, T, H, D], and None for the weights.
    """
    if output_attentions:
        raise NotImplementedError(
            'attn_implementation="warpformer" has no attention weights to output: '
            'model.set_attn_implementation("eager") computes them'
        )
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if position_bias is not None and not len(position_bias):
        position_bias = None
    keep, is_causal, window, slots = _read(attention_mask, is_causal, sliding_window, query, key)
    if slots < key.shape[2]:
        key, value = key[:, :, :slots], value[:, :, :slots]
    options = {
        "scale": scaling,
        "softcap": softcap or 0.0,
        "window": (None, None) if window is None else (window - 1, window - 1),
        "is_causal": is_causal,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    if keep is None and position_bias is None and _is_decoding(query, key, value, dropout):
        lengths = torch.full(query.shape[:1], slots, dtype=torch.int32, device=query.device)
        q, k, v = (t.transpose(1, 2) for t in (query, key, value))
        return ops.cached_attention(q, k, v, lengths, **options), None
    keep, table = _add_position_bias(module, keep, position_bias, slots)
    out = ops.scaled_dot_product_attention(
        *(query, key, value, keep, dropout),
        enable_gqa=True,
        alignment="bottom-right",
        **options,
        **table,
    )
    return out.transpose(1, 2).contiguous(), None


def _read(mask, is_causal, sliding_window, query, key):
    """(attn_mask of the op, is_causal, W, slots in use), causal from the last key."""
    queries, slots = query.shape[2], key.shape[2]
    if mask is None:
        is_causal = is_causal and queries > 1
        return None, is_causal, sliding_window, queries if is_causal else slots
    if mask.ndim == 4:
        return mask, False, None, mask.shape[-1]
    window = mask.shape[1] if mask.ndim == 3 else sliding_window
    keep = mask[:, :1, -slots:] if mask.ndim == 3 else mask[:, None, -slots:]
    return keep[:, None], is_causal, window, keep.shape[-1]


def _is_decoding(query, key, value, dropout):
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return query.shape[2] == 1 and not dropout and not needs_grad


def _add_position_bias(module, keep, bias, slots):
    """The mask with the bias, and the arguments of the op for a table of biases."""
    if bias is None:
        return keep, {}
    if bias.ndim == 2:
        return keep, {
            "position_bias": bias,
            "position_bidirectional": not module.is_decoder,
            "position_max_distance": module.relative_attention_max_distance,
        }
    bias = bias[..., :slots]
    if keep is None:
        return bias, {}
    return torch.where(keep, bias, -torch.inf) if keep.dtype == torch.bool else bias + keep, {}


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **options,
) -> Tensor | None:
    """The mask function of transformers' AttentionMaskInterface: one of those above, which `attention` takes.

    Args:
        batch_size, q_length, kv_length: B, T, S.
        q_offset, kv_offset: the positions of the first query and the first key.
        mask_function: says which pairs of positions may meet.
        attention_mask: [B, L], bool, True = a token, or what this function made of it.
        allow_is_causal_skip, allow_is_bidirectional_skip: both False ask for 4 dims.
        options: what `sdpa_mask` takes besides.
    """
    if attention_mask is not None and attention_mask.ndim == 3:
        attention_mask = attention_mask[:, 0]
    may_be_short = allow_is_causal_skip or allow_is_bidirectional_skip
    if may_be_short and not (is_tracing(attention_mask) or is_tracing(q_offset)):
        pattern = _pattern(mask_function)
        past = int(q_offset)
        spans = pattern and _Spans(*pattern, past, past + q_length, kv_offset, kv_offset + kv_length)
        if spans and spans.are_aligned():
            return _compact(spans, attention_mask, options["device"])
    return sdpa_mask(
        *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask),
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        **options,
    )


class _Spans(NamedTuple):
    """Which positions meet: queries q_begin to q_end with keys k_begin to k_end."""

    is_causal: bool
    window: int | None  # W
    q_begin: int
    q_end: int
    k_begin: int
    k_end: int

    @property
    def end(self):
        """Of the positions that have keys: the slots beyond are not in use."""
        return self.q_end if self.is_causal else self.k_end

    def is_windowed(self):
        return self.window is not None and self.end - self.k_begin > self.window

    def are_aligned(self):
        """Whether the last query is at the last key in use, where that matters."""
        return (
            self.q_end <= self.k_end if self.is_causal else not self.is_windowed() or self.q_end == self.k_end
        )

    def see_all(self):
        """Whether `attention` sees what it should without a mask."""
        if not self.is_causal:
            return True
        return self.end == self.k_end if self.q_end - self.q_begin == 1 else self.q_begin == 0


def _compact(spans, tokens, device):
    keep = None
    if tokens is not None:
        keep = pad(tokens[:, : spans.end], (0, max(0, spans.end - tokens.shape[1])))
        keep = None if keep.all() else keep
    if not spans.is_windowed():
        if keep is None and spans.see_all():
            return None
        if not spans.is_causal:
            return keep[:, None, None, spans.k_begin :]
    if keep is None:
        keep = torch.ones(1, spans.end, dtype=torch.bool, device=device)
    return keep[:, None].expand(-1, spans.window, -1) if spans.is_windowed() else keep


def _pattern(mask_function):
    """(is_causal, W) of the mask functions of transformers that these say all of, None of others."""
    if mask_function is masking_utils.causal_mask_function:
        return True, None
    if mask_function is masking_utils.bidirectional_mask_function:
        return False, None
    parts = _closure(mask_function, masking_utils.and_masks).get("mask_functions", ())
    if len(parts) != 2:
        return None
    overlay, base = parts
    if base is masking_utils.causal_mask_function:
        found = _closure(overlay, masking_utils.sliding_window_overlay)
        return (True, found["sliding_window"]) if found else None
    if base is masking_utils.bidirectional_mask_function:
        found = _closure(overlay, masking_utils.sliding_window_bidirectional_overlay)
        return (False, found["sliding_window"] + 1) if found else None
    return None


def _closure(function, factory):
    """The variables that `function` closes over; none if it is not what `factory` returns."""
    code = getattr(function, "__code__", None)
    if code not in factory.__code__.co_consts:
        return {}
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, mask)

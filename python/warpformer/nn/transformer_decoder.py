from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from warpformer._C import InputError
from warpformer.nn._blocks import feed_forward, norm_alone_of_sum, norm_of_sum
from warpformer.nn._cached_layer import cached_call
from warpformer.nn._drop_in import drop_in, drop_in_
from warpformer.nn.kv_cache import KVCache
from warpformer.nn.layer_cache import DecoderLayerCache, LayerCache
from warpformer.nn.rotary_embedding import RotaryEmbedding
from warpformer.nn.transformer_encoder import found_causal
from warpformer.ops._arguments import check_type


@drop_in
class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer on `warpformer.ops`, with a cache for decoding.

        x = norm1(x + dropout1(attention(x)))               x = x + dropout1(attention(norm1(x)))
        x = norm2(x + dropout2(attention(x, memory)))       x = x + dropout2(attention(norm2(x), memory))
        x = norm3(x + dropout3(feed_forward(x)))            x = x + dropout3(feed_forward(norm3(x)))
                                                            with norm_first

    Constructor, parameters, initialization, state_dict and forward are torch's; what is fused is as in
    TransformerEncoderLayer.

    Args:
        rotary: rotates queries and keys of the attention of tokens to each other.

    Args of forward:
        tgt: [B, T, C] with batch_first, [T, B, C] without, [T, C] unbatched.
        memory: what the encoder gave, [B, S, C], [S, B, C] or [S, C].
        tgt_mask, tgt_key_padding_mask, tgt_is_causal: masks of the attention of `tgt` to itself.
        memory_mask, memory_key_padding_mask, memory_is_causal: masks of its attention to `memory`.
        cache: from `make_cache`. `tgt` are then the tokens after those that it has, which see these, too,
            and none after them; masks of `tgt` cover all keys, [T, past + T] and [B, past + T]. `memory` is
            read at the first call alone. For inference.

    Returns:
        The shape of `tgt`.

    Raises:
        ArgumentError: as MultiheadAttention.

    Source: torch.nn.TransformerDecoderLayer; "Attention Is All You Need", 3.1.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        rotary: RotaryEmbedding | None = None,
    ):
        super().__init__(
            *(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first),
            *(norm_first, bias, device, dtype),
        )
        drop_in_(self)
        if rotary is not None:
            self.self_attn.rotary = rotary

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | DecoderLayerCache | None = None,
    ) -> Tensor:
        if isinstance(cache, KVCache):
            masks = tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask
            with cached_call(cache, tgt, memory, self.self_attn.batch_first) as (layer,):
                return self.forward(tgt, memory, *masks, tgt_is_causal, memory_is_causal, cache=layer)
        own, other = ({}, {}) if cache is None else ({"cache": each} for each in cache)

        def attention(x):
            own.update(attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
            return self.dropout1(self.self_attn(x, x, x, need_weights=False, **own)[0])

        def attention_to_memory(x):
            other.update(
                attn_mask=memory_mask, key_padding_mask=memory_key_padding_mask, is_causal=memory_is_causal
            )
            return self.dropout2(self.multihead_attn(x, memory, memory, need_weights=False, **other)[0])

        x = tgt
        if self.norm_first:
            h, x = norm_of_sum(self.norm2, x, attention(self.norm1(x)))
            h, x = norm_of_sum(self.norm3, x, attention_to_memory(h))
            return x + self._ff_block(h)
        x = norm_alone_of_sum(self.norm1, x, attention(x))
        x = norm_alone_of_sum(self.norm2, x, attention_to_memory(x))
        return norm_alone_of_sum(self.norm3, x, self._ff_block(x))

    def make_cache(self, **options) -> KVCache:
        """For decoding. Options are those of KVCache: dtype, max_tokens."""
        return KVCache([_layer_cache()], **options)

    def _ff_block(self, x):
        return self.dropout3(feed_forward(self.linear1, self.activation, self.dropout, self.linear2, x))


@drop_in
class TransformerDecoder(nn.TransformerDecoder):
    """torch.nn.TransformerDecoder: a stack of copies of a layer, and a norm; with a cache for decoding.

    Constructor, state_dict and forward are torch's.

    Args of forward:
        tgt, memory, memory_is_causal, and masks: as TransformerDecoderLayer has them.
        tgt_is_causal: whether `tgt_mask` is the causal one; found out if None.
        cache: from `make_cache`, for decoding: `tgt` are then the tokens after those that it holds, and the
            output is that of all of them at once. `memory` is read at the first call alone.

    Raises:
        ArgumentError: as MultiheadAttention.

    Source: torch.nn.TransformerDecoder.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        check_type("TransformerDecoder", "cache", cache, KVCache)
        if tgt_is_causal is None:
            tgt_is_causal = cache is None and found_causal(tgt_mask)
        options = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        x = tgt
        if cache is None:
            for layer in self.layers:
                x = layer(x, memory, **options)
        else:
            x = self._forward_cached(x, memory, options, cache)
        return x if self.norm is None else self.norm(x)

    def _forward_cached(self, x, memory, options, cache):
        if len(cache.layers) != len(self.layers):
            raise InputError(f"the cache is that of {len(cache.layers)} layers, not {len(self.layers)}")
        with cached_call(cache, x, memory, self.layers[0].self_attn.batch_first) as caches:
            for layer, own in zip(self.layers, caches, strict=True):
                x = layer(x, memory, **options, cache=own)
        return x

    def make_cache(self, **options) -> KVCache:
        """For decoding. Options are those of KVCache: dtype, max_tokens."""
        return KVCache([_layer_cache() for _ in self.layers], **options)


def _layer_cache():
    return DecoderLayerCache(LayerCache(), LayerCache(of_memory=True))

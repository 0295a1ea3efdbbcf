import torch
from torch import Tensor, nn

from warpformer import ops
from warpformer.nn._attention_inputs import (
    and_causal,
    check_causal_hint,
    check_mask,
    check_operands,
    merge_masks,
    with_keys,
)
from warpformer.nn._cached_layer import CachedLayer, cached_call
from warpformer.nn._drop_in import drop_in, drop_in_
from warpformer.nn._repack import Repacking
from warpformer.nn.kv_cache import KVCache
from warpformer.nn.layer_cache import MEMORY, LayerCache
from warpformer.nn.rotary_embedding import RotaryEmbedding
from warpformer.ops._arguments import check_flags


@drop_in
class MultiheadAttention(Repacking, nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on `warpformer.ops`, with a cache of keys and values.

        forward(query, key, value) = concat_h(softmax(q_h k_h^T / sqrt(D) + mask) v_h) Wo^T + bo, weights
        q, k, v = query Wq^T + bq, key Wk^T + bk, value Wv^T + bv

    Constructor, parameters, initialization, state_dict and forward are torch's: masks (bool True = masked),
    batch_first, unbatched input, kdim and vdim, bias_k and bias_v, add_zero_attn, dropout of the weights,
    need_weights. Beyond torch: `is_causal` needs no attn_mask, a query that sees no key gives 0 before the
    output layer (torch: NaN), `out_proj` is called as a layer, hooks included, and `quantize_` takes it.

    Args:
        rotary: rotates every head of queries and keys by the positions of their tokens.

    Args of forward:
        query: [B, T, E] with batch_first, [T, B, E] without, [T, E] unbatched.
        key, value: [B, S, kdim], [B, S, vdim], or in the order of query.
        key_padding_mask: [B, S], unbatched [S]; bool (True = masked) or additive.
        need_weights: also return the attention weights, which then are held in memory; False is faster.
        attn_mask: [T, S] or [B H, T, S]; bool (True = masked) or additive.
        average_attn_weights: the mean of the weights of all heads, [B, T, S], not [B, H, T, S].
        is_causal: query i sees keys up to i; an `attn_mask` that says otherwise is an error.
        cache: from `make_cache`. `key` and `value` are new tokens, whose projections are appended to those it
            has, and `query` attends to all; queries are the last of its tokens, and see none after them.
            Masks cover all keys; with any, or with `need_weights`, each call copies keys and values. Of a
            memory, `key` and `value` are read at the first call alone. For inference.

    Returns:
        The output in the shape of `query` with embed_dim, and the weights, or None.

    Raises:
        ArgumentError (an InputError, ValueError, RuntimeError and AssertionError): shapes do not fit, a mask
            is neither bool nor float, or is not causal where `is_causal` says so.

    Source: torch.nn.MultiheadAttention; "Attention Is All You Need", 3.2.2.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device=None,
        dtype=None,
        *,
        rotary: RotaryEmbedding | None = None,
    ):
        super().__init__(
            *(embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first),
            *(device, dtype),
        )
        drop_in_(self)
        if rotary is not None:
            self.rotary = rotary

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: KVCache | CachedLayer | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        flags = {"average_attn_weights": average_attn_weights, "is_causal": is_causal}
        check_flags("MultiheadAttention", need_weights=need_weights, **flags)
        check_operands(query, key, value, (self.embed_dim, self.kdim, self.vdim), self.batch_first)
        batched = query.ndim == 3
        if cache is not None and not isinstance(cache, KVCache | CachedLayer):
            raise TypeError(f"MultiheadAttention: cache must be a KVCache, not {type(cache).__name__}")
        if isinstance(cache, KVCache):
            masks = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            new = query if MEMORY in cache.tables else key
            with cached_call(cache, new, key, self.batch_first) as (layer,):
                return self.forward(query, key, value, *masks, cache=layer)
        tokens = 1 if batched and self.batch_first else 0
        length = query.shape[tokens]
        keys = key.shape[tokens] if cache is None else cache.length
        past = 0 if cache is None or cache.of_memory else keys - key.shape[tokens]
        batch = query.shape[1 - tokens] if batched else 1
        check_mask("attn_mask", attn_mask, (length, keys), (batch * self.num_heads, length, keys))
        check_mask("key_padding_mask", key_padding_mask, (batch, keys) if batched else (keys,))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        if cache is not None:
            is_causal = not cache.of_memory
        elif is_causal and attn_mask is not None and not torch.compiler.is_compiling():
            check_causal_hint(attn_mask)
            attn_mask = None  # the kernel knows it without reading

        own = self._own_keys()
        if is_causal and (own or (need_weights and past)):
            attn_mask, is_causal = and_causal(attn_mask, length, keys, past, query.device), False
        plain = attn_mask is None and key_padding_mask is None and not (self.training and self.dropout)
        attends = cache is not None and plain and not own and not need_weights
        q, k, v = self._projections(query, key, value, cache)
        if attends:
            return self.out_proj(self._tokens(cache.attend(q), batched)), None
        if cache is not None:
            k, v = cache.heads()
        if own:
            k, v = (torch.cat([t, *each], 2) for t, each in zip((k, v), self._as_heads(own, k), strict=True))
            attn_mask, key_padding_mask = (with_keys(m, len(own)) for m in (attn_mask, key_padding_mask))
        mask = merge_masks(attn_mask, key_padding_mask, self.num_heads)
        out, weights = self._attend(q, k, v, mask, is_causal, past, need_weights)
        out = self.out_proj(self._tokens(out, batched))
        if weights is not None:
            weights = _mean_of_heads(weights) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    @property
    def packs(self) -> bool:
        """Whether `forward_packed` computes this layer."""
        return self._qkv_same_embed_dim and "rotary" not in self._modules and not self._own_keys()

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, is_causal: bool = False) -> Tensor:
        """Self-attention of sequences without padding, which lie one after the other.

        Args:
            x: [N, E].
            cu_seqlens: [sequences + 1] int32, where each begins, and N.
            is_causal: whether a token sees none after it.
        """
        q, k, v = self._project(x, 0, 3).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(1)
        dropout = self.dropout if self.training else 0.0
        out = ops.scaled_dot_product_attention(
            q, k, v, None, dropout, is_causal, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens
        )
        return self.out_proj(out.flatten(-2))

    def _projections(self, query, key, value, cache):
        """q [B, H, T, D]; k and v [B, H, S, D], which are appended to the cache, or None of a memory that it
        holds."""
        if cache is not None and cache.of_memory and cache.new_memory is None:
            return self._rotated(self._heads(self._project(query, 0, 1))), None, None
        q, k, v = (self._heads(t) for t in self._project_all(query, key, value))
        held = None if cache is None or cache.of_memory else cache.sequences.held
        q, k = self._rotated(q, held), self._rotated(k, held)
        if cache is not None:
            cache.append(k, v)
        return q, k, v

    def _rotated(self, x, held=None):
        """[B, H, T, D] by positions 0, 1, ..., or held[b], held[b] + 1, ..."""
        if "rotary" not in self._modules:
            return x
        positions = torch.arange(x.shape[2], device=x.device)
        if held is not None:
            positions = held[:, None] + positions
        return self.rotary(x.transpose(1, 2), positions=positions).transpose(1, 2)

    def _project_all(self, query, key, value):
        """Those of the same tensor in one product."""
        if self._qkv_same_embed_dim and key is value:
            if query is key:
                return self._project(query, 0, 3).chunk(3, -1)
            return self._project(query, 0, 1), *self._project(key, 1, 3).chunk(2, -1)
        return [self._project(x, i, i + 1) for i, x in enumerate((query, key, value))]

    def _project(self, x, first, last):
        """By the weights of query (0), key (1) and value (2), from `first` to before `last`."""
        begin, end = first * self.embed_dim, last * self.embed_dim
        if "in_proj" in self._modules:
            return self.in_proj.forward_rows(x, begin, end)
        bias = None if self.in_proj_bias is None else self.in_proj_bias[begin:end]
        if self._qkv_same_embed_dim:
            return ops.linear(x, self.in_proj_weight, bias, rows=(begin, end))
        return ops.linear(x, (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)[first], bias)

    def _heads(self, x):
        """[B, H, T, D] of [B, T, E], [T, B, E] or [T, E]."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.ndim == 3:
            return x.transpose(0, 1)[None]
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _tokens(self, x, batched):
        """The inverse of `_heads`."""
        if not batched:
            return x.squeeze(0).transpose(0, 1).flatten(-2)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(-2)

    def make_cache(self, of_memory: bool = False, **options) -> KVCache:
        """For decoding: `forward(query, key, value, cache=cache)`.

        Args:
            of_memory: the keys and values of the first call are those of all.
            options: those of KVCache: dtype, max_tokens.
        """
        return KVCache([LayerCache(of_memory=of_memory)], **options)

    def set_in_proj(self, layer: nn.Module):
        """Puts a quantized layer in the place of in_proj_weight and in_proj_bias, as `quantize_` does."""
        self.in_proj = layer
        self.in_proj_weight = self.in_proj_bias = None

    def _own_keys(self):
        """Keys and values that every query sees: (bias_k, bias_v), and one pair of zeros, here None."""
        own = [] if self.bias_k is None else [(self.bias_k, self.bias_v)]
        return [*own, (None, None)] if self.add_zero_attn else own

    def _as_heads(self, pairs, like):
        """Of the keys, then of the values, each as [B, H, 1, D]."""
        shape = (len(like), self.num_heads, 1, self.head_dim)
        return [
            [
                like.new_zeros(shape)
                if t is None
                else t.view(1, self.num_heads, 1, self.head_dim).expand(shape).to(like.dtype)
                for t in each
            ]
            for each in zip(*pairs, strict=True)
        ]

    def _attend(self, q, k, v, mask, is_causal, past, need_weights):
        """The output [B, H, T, D], and the weights [B, H, T, S] or None."""
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores, place = torch.matmul(q, k.mT), None
            if not torch.is_grad_enabled():
                place = scores  # nobody needs them again, and fresh memory costs as much as the softmax
            scale = self.head_dim**-0.5
            weights = ops.softmax(scores, mask=mask, scale=scale, is_causal=is_causal, out=place)
            weights = ops.dropout(weights, dropout, self.training)
            return torch.matmul(weights, v), weights
        alignment = "bottom-right" if past and is_causal else "top-left"
        return ops.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, alignment=alignment), None


def _mean_of_heads(weights):
    """[B, T, S] of [B, H, T, S], by a product: torch's mean over such a dimension is slow for bfloat16."""
    heads = weights.shape[1]
    return torch.einsum("bhts,h->bts", weights, weights.new_ones(heads)) / heads

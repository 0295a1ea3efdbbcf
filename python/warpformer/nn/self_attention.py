from torch import Tensor, nn

from warpformer import ops
from warpformer.nn.dropout import Dropout
from warpformer.nn.feed_forward import added
from warpformer.nn.layer_cache import LayerCache
from warpformer.nn.rotary_embedding import RotaryEmbedding
from warpformer.nn.sequences import Sequences


class SelfAttention(nn.Module):
    """Attention of the tokens of packed sequences to each other, with grouped keys and values.

        q, k, v = qkv(x)                          H, G and G heads of width D
        q, k = rotary(q_norm(q), k_norm(k))
        forward(x, ...) = dropout(out(concat_h(attention(q_h, k_h G/H, v_h G/H)))) + residual

    Args:
        qkv: Linear, [C] to [(H + 2 G) D]: the rows of all queries, of all keys, of all values.
        out: Linear, [H D] to [C].
        num_heads: H.
        num_kv_heads: G, a divisor of H.
        rotary: rotates queries and keys; several layers may share one.
        q_norm, k_norm: normalize every head.
        position_bias: T5's, an Embedding of [buckets, H]; several layers may share one.
        is_causal: a token sees none after it.
        sinks: [H], a learned logit of each head that takes weight from all keys, as gpt-oss has it.
        dropout: probability of a 0 in the output, in training; `attention_dropout` of the weights.
        options: scale, window, softcap...: those of `ops.scaled_dot_product_attention`.

    Args of forward:
        x: [N, C], rows of `sequences`.
        sequences: whose tokens they are.
        cache: a LayerCache, to which keys and values are appended; queries then see all of the
            sequence that it holds.
        residual: [N, C].

    Returns:
        [N, C].

    Source: "Attention Is All You Need", 3.2; Ainslie et al., "GQA".
    """

    def __init__(
        self,
        qkv: nn.Module,
        out: nn.Module,
        num_heads: int,
        num_kv_heads: int,
        *,
        rotary: RotaryEmbedding | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        position_bias: nn.Module | None = None,
        is_causal: bool = True,
        sinks: nn.Parameter | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        **options,
    ):
        super().__init__()
        self.qkv = qkv
        self.out = out
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.rotary = rotary
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.position_bias = position_bias
        self.is_causal = is_causal
        self.sinks = sinks
        self.dropout = Dropout(dropout)
        self.attention_dropout = attention_dropout
        self.options = options

    def forward(
        self,
        x: Tensor,
        sequences: Sequences,
        cache: LayerCache | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        heads, groups = self.num_heads, self.num_kv_heads
        projected = self.qkv(x).unflatten(-1, (heads + 2 * groups, -1))
        q, k, v = projected.split_with_sizes((heads, groups, groups), 1)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = self.rotary(q, k, sequences.positions)
        options = dict(self.options, is_causal=self.is_causal)
        if self.sinks is not None:
            options["sinks"] = self.sinks.float()
        if self.position_bias is not None:
            options["position_bias"] = self.position_bias.weight
        if cache is not None:
            cache.append(k, v, sequences)
        if cache is not None and not sequences.is_first:
            out = cache.attend(q, sequences, **options)
        else:
            dropout, starts = self.attention_dropout if self.training else 0.0, sequences.cu_seqlens
            options.update(enable_gqa=True, dropout_p=dropout, cu_seqlens_q=starts, cu_seqlens_k=starts)
            out = ops.scaled_dot_product_attention(q, k, v, **options)
        return added(self.out, self.dropout, out.flatten(1), residual)

    def make_cache(self) -> LayerCache:
        left, _ = self.options.get("window", (None, None))
        return LayerCache(left)

    def extra_repr(self):
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, {self.options}"
